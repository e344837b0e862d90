"""SCP-ECG (EN 1064, ISO 11073-91064): sections of a binary record; the rhythm of section 6 is read.

Read here, by the standard; there is no library for it that is kept up. Samples are plain, or first or second
differences, packed by the default Huffman table or the record's own. Not read: records whose average beats were
subtracted, and those with fewer samples outside the QRS complexes (bimodal compression).
"""

import binascii
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np

from elm_jax.ecg.names import NUMBERED
from elm_jax.ecg.stored import AGAIN, Channel, Stored, read_file
from elm_jax.errors import UserError

WHAT = "an SCP-ECG record"
_MOST, _MOST_SAMPLES = 64 << 20, 1 << 22  # bytes; samples of all leads: far more than a resting ECG has
_HEADER, _POINTER, _LEAD, _CODE = 16, 10, 9, 9  # bytes
_MOST_TABLES, _MOST_CODES, _LONGEST_CODE = 16, 1024, 6  # of bytes
_DEFAULT = 19999  # for a number of tables
# (bits of the prefix, of the whole code, value): k ones, a zero and the sign for ±k up to 8; then 8 or 16 bits follow.
_DEFAULT_CODES = [("0", 1, 0), ("1111111110", 18, 0), ("1111111111", 26, 0)]
_DEFAULT_CODES += [(f"{'1' * k}0{sign}", k + 2, k if sign == "0" else -k) for k in range(1, 9) for sign in "01"]


def read_scp(path: Path) -> Stored:
    """The rhythm of a record. Raises UserError: damaged, or stored in a way that is not read."""
    data = read_file(path, WHAT, _MOST)
    if len(data) < 6 + _HEADER or struct.unpack_from("<I", data, 2)[0] != len(data):
        raise UserError(path, f"{len(data)} bytes that do not begin as one of that length", WHAT, AGAIN)
    checksum = struct.unpack_from("<H", data)[0]
    if checksum and checksum != binascii.crc_hqx(data[2:], 0xFFFF):
        raise UserError(path, "a checksum that does not fit", WHAT, AGAIN)
    try:
        sections = _sections(path, data)
        return _record(path, sections)
    except (struct.error, KeyError) as error:
        found = f"no section {error}" if isinstance(error, KeyError) else f"a section that is cut ({error})"
        raise UserError(path, found, WHAT, AGAIN) from None


def _sections(path: Path, data: bytes) -> dict[int, bytes]:
    """What stands behind the header of each section, by its number."""
    length = struct.unpack_from("<I", data, 6 + 4)[0]
    found = {}
    for at in range(6 + _HEADER, min(6 + length, len(data)) - _POINTER + 1, _POINTER):
        number, size, start = struct.unpack_from("<HII", data, at)
        if size <= _HEADER:
            continue
        if start < 1 or start - 1 + size > len(data) or number in found:
            raise UserError(path, f"section {number} of {size} bytes at {start}, or twice", WHAT, AGAIN)
        found[number] = data[start - 1 + _HEADER : start - 1 + size]
    return found


