"""WFDB records: what their headers say, and their signals in millivolts.

Headers are read here, strictly, and wfdb decodes the samples: it takes a header for ASCII (so that µV becomes V), fills
in a gain or rate that it does not understand, and gives all segments the units of the first.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.ecg.formats.mat import mat_values
from elm_jax.ecg.names import millivolts
from elm_jax.ecg.npy import MAX_BYTES
from elm_jax.errors import UserError, refused, some
from elm_jax.folders import check_regular

_RATE = 250.0  # of a header that states none, by WFDB's standard
_RECORD = re.compile(  # strict: wfdb finds numbers where no number should be
    r"[-\w]+(?:/(?P<segments>\d{1,9}))?\s+(?P<signals>\d{1,9})"
    r"(?:\s+(?P<rate>[^\s/(]+)(?:/[^\s()]*)?(?:\([^\s()]*\))?(?:\s+(?P<frames>\d+)?.*)?)?"
)
_FORMAT = re.compile(r"(?P<form>\d+)(?:x(?P<samples>\d{1,9}))?(?::(?P<skew>\d{1,6}))?(?:\+\d+)?")
_PACKED = ("508", "516", "524")  # FLAC
_GAIN = re.compile(  # as wfdb takes it
    r"(?P<gain>-?\d*\.?\d*(?:e[-+]?\d+)?)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>.*))?"
)
_LONGEST, _LONGEST_LINE = 1 << 20, 1000  # of a header: numbers of millions of digits take hours
_FIX = "correct the header, or save the signals as .npy"


@dataclass(frozen=True)
class _Signal:
    """A line of a header."""

    file: str
    format: str
    gain: str
    zero: str  # of the converter
    name: str  # "" where it has no description


@dataclass(frozen=True)
class _Header:
    path: Path
    frames: int  # 0: as many as the files hold
    rate: float  # frames a second
    signals: tuple[_Signal, ...]
    segments: tuple[tuple[str, int], ...]  # name, frames

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(signal.name for signal in self.signals)


@dataclass(frozen=True)
class WfdbRecord:
    """A record whose headers are read: the names of its signals, "" for one without a description."""

    header: Path
    names: tuple[str, ...]
    report, says_units = "", True
    _parts: tuple[tuple[_Header, int | None], ...]  # with the frames that the record says a segment has

    @classmethod
    def open(cls, path: Path) -> "WfdbRecord":
        """The record that is called `path`, with or without an ending. Raises UserError."""
        header = header_of(path)
        whole = _read_header(header)
        if not whole.segments:
            return cls(header, whole.names, ((whole, None),))
        gaps = [frames for name, frames in whole.segments if name == "~"]
        if gaps:
            raise UserError(header, f"a gap of {gaps[0]} samples", "a record without gaps", "give one of its segments")
        parts = [(_read_header(header.with_name(f"{name}.hea")), frames) for name, frames in whole.segments]
        for part, _ in parts:
            if part.segments:
                raise UserError(part.path, "segments of a segment", "segments that have signals", _FIX)
            if part.rate != whole.rate:
                raise UserError(
                    part.path, f"{part.rate:g} frames a second", f"{whole.rate:g} as in {header.name}", _FIX
                )
        return cls(header, parts[0][0].names, tuple(part for part in parts if part[1] > 0))  # 0: only says the layout

    def read(self, rows: Sequence[int], unit: str | None = None) -> tuple[np.ndarray, float]:
        """The signals `rows`, indices into `names`: (len(rows), L) float64 in mV, and their samples a second.

        A header always says the `unit`, or means mV. Each signal is read at its own rate, and each segment scaled as
        its own header says. Raises UserError for what cannot be read, is not in volts, has no gain, or lies at several
        rates.
        """
        pieces, rates = [], set()
        for part, frames in self._parts:
            names, own = part.names, list(rows)
            if names != self.names:
                absent = [name for name in (self.names[row] for row in rows) if names.count(name) != 1]
                if absent:
                    raise UserError(part.path, f"signals {', '.join(names)}", f"{some(absent)} among them, once", _FIX)
                own = [names.index(self.names[row]) for row in rows]
            piece, rate, count = _read(part, own)
            if frames not in (None, count):
                raise UserError(part.path, f"{count} frames", f"{frames} as in {self.header.name}", _FIX)
            pieces.append(piece)
            rates.add(rate)
        if len(rates) != 1:
            raise UserError(self.header, f"segments at {_hertz(rates)}", "one rate", "give one segment")
        return np.concatenate(pieces, axis=1), rates.pop()

    def gains(self, rows: Sequence[int], unit: str | None = None) -> tuple[float, ...]:
        """Converter steps a mV of the signals `rows`, which can be read: of several segments the most."""
        found = []
        for part, _ in self._parts:
            own = [row if part.names == self.names else part.names.index(self.names[row]) for row in rows]
            signals = [part.signals[row] for row in own]
            found.append([abs(_steps(signal) / _scale(part.path, signal)) for signal in signals])
        return tuple(map(max, zip(*found, strict=True)))


def header_of(path: Path) -> Path:
    """The header of the record `path`."""
    return path.with_suffix(".hea") if path.suffix in (".hea", ".dat", ".mat") else path.with_name(f"{path.name}.hea")


def files_of(header: Path) -> list[Path]:
    """All files of the record, those of its segments too, `header` first; as far as they are told."""
    found, headers = [], [header]
    for path in headers:
        found.append(path)
        with suppress(UserError):
            told = _read_header(path)
            found += [path.parent / signal.file for signal in told.signals]
            if path == header:
                headers += [path.with_name(f"{name}.hea") for name, _ in told.segments if name != "~"]
    return list(dict.fromkeys(found))


def _read_header(path: Path) -> _Header:
    check_regular(path, "a WFDB header")
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
    except OSError as error:
        raise UserError(path, error.strerror or str(error), "a WFDB header", "check the path") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(content) > _LONGEST or any(len(line) > _LONGEST_LINE for line in lines):
        raise UserError(
            path,
            "a longer one",
            f"a WFDB header: at most {_LONGEST} bytes, and {_LONGEST_LINE} characters a line",
            _FIX,
        )
    match = _RECORD.fullmatch(lines[0]) if lines and lines[0].isascii() else None
    if match is None:
        raise UserError(
            path,
            f"the line {lines[0][:80]!r}" if lines else "no line but comments",
            "a WFDB header: name, number of signals, sampling rate",
            _FIX,
        )
    rate = _RATE if match["rate"] is None else _number(path, "sampling rate", match["rate"])
    count = int(match["segments"] or match["signals"])
    if len(lines) <= count:
        raise UserError(path, f"{len(lines) - 1} lines after the first", str(count), f"download it again, or {_FIX}")
    if match["segments"]:
        if count == 0:
            raise UserError(path, "no segment", "some", _FIX)
        segments = tuple(_segment(path, line) for line in lines[1 : count + 1])
        names = Counter(name for name, _ in segments if name != "~")
        if twice := [name for name, times in names.items() if times > 1]:
            raise UserError(path, f"{some(twice)} more than once", "each segment once", _FIX)
        return _Header(path, 0, rate, (), segments)
    signals = tuple(_signal(path, line) for line in lines[1 : count + 1])
    files = [name for name, _ in groupby(signal.file for signal in signals)]
    if len(set(files)) < len(files):
        raise UserError(path, f"signals of {some(files)}", "signals of one file behind each other", _FIX)
    return _Header(path, int(match["frames"] or 0), rate, signals, ())


def _segment(path: Path, line: str) -> tuple[str, int]:
    match = re.fullmatch(r"([-\w]+|~)\s+(\d{1,15})", line)
    if match is None or match[1] == path.stem:
        raise UserError(path, f"the line {line[:80]!r}", "a segment: another record's name, its samples", _FIX)
    return match[1], int(match[2])


def _signal(path: Path, line: str) -> _Signal:
    words = line.split(maxsplit=8)
    sound = len(words) > 1 and _FORMAT.fullmatch(words[1]) and words[1].isascii()
    if not sound or os.sep in words[0] or "\0" in words[0]:
        raise UserError(path, f"the line {line[:80]!r}", "a signal: file, format, gain, …, description", _FIX)
    words += [""] * (9 - len(words))
    return _Signal(words[0], words[1], words[2], words[4], words[8].strip())


def _number(path: Path, what: str, text: str) -> float:
    with suppress(ValueError):
        value = float(text)
        if np.isfinite(value):
            return value
    raise UserError(path, f"{what} {text[:40]!r}", "a number", _FIX)


def _scale(path: Path, signal: _Signal) -> float:
    """Millivolts for one of the signal's units."""
    what = f"of signal {signal.name or signal.file}"
    match = _GAIN.fullmatch(signal.gain)
    if match is None:
        raise UserError(path, f"{signal.gain!r} {what}", "gain(baseline)/unit", _FIX)
    if not match["gain"] or _number(path, f"gain {what}", match["gain"]) == 0:
        raise UserError(
            path,
            f"no gain {what}",
            "converter steps for one mV: without a gain a signal is uncalibrated",
            "write it into the header, as in 1000/mV",
        )
    scale = millivolts(match["unit"] or "mV")
    if scale is None:
        raise UserError(path, f"unit {match['unit']!r} {what}", "V, mV, µV or nV", "write the unit into the header")
    return scale


