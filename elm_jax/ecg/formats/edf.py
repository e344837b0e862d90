"""EDF, EDF+ and BDF (Kemp and others, 1992 and 2003; BioSemi): signals of 16 or 24 bits in records of equal length.

Read here, by the published specification: a header of fixed fields, and numbers.
"""

import re
from pathlib import Path

import numpy as np

from elm_jax.ecg.stored import AGAIN, Channel, Stored, read_file
from elm_jax.errors import UserError

WHAT = "an EDF, EDF+ or BDF file"
_FIELDS = (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)  # of a signal: label, transducer, unit, limits, filter, samples, reserved
_MOST_SIGNALS = 512
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?", re.IGNORECASE)


def read_edf(path: Path) -> Stored:
    """The signals of a file, without its annotations. Raises UserError: damaged, cut, or in pieces (EDF+D)."""
    data = read_file(path, WHAT)
    wide = data[:8] == b"\xffBIOSEMI"
    if not wide and data[:8].strip() != b"0" or len(data) < 256:
        raise _wrong(path, f"the beginning {data[:8]!r}")
    if data[192:197] in (b"EDF+D", b"BDF+D"):
        raise UserError(path, "a recording in pieces (EDF+D)", "one without gaps", "export it as EDF or EDF+C")
    count = _whole(path, "number of signals", data[252:256], 1, _MOST_SIGNALS)
    size = _whole(path, "bytes of the header", data[184:192], 0, 1 << 20)
    if size != 256 * (count + 1) or len(data) < size:
        raise _wrong(path, f"a header of {size} bytes for {count} signals in a file of {len(data)}")
    columns, at = [], 256
    for width in _FIELDS:
        columns.append([data[at + i * width : at + (i + 1) * width] for i in range(count)])
        at += count * width
    samples = [_whole(path, "samples in a record", text, 1, 1 << 24) for text in columns[8]]
    step, claimed = 3 if wide else 2, _whole(path, "number of records", data[236:244], -1, 1 << 24)
    frame, body = sum(samples) * step, len(data) - size
    records = body // frame if claimed == -1 else claimed
    if records * frame > body or claimed != -1 and body - records * frame >= frame or records == 0:
        raise UserError(path, f"{body} bytes of samples", f"{records} records of {frame} bytes", AGAIN)
    seconds = _number(path, "seconds of a record", data[244:252])
    if seconds <= 0:
        raise _wrong(path, f"records of {seconds:g} seconds")
    block = np.frombuffer(data, np.uint8, records * frame, size).reshape(records, frame)
    starts = np.cumsum([0, *samples]) * step
    channels = []
    for i, number in enumerate(samples):
        name = re.sub(r"\s+", " ", _text(columns[0][i]))
        if name in ("EDF Annotations", "BDF Annotations"):
            continue
        steps = _steps(block[:, starts[i] : starts[i + 1]], step)
        low, high, least, most = (_number(path, f"limits of {name}", columns[k][i]) for k in (3, 4, 5, 6))
        gain = (high - low) / (most - least) if most != least else 0.0  # which is refused where the signal is read
        channels.append(Channel(name, steps, number / seconds, _text(columns[2][i]), gain, low - least * gain))
    return Stored(path, channels)


def _steps(raw: np.ndarray, width: int) -> np.ndarray:
    """Whole numbers of 2 or 3 bytes, little-endian, of all records (records, bytes): (samples,)."""
    raw = np.ascontiguousarray(raw)
    if width == 2:
        return raw.view("<i2").ravel()
    parts = raw.reshape(-1, 3)
    return parts[:, 0] | parts[:, 1].astype(np.int32) << 8 | parts[:, 2].astype(np.int8).astype(np.int32) << 16


def _text(field: bytes) -> str:
    try:
        return field.decode("utf-8").strip("\0 ")
    except UnicodeDecodeError:
        return field.decode("latin-1").strip("\0 ")


def _number(path: Path, what: str, field: bytes) -> float:
    text = _text(field)
    if _NUMBER.fullmatch(text) is None or not np.isfinite(float(text)):
        raise _wrong(path, f"{what} {text!r}")
    return float(text)


def _whole(path: Path, what: str, field: bytes, least: int, most: int) -> int:
    value = _number(path, what, field)
    if value != int(value) or not least <= value <= most:
        raise _wrong(path, f"{what} {value:g}")
    return int(value)


def _wrong(path: Path, found: str) -> UserError:
    return UserError(path, found, WHAT, AGAIN)
