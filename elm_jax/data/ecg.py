"""A recording: read a file, put its leads in the canonical order, check it, resample, cut, normalise.

`.npy` and WFDB files in; a Recording (C leads x L samples, float32, millivolts where the file says so) out.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax import compat as behaviours
from elm_jax.data.npy import read_npy
from elm_jax.data.resampling import resample, resample_by_spline
from elm_jax.errors import UserError, nearest

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
AVL_FIRST = ("I", "II", "III", "aVL", "aVR", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# Row order of the .npy files that the reference's preparation writes, by its dataset folders: it permutes
# only some datasets, and the files do not say so.
FOLDER_ORDER = {
    **dict.fromkeys(("ptb_xl", "ptb", "csn", "cpsc", "heed"), LEADS),
    **dict.fromkeys(("mimic_iv", "mimic", "code15", "echonext"), AVL_FIRST),
}
DEFAULT_RATE = 250.0  # samples per second of a bare array: what the reference's preparation writes
_MILLIVOLTS = {"nv": 1e-6, "uv": 1e-3, "µv": 1e-3, "mv": 1.0, "v": 1e3}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """signal (C, L) with its rows in canonical order, finite; leads: their names; samples per second."""

    signal: np.ndarray
    leads: tuple[str, ...]
    sampling_rate: float
    report: str = ""


@dataclass(frozen=True)
class _Raw:
    """What a file says: signal (rows, L) of any real dtype, rows' names and rate where it gives them."""

    signal: np.ndarray
    names: tuple[str, ...] | None
    sampling_rate: float | None
    report: str


def read_ecg(
    path: str | Path, lead_order: Sequence[str] | None = None, sampling_rate: float | None = None
) -> Recording:
    """The 12-lead recording in a `.npy` file or a WFDB record (with or without `.hea`, `.dat`, `.mat`).

    signal (12, L) float32 in the order of LEADS, whatever the order of the file; further leads are dropped.
    lead_order names the file's rows and overrides what the file says; without either, the order known for
    the reference's dataset folder is taken, else LEADS, with a note in the log. sampling_rate (Hz) likewise;
    a bare array is taken to be at 250 Hz. Raises UserError for whatever cannot be such a recording.
    """
    return read_recording(path, lead_order, sampling_rate)


def read_recording(
    path: str | Path,
    lead_order: Sequence[str] | None = None,
    sampling_rate: float | None = None,
    bare_rate: float = DEFAULT_RATE,
    dtype: type[np.floating[Any]] = np.float32,
) -> Recording:
    """`read_ecg` with the rate to assume for a file that states none, and the signal's dtype."""
    path = os.fspath(path)  # a loader reads thousands a second, and a Path costs as much as an array operation
    raw = _read_npy(path) if path.endswith(".npy") else _read_wfdb(Path(path))
    if raw.signal.ndim != 2 or raw.signal.size == 0:
        raise UserError(path, f"an array of shape {raw.signal.shape}", "(leads, samples)", "save it so")
    rate = raw.sampling_rate if sampling_rate is None else sampling_rate
    if rate is None:
        rate = bare_rate
        _note(os.path.dirname(path), f"no sampling rate in the files: taken as {bare_rate:g} Hz")
    if not (np.isfinite(rate) and rate > 0):
        raise UserError(path, f"sampling rate {rate}", "a positive number of Hz", "give sampling_rate")
    rows = _canonical_rows(path, raw, lead_order)
    signal = raw.signal if rows == list(range(len(raw.signal))) else raw.signal[rows]
    with np.errstate(over="ignore"):
        signal = signal.astype(dtype, copy=not signal.flags.writeable)  # a bare array is a view of the file's bytes
    _check_finite(path, signal)
    return Recording(signal, LEADS, float(rate), raw.report)


