"""XLI, by which Philips packs waveforms: LZW of ten bits over second differences.

It is known by the published work on Sierra ECG files (C. A. Watford, sierra-ecg-tools). A chunk for each lead: the
number of its packed bytes (int32), an unused number and the first second difference (int16 each), the packed bytes.
Unpacked, it holds the upper bytes of all samples, then the lower ones: two samples, then second differences plus 64.
"""

from pathlib import Path

import numpy as np

from elm_jax.ecg.stored import AGAIN
from elm_jax.errors import UserError

_BITS, _LAST = 10, (1 << 10) - 2


def unpack_xli(path: Path, data: bytes, leads: int, samples: int) -> np.ndarray:
    """(leads, samples) int64, as they are stored. Raises UserError: damaged, or with fewer samples."""
    rows, at = [], 0
    for lead in range(leads):
        size, start = int.from_bytes(data[at : at + 4], "little"), at + 8
        first = int.from_bytes(data[at + 6 : start], "little", signed=True)
        at = start + size
        if at > len(data):
            found = f"{size} packed bytes of lead {lead + 1} in the {max(len(data) - start, 0)} that are there"
            raise UserError(path, found, "all of them", AGAIN)
        rows.append(_samples(path, _unpacked(path, data[start:at], 4 * samples + 4096), first, samples))
    return np.array(rows)


def _unpacked(path: Path, packed: bytes, most: int) -> bytes:
    """LZW with codes of ten bits, the first bit highest; its table is never emptied."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    codes = bits[: len(bits) // _BITS * _BITS].reshape(-1, _BITS) @ (1 << np.arange(_BITS - 1, -1, -1))
    table = [bytes([code]) for code in range(256)]
    found, size, before = [], 0, b""
    for code in codes.tolist():
        if code > _LAST:
            break
        if code > len(table) or code == len(table) and not before:
            raise UserError(path, f"the code {code} before it is made", "waveforms packed by XLI", AGAIN)
        text = table[code] if code < len(table) else before + before[:1]
        if before and len(table) <= _LAST:
            table.append(before + text[:1])
        found.append(text)
        before, size = text, size + len(text)
        if size > most:
            raise UserError(path, f"more than {most} unpacked bytes", "two a sample", AGAIN)
    return b"".join(found)


def _samples(path: Path, data: bytes, first: int, samples: int) -> np.ndarray:
    count = samples if 0 <= len(data) - 2 * samples < 2 else (len(data) + 1) // 2
    if count < samples or samples < 2:
        raise UserError(path, f"{len(data)} unpacked bytes", f"{2 * samples}, two a sample", AGAIN)
    halves = np.frombuffer(data.ljust(2 * count, b"\0"), np.uint8)[: 2 * count].reshape(2, count)
    stored = halves[0].astype(np.int8).astype(np.int64) * 256 + halves[1]
    second = np.concatenate([[first], stored[2:-1] - 64]) if count > 2 else np.zeros(0, np.int64)
    slopes = (stored[1] - stored[0]) - np.cumsum(second)
    values = np.concatenate([stored[:2], stored[1] + np.cumsum(slopes)])[:samples]
    return values.astype(np.int16).astype(np.int64)  # its sums are of sixteen bits