def _check_claim(header: _Header, name: str) -> None:
    """Raise UserError where a header claims more samples of a file than it can hold: room would be made for them."""
    path, kinds = header.path.parent / name, [_FORMAT.fullmatch(s.format) for s in header.signals if s.file == name]
    check_regular(path, "a file of samples")
    size = os.path.getsize(path) if os.path.isfile(path) else None  # which raise nothing, however long the name is
    claimed = header.frames * sum(int(kind["samples"] or 1) for kind in kinds if kind)
    packed = any(kind["form"] in _PACKED for kind in kinds if kind)
    if size is None:
        return
    most = MAX_BYTES // 8 if packed else size  # no other format has less than a byte a sample
    if size > MAX_BYTES or claimed > most:
        found = f"{claimed} samples of {name}, of {size} bytes"
        expected = f"at most {most}, in at most {MAX_BYTES} bytes"
        raise UserError(header.path, found, expected, f"download it again, or {_FIX}")


def _read(header: _Header, rows: list[int]) -> tuple[np.ndarray, float, int]:
    """Of one segment the signals `rows` (len(rows), L) in mV, their samples a second, and its frames."""
    path, chosen = header.path, [header.signals[row] for row in rows]
    scales = [_scale(path, signal) for signal in chosen]
    skew = max(int(_FORMAT.fullmatch(signal.format)["skew"] or 0) for signal in chosen)  # type: ignore[index]
    matrix = _matrix(header)
    if matrix is not None:
        values = np.stack([_unscaled(path, header.signals[row], matrix[row]) for row in rows])
        return values * np.array(scales)[:, None], header.rate, matrix.shape[1]
    for name in dict.fromkeys(signal.file for signal in header.signals):
        _check_claim(header, name)
    import wfdb  # slow to import, and not needed for prepared records

    fix = "download it again if it is damaged, else save its signals as .npy"
    with refused(path, "an unreadable record", "a whole WFDB record", fix, Exception):  # wfdb lets all errors through
        record: Any = wfdb.rdrecord(str(path.with_suffix("")), channels=rows, smooth_frames=False)
    rates = {header.rate * samples for samples in record.samps_per_frame}
    if len(rates) > 1:
        raise UserError(path, f"leads at {_hertz(rates)}", "all at one rate", "save them at one rate as .npy")
    frames = max(record.sig_len - skew, 0)  # a signal that lags lacks its last samples
    values = np.stack(record.e_p_signal)[:, : frames * record.samps_per_frame[0]]
    return values * np.array(scales)[:, None], rates.pop(), frames