def _read_npy(path: str) -> _Raw:
    value = read_npy(path)
    if isinstance(value, np.ndarray):
        return _Raw(value, None, None, "")
    if "ecg" not in value:
        raise UserError(path, f"keys {sorted(value)}", "the key ecg", "write the file with prepare")
    signal = _of_lists(value["ecg"]) if isinstance(value["ecg"], list | tuple) else value["ecg"]
    if not isinstance(signal, np.ndarray) or signal.dtype.kind not in "fiu":
        kind = f"dtype {signal.dtype}" if isinstance(signal, np.ndarray) else f"type {type(signal).__name__}"
        raise UserError(path, f"ecg of {kind}", "an array of real numbers", "save it as float32")
    report = value.get("report")
    text = "; ".join(map(str, report)) if isinstance(report, (list, tuple)) else str(report or "")
    names, rate = value.get("leads"), value.get("target_sf")
    return _Raw(
        signal,
        tuple(map(str, names)) if isinstance(names, (list, tuple)) else None,
        float(rate) if isinstance(rate, (int, float, np.integer, np.floating)) else None,
        text,
    )


def _of_lists(rows: Sequence[Any]) -> np.ndarray | Sequence[Any]:
    """Lists of numbers, all of one length, as an array; other lists as they are."""
    regular = all(isinstance(row, list | tuple) and len(row) == len(rows[0]) for row in rows)
    if regular and all(type(number) in (int, float) for row in rows for number in row):
        return np.array(rows, np.float64)
    return rows


def _read_wfdb(path: Path) -> _Raw:
    stem = path.with_suffix("") if path.suffix in (".hea", ".dat", ".mat") else path
    header = stem.with_name(stem.name + ".hea")
    if not header.is_file():
        raise UserError(
            str(path),
            "no file" if not path.is_file() else f"no header {header.name} beside it",
            "a .npy file or a WFDB record with its .hea",
            "check the path (and data.root)",
        )
    import wfdb  # slow to import, and not needed for prepared records

    try:
        record: Any = wfdb.rdrecord(str(stem))
    except Exception as error:  # wfdb lets the errors of its parsers through
        raise UserError(
            str(header), f"an unreadable record ({error})", "a whole WFDB record", "download it again"
        ) from None
    if record.p_signal is None:
        raise UserError(str(header), "no signals", "a record with signals", "give another record")
    unknown = {unit for unit in record.units if unit.lower() not in _MILLIVOLTS}
    if unknown:
        _note(str(path.parent), f"unit {sorted(unknown)[0]} taken as millivolts")
    scale = np.array([_MILLIVOLTS.get(unit.lower(), 1.0) for unit in record.units])
    return _Raw((record.p_signal * scale).T, tuple(record.sig_name), float(record.fs), "")


def _canonical_rows(path: str, raw: _Raw, lead_order: Sequence[str] | None) -> list[int]:
    """The file's row of each of LEADS."""
    names = tuple(lead_order) if lead_order is not None else raw.names or _unnamed_order(path, raw.signal)
    if len(names) != len(raw.signal):
        raise UserError(
            path,
            f"{len(raw.signal)} rows for {len(names)} lead names",
            "one name per row",
            "correct lead_order",
        )
    if names == LEADS:  # as nearly all prepared files have them
        return list(range(len(LEADS)))
    rows = {name.strip().casefold(): row for row, name in enumerate(names)}
    if len(rows) != len(names):
        raise UserError(path, f"leads {', '.join(names)}", "each lead once", "correct lead_order")
    missing = [lead for lead in LEADS if lead.casefold() not in rows]
    if missing:
        hint = nearest(missing[0], [name for name in names if name not in LEADS])
        raise UserError(
            path,
            f"no lead {', '.join(missing)} among {', '.join(names)}",
            "all twelve standard leads",
            hint or "give lead_order if they are named otherwise",
        )
    return [rows[lead.casefold()] for lead in LEADS]