def _record(path: Path, sections: dict[int, bytes]) -> Stored:
    count, flags = struct.unpack_from("<BB", sections[3])
    leads = [struct.unpack_from("<IIB", sections[3], 2 + _LEAD * i) for i in range(count)]
    rhythm = sections[6]
    step, interval, differences, bimodal = struct.unpack_from("<HHBB", rhythm)
    sizes = struct.unpack_from(f"<{count}H", rhythm, 6)
    if flags & 1 or bimodal:
        found = "a rhythm from which average beats were taken away" if flags & 1 else "bimodal compression"
        raise UserError(path, found, "all samples, plain or packed by Huffman's codes", "export it so, or as XML")
    if len({(start, end) for start, end, _ in leads}) > 1:
        raise UserError(path, "leads of several stretches of time", "all of one", "export it so")
    samples = leads[0][1] - leads[0][0] + 1 if leads else 0
    if samples < 1 or count * samples > _MOST_SAMPLES:
        found = f"{count} leads of {samples} samples"
        raise UserError(path, found, f"1 to {_MOST_SAMPLES} samples together", AGAIN)
    if not interval or not step or differences > 2:
        found = f"{interval} µs a sample, {step} nV a step, encoding {differences}"
        raise UserError(path, found, "numbers above 0 and encoding 0, 1 or 2", AGAIN)
    codes = _codes(path, sections[2]) if 2 in sections else None
    channels, at = [], 6 + 2 * count
    for (*_, number), size in zip(leads, sizes, strict=True):
        packed, at = rhythm[at : at + size], at + size
        if at > len(rhythm):
            raise UserError(path, f"{at} bytes of leads in {len(rhythm)}", WHAT, AGAIN)
        name = NUMBERED.get(number, f"SCP lead {number}")
        values = np.frombuffer(packed[: size // 2 * 2], "<i2") if codes is None else _unpacked(packed, samples, codes)
        if samples > len(values):
            raise UserError(path, f"{len(values)} samples of {name}", f"{samples}", AGAIN)
        channels.append(Channel(name, _summed(values[:samples], differences), 1e6 / interval, "nV", step))
    return Stored(path, channels, _statements(sections.get(8, b"")))


def _codes(path: Path, section: bytes) -> dict[str, tuple[int, int]]:
    """Prefix of each code, in bits that are written as text -> how many bits stand behind it, and the value."""
    tables = struct.unpack_from("<H", section)[0]
    codes = _DEFAULT_CODES
    if tables != _DEFAULT:
        number = struct.unpack_from("<H", section, 2)[0]
        if not 0 < tables <= _MOST_TABLES or not 0 < number <= _MOST_CODES:
            raise UserError(path, f"{tables} Huffman tables, the first of {number} codes", WHAT, AGAIN)
        codes = []
        for i in range(number):
            prefix, bits, mode, value, code = struct.unpack_from("<BBBhI", section, 4 + _CODE * i)
            if not 0 < prefix <= 32 or not prefix <= bits <= prefix + 16 or mode != 1:
                found = f"a Huffman code of {prefix} of {bits} bits" if mode == 1 else "Huffman tables that change"
                raise UserError(path, found, "one table of codes", "export it with the default table, or as XML")
            codes.append((f"{code:032b}"[::-1][:prefix], bits, value))  # its first bit is the lowest
    if any(after.startswith(prefix) for (prefix, *_), (after, *_) in pairwise(sorted(codes))):
        raise UserError(path, "Huffman codes of which one begins another", "codes that are told apart", AGAIN)
    return {prefix: (bits - len(prefix), value) for prefix, bits, value in codes}


def _unpacked(packed: bytes, samples: int, codes: dict[str, tuple[int, int]]) -> np.ndarray:
    """The first `samples` values, or as many as there are."""
    packed = packed[: samples * _LONGEST_CODE]
    bits = f"{int.from_bytes(packed, 'big'):0{8 * len(packed)}b}" if packed else ""
    lengths = sorted({len(prefix) for prefix in codes})
    values, at = [], 0
    while len(values) < samples:
        length = next((length for length in lengths if bits[at : at + length] in codes), 0)
        more, value = codes[bits[at : at + length]] if length else (0, 0)
        at += length + more
        if not length or at > len(bits):
            break
        extra = bits[at - more : at]
        values.append(int(extra, 2) - (int(extra[0]) << more) if extra else value)
    return np.array(values, np.int64)


def _summed(values: np.ndarray, differences: int) -> np.ndarray:
    """Samples of differences: the first one is one, of second differences the second too."""
    values = values.astype(np.int64)
    if differences == 2 and len(values) > 1:
        values[1] -= values[0]
        values[1:] = np.cumsum(values[1:])
    return np.cumsum(values) if differences else values


def _statements(section: bytes) -> str:
    """The full text of the interpretation."""
    found, at = [], 9
    for _ in range(section[8] if len(section) > 8 else 0):
        size = int.from_bytes(section[at + 1 : at + 3], "little")
        found.append(section[at + 3 : at + 3 + size].split(b"\0")[0].decode("latin-1").strip())
        at += 3 + size
    return "; ".join(filter(None, found))