def _matrix(header: _Header) -> np.ndarray | None:
    """`val` (signals, L), where the file of samples is of MATLAB 5 or later: they do not lie where the header says."""
    names = {signal.file for signal in header.signals}
    file = header.path.parent / next(iter(names), "")
    if len(names) != 1 or file.suffix != ".mat" or not os.path.isfile(file):
        return None
    with refused(file, "no readable file", "a file of samples", "check the path"), file.open("rb") as opened:
        if opened.read(6) != b"MATLAB":  # version 4: bare numbers behind 24 bytes
            return None
    value, count = mat_values(file).get("val"), len(header.signals)
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "fiu":
        raise UserError(file, "no matrix val", "the samples of the record", "download it again")
    value = value if value.shape[0] == count else value.T
    if value.shape[0] != count or header.frames not in (0, value.shape[1]):
        found, expected = f"val of {value.shape[0]} x {value.shape[1]}", f"{count} x {header.frames or 'samples'}"
        raise UserError(file, found, f"{expected}, as in {header.path.name}", "download it again")
    return value


def _unscaled(path: Path, signal: _Signal, steps: np.ndarray) -> np.ndarray:
    """Steps of the converter in the signal's unit: without its baseline, by its gain."""
    gain = _GAIN.fullmatch(signal.gain)
    assert gain is not None  # or `_scale` had refused it
    return (steps - _number(path, "zero", gain["baseline"] or signal.zero or "0")) / _steps(signal)


def _steps(signal: _Signal) -> float:
    """Of the converter for one of the signal's unit; `_scale` has not refused it."""
    gain = _GAIN.fullmatch(signal.gain)
    assert gain is not None
    return float(gain["gain"])


def _hertz(rates: set[float]) -> str:
    return " and ".join(f"{rate:g} Hz" for rate in sorted(rates))