def _unnamed_order(path: str, signal: np.ndarray) -> tuple[str, ...]:
    if len(signal) != len(LEADS):
        turned = "; it looks transposed" if signal.shape[1] == len(LEADS) else ""
        raise UserError(
            path,
            f"{len(signal)} rows of {signal.shape[1]} samples{turned}",
            "12 leads as rows",
            "save it as (leads, samples), or name the rows with lead_order",
        )
    return _order_in(os.path.dirname(path))


@lru_cache(maxsize=4096)
def _order_in(folder: str) -> tuple[str, ...]:
    parent = Path(folder)
    dataset = parent.parent if parent.name.startswith("preprocessed") else parent
    if dataset.name in FOLDER_ORDER:
        return FOLDER_ORDER[dataset.name]
    _note(folder, f"no lead names in the files: rows taken as {', '.join(LEADS)}")
    return LEADS


@lru_cache(maxsize=4096)
def _note(folder: str, message: str) -> None:
    """Once per folder, not once per file."""
    _log.info("%s: %s", folder, message)


def say_again() -> None:
    """Let what was noted of folders be noted anew."""
    _note.cache_clear()
    _order_in.cache_clear()


def _check_finite(path: str, signal: np.ndarray) -> None:
    if np.isfinite(signal.min()) and np.isfinite(signal.max()):  # NaN passes through both
        return
    finite = np.isfinite(signal)
    lead, sample = np.argwhere(~finite)[0]
    raise UserError(
        path,
        f"{signal[lead, sample]} in lead {LEADS[lead]} at sample {sample} "
        f"({np.size(finite) - np.count_nonzero(finite)} in all)",
        "finite numbers",
        "leave this recording out or repair it",
    )


def to_segment(
    recording: Recording, sampling_rate: float = 250, length: int = 2500, compat: Sequence[str] = ()
) -> np.ndarray:
    """The first `length` samples at `sampling_rate` Hz: (C, length) float32. UserError if there are fewer.

    Resampled by `resample`, or as the reference does with the compat name `spline_resampling`.
    """
    behaviours.check(compat)
    signal = _at_rate(recording, sampling_rate, compat, length)
    if signal.shape[1] < length:
        raise UserError(
            "recording",
            f"{signal.shape[1]} samples at {sampling_rate:g} Hz",
            f"at least {length}",
            "leave it out, or lower data.segment_len",
        )
    return np.ascontiguousarray(signal[:, :length], dtype=np.float32)


def segments(
    recording: Recording, sampling_rate: float = 250, length: int = 2500, compat: Sequence[str] = ()
) -> np.ndarray:
    """All windows of `length` samples, one after the other: (n, C, length), n >= 0, in the signal's dtype.

    What is left after the last whole window is dropped. Resampled as by `to_segment`.
    """
    signal = _at_rate(recording, sampling_rate, compat)
    count = signal.shape[1] // length
    windows = signal[:, : count * length].reshape(len(signal), count, length)
    return np.ascontiguousarray(windows.swapaxes(0, 1))


def _at_rate(
    recording: Recording, sampling_rate: float, compat: Sequence[str], length: int | None = None
) -> np.ndarray:
    """The signal at `sampling_rate`, untouched where that is its own; cut behind `length` samples, or not."""
    signal, rate = recording.signal, recording.sampling_rate
    if rate == sampling_rate:
        return signal
    if behaviours.enabled("spline_resampling", compat):
        return resample_by_spline(signal, rate, sampling_rate).astype(signal.dtype)
    return resample(signal, rate, sampling_rate, length).astype(signal.dtype)


def normalize(signal: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """`min_max` as the models take it: (C, L) float32."""
    return min_max(signal, eps).astype(np.float32)


def min_max(signal: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """(x - min) / (max - min + eps) over all leads together, within [0, 1]: (C, L) float64.

    A constant signal becomes zeros, also with eps 0.
    """
    low, high = (np.float64(bound) for bound in (signal.min(), signal.max()))
    if high == low:
        return np.zeros(signal.shape)
    values = np.subtract(signal, low, dtype=np.float64)
    return np.divide(values, high - low + eps, out=values)  # both roundings keep order: nothing leaves [0, 1]
