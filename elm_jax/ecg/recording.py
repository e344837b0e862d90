"""A recording: read a file, put its leads in the canonical order, check it, resample, cut, normalise.

A file of any format in; a Recording (C leads x L samples, float32, millivolts where the file says so) out.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax import compat as behaviours
from elm_jax.ecg.formats import reader_of
from elm_jax.ecg.names import LEADS, derive, find_leads, millivolts
from elm_jax.ecg.npy import read_npy
from elm_jax.ecg.resampling import resample, resample_by_spline
from elm_jax.ecg.shards import check_index, find
from elm_jax.ecg.stored import Stored
from elm_jax.ecg.wfdb_record import WfdbRecord, header_of
from elm_jax.errors import UserError, some

AVL_FIRST = ("I", "II", "III", "aVL", "aVR", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# Row order of the .npy files that the reference's preparation writes, by its dataset folders: it permutes
# only some datasets, and the files do not say so.
FOLDER_ORDER = {
    **dict.fromkeys(("ptb_xl", "ptb", "csn", "cpsc", "heed"), LEADS),
    **dict.fromkeys(("mimic_iv", "mimic", "code15", "echonext"), AVL_FIRST),
}
UNNAMED = f"no lead names in the files: rows taken as {', '.join(LEADS)}"
LEAST_RATE, MOST_RATE = 1.0, 100_000.0  # of what can be an ECG
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """signal (C, L) with its rows in canonical order, finite; leads: their names; samples per second.

    report: what the file says of it; dropped: the names of further leads, which were left out; derived: leads that
    the file does not store, computed from I and II; gains: converter steps a mV of each lead, where the file has whole
    numbers.
    """

    signal: np.ndarray
    leads: tuple[str, ...]
    sampling_rate: float
    report: str = ""
    dropped: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    gains: tuple[float, ...] | None = None


def read_ecg(
    path: str | Path,
    lead_order: Sequence[str] | None = None,
    sampling_rate: float | None = None,
    *,
    unit: str | None = None,
    unstated_rate: float | None = None,
    bare_rate: float = 250.0,  # what the reference's preparation writes
    some_leads: bool = False,
    dtype: type[np.floating[Any]] = np.float32,
) -> Recording:
    """The 12-lead recording in a `.npy` file, a WFDB record (with or without `.hea`, `.dat`, `.mat`) or a file of the
    formats of `ecg.formats`.

    signal (12, L) of `dtype` in the order of LEADS, whatever the order of the file, in mV where the file has units;
    further leads are dropped, with a warning in the log, a lead that is stored negated ("-aVR") is turned back, and
    aVR, aVL and aVF (with III) are computed where the file has none of them. lead_order names the file's rows and
    overrides what the file says; without either, the order known for the reference's dataset folder is taken, else
    LEADS, with a note in the log. sampling_rate (Hz) likewise; `unstated_rate` is that of files which state none: else
    a bare array of a `.npy` file is taken to be at `bare_rate`, and others are refused. `unit` is that of numbers which
    say none; else they are mV, noted in the log, and whole numbers (but of `.npy` files) are refused. With `some_leads`
    a file may have only some of the twelve: signal (C, L) then, and `leads` say which. Raises UserError for whatever
    cannot be such a recording.
    """
    path = os.fspath(path)  # a loader reads thousands a second, and a Path costs as much as an array operation
    _check_name(path)
    if unit is not None and millivolts(unit) is None:
        raise UserError("unit", repr(unit), "mV, uV, V or nV", "name one of these")
    if path.endswith(".npy"):
        signal, names, rate, report = _read_npy(path, dtype)
        gains = None
        names = names if lead_order is None else lead_order
        names = _unnamed_order(path, signal) if names is None else names
        rows = find_leads(path, _one_for_each(path, names, len(signal)), some_leads)
        if rows.places != tuple(range(len(signal))):
            signal = signal[list(rows.places)]
        signal = signal if unit is None else signal * millivolts(unit)
    else:
        stored = _open(path)
        names = stored.names if lead_order is None else lead_order
        if lead_order is None and len(names) == len(LEADS) and not any(names) and isinstance(stored, Stored):
            names = LEADS
            _note(os.path.dirname(path), UNNAMED)
        rows = find_leads(path, _one_for_each(path, names, len(stored.names)), some_leads)
        (signal, rate), report = stored.read(list(rows.places), unit), stored.report
        gains = stored.gains(rows.places, unit)
        if rate is None and sampling_rate is None and unstated_rate is None:
            fix = "state it in the file, or say it: --assume-rate 500 of prepare, --sampling-rate 500 of measure and "
            fix += "chat, read_ecg(path, sampling_rate=500)"
            raise UserError(path, "no sampling rate", "samples a second", fix)
        if unit is None and not stored.says_units:
            _note(os.path.dirname(path), "no unit in the files: taken as mV")
    if signal.shape[1] == 0:
        raise UserError(path, "no samples", "(leads, samples)", "leave this recording out")
    by_file = rate is not None and sampling_rate is None
    rate = rate if sampling_rate is None else sampling_rate
    if rate is None:
        rate = bare_rate if unstated_rate is None else unstated_rate
        _note(os.path.dirname(path), f"no sampling rate in the files: taken as {rate:g} Hz")
    rate = _checked_rate(path, rate, "target_sf" if by_file and path.endswith(".npy") else "it")
    with np.errstate(over="ignore"):  # a bare array is a view of the file's bytes
        signal = signal.astype(np.float64 if rows.derived else dtype, copy=not signal.flags.writeable)
    for row in rows.negated:
        np.negative(signal[row], out=signal[row])
    if rows.derived:
        signal = derive(signal, rows.derived).astype(dtype, copy=False)
        gains = gains and (2 * max(gains),) * len(LEADS)  # halves of steps
        _note(os.path.dirname(path), f"{', '.join(rows.derived)} computed from I and II")
    leads = tuple(lead for lead in LEADS if lead not in rows.absent) if rows.absent else LEADS
    _check_finite(path, signal, leads)
    if rows.dropped:
        _warn_of_dropped(os.path.dirname(path), rows.dropped)
    return Recording(signal, leads, rate, report, rows.dropped, rows.derived, gains)


def _check_name(path: str) -> None:
    with suppress(UnicodeEncodeError):
        if path and b"\0" not in os.fsencode(path):
            return
    raise UserError(ascii(path), "what no file can be called", "the path of a recording", "correct it")


def _read_npy(
    path: str, dtype: type[np.floating[Any]]
) -> tuple[np.ndarray, tuple[str, ...] | None, Any, str]:
    """What a `.npy` file, or the record of its name in a shard, says: signal (rows, L) of any real dtype (of a shard
    `dtype`), rows' names and rate where it gives them, report."""
    if (place := find(path)) is None:
        check_index(*os.path.split(path))
    value = read_npy(path) if place is None else place.read(dtype)
    if isinstance(value, np.ndarray):
        return _two_dimensional(path, value), None, None, ""
    if "ecg" not in value:
        raise UserError(path, f"keys {some(map(repr, value))}", "the key ecg", "call the signal's key ecg")
    signal, report, names, rate = (value.get(key) for key in ("ecg", "report", "leads", "target_sf"))
    signal = _of_lists(signal) if isinstance(signal, list | tuple) else signal
    if not isinstance(signal, np.ndarray) or signal.dtype.kind not in "fiu":
        kind = f"dtype {signal.dtype}" if isinstance(signal, np.ndarray) else f"type {type(signal).__name__}"
        raise UserError(path, f"ecg of {kind}", "an array of real numbers", "save it as float32")
    if isinstance(names, np.ndarray) and names.ndim == 1:
        names = names.tolist()
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
        raise UserError(path, f"leads of type {type(names).__name__}", "a list of names", "correct the key leads")
    text = "; ".join(map(str, report)) if isinstance(report, (list, tuple)) else str(report or "")
    return _two_dimensional(path, signal), None if names is None else tuple(names), rate, text


def _of_lists(rows: Sequence[Any]) -> np.ndarray | Sequence[Any]:
    """Lists of numbers, all of one length, as an array; other lists as they are."""
    regular = all(isinstance(row, list | tuple) and len(row) == len(rows[0]) for row in rows)
    if regular and all(type(number) in (int, float) for row in rows for number in row):
        return np.array(rows, np.float64)
    return rows


def _two_dimensional(path: str, signal: np.ndarray) -> np.ndarray:
    if signal.ndim != 2 or signal.size == 0:
        raise UserError(path, f"an array of shape {signal.shape}", "(leads, samples)", "save it so")
    return signal


def _checked_rate(path: str, rate: Any, name: str) -> float:
    is_number = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool)
    try:
        value = float(rate) if is_number else np.nan
    except OverflowError:
        value = np.inf
    if not LEAST_RATE <= value <= MOST_RATE:
        raise UserError(
            path,
            f"sampling rate {value:g}" if is_number else f"a sampling rate of type {type(rate).__name__}",
            f"{LEAST_RATE:g} to {MOST_RATE:g} samples a second",
            f"correct {name}",
        )
    return value


def _open(path: str) -> WfdbRecord | Stored:
    """A WFDB record where its header is there, else a file of another format."""
    file = Path(path)
    if file.name and os.path.isfile(header_of(file)):  # which raises nothing, however long the name is
        return WfdbRecord.open(file)
    reader = reader_of(file)
    if reader is None:
        raise UserError(
            path,
            f"no header {header_of(file).name} beside it"
            if os.path.isfile(file)
            else "a folder"
            if os.path.isdir(file)
            else "no file",
            "a .npy file, a WFDB record with its .hea, or another file of recordings that docs/records.md names",
            "check the path (and data.root)",
        )
    return reader(file)


def _one_for_each(path: str, names: Sequence[str], rows: int) -> Sequence[str]:
    if len(names) != rows:
        raise UserError(path, f"{rows} rows for {len(names)} lead names", "one name per row", "give one name for each")
    return names


def _unnamed_order(path: str, signal: np.ndarray) -> tuple[str, ...]:
    if len(signal) != len(LEADS):
        turned = "; it looks transposed" if signal.shape[1] == len(LEADS) else ""
        raise UserError(
            path,
            f"{len(signal)} rows of {signal.shape[1]} samples{turned}",
            "12 leads as rows",
            "save it as (leads, samples), or as a dictionary whose ecg is that and whose leads names its rows",
        )
    return _order_in(os.path.dirname(path))


@lru_cache(maxsize=4096)
def _order_in(folder: str) -> tuple[str, ...]:
    parent = Path(folder)
    dataset = parent.parent if parent.name.startswith("preprocessed") else parent
    if dataset.name in FOLDER_ORDER:
        return FOLDER_ORDER[dataset.name]
    _note(folder, UNNAMED)
    return LEADS


@lru_cache(maxsize=4096)
def _note(folder: str, message: str) -> None:
    """Once per folder, not once per file."""
    _log.info("%s: %s", folder, message)


_told: set[tuple[str, ...]] = set()


def _warn_of_dropped(folder: str, leads: tuple[str, ...]) -> None:
    """Once: a data set may have a folder for each recording."""
    if leads not in _told:
        _told.add(leads)
        _log.warning("%s: %s left out: models read %s", folder, ", ".join(leads), ", ".join(LEADS))


def say_again() -> None:
    """Let what was noted be noted anew."""
    _note.cache_clear()
    _order_in.cache_clear()
    _told.clear()


@contextmanager
def collected_notes(folder: str) -> Iterator[list[str]]:
    """What reading says of `folder` in the log, said before or not; it is then not in the log."""
    notes: list[str] = []
    say_again()
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage().removeprefix(f"{folder}: "))
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    try:
        yield notes
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
        _log.propagate = True


def _check_finite(path: str, signal: np.ndarray, leads: Sequence[str]) -> None:
    if np.isfinite(signal.min()) and np.isfinite(signal.max()):  # NaN passes through both
        return
    finite = np.isfinite(signal)
    lead, sample = np.argwhere(~finite)[0]
    raise UserError(
        path,
        f"{signal[lead, sample]} in lead {leads[lead]} at sample {sample} "
        f"({np.size(finite) - np.count_nonzero(finite)} in all)",
        "finite numbers",
        "leave this recording out or repair it",
    )


def to_segment(
    recording: Recording, sampling_rate: float = 250, length: int = 2500, compat: Sequence[str] = (),
    least: int | None = None,
) -> np.ndarray:  # fmt: skip
    """The first `length` samples at `sampling_rate` Hz: (C, length) float32. UserError if there are fewer; with `least`
    all that there are, if these are so many.

    Resampled by `resample`, or as the reference does with the compat name `spline_resampling`.
    """
    behaviours.check(compat)
    signal = _at_rate(recording, sampling_rate, compat, length)
    least = length if least is None else min(least, length)
    if signal.shape[1] < least:
        raise UserError(
            "recording",
            f"{signal.shape[1]} samples at {sampling_rate:g} Hz",
            f"at least {least}",
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


def in_slots(signal: np.ndarray, leads: Sequence[str], places: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """A signal (C, L) of some leads, by name, in rows for `places`: what encoders read that take any leads.

    `signal` (places, length) float32, zeros where nothing is; `leads` (places,) int32: of each row its lead's place
    among the twelve, from 1 on, 0 where there is none; `samples` () int32, how many are there: at most `length`.
    Raises UserError for a lead that is none of the twelve, none of `places`, or there twice.
    """
    rows = [places.index(lead) for lead in leads if lead in LEADS and lead in places]
    if len(set(rows)) < len(leads) or len(leads) != len(signal):
        found = f"{len(signal)} rows for {', '.join(leads) or 'no leads'}"
        raise UserError("leads", found, f"a row for each, of {', '.join(places)}", "name them so, each once")
    whole, named = np.zeros((len(places), length), np.float32), np.zeros(len(places), np.int32)
    whole[rows, : signal.shape[1]] = signal[:, :length]
    named[rows] = [1 + LEADS.index(lead) for lead in leads]
    return {"signal": whole, "leads": named, "samples": np.asarray(min(signal.shape[1], length), np.int32)}


NORMALIZATIONS = ("minmax", "instance_minmax", "instance_zscore", "lead_minmax", "lead_zscore", "none")


def normalize(signal: np.ndarray, eps: float = 1e-6, how: str = "minmax") -> np.ndarray:
    """A signal as the models take it: (C, L) float32.

    how: one of NORMALIZATIONS: `min_max` or `z_score`; of all leads together (`instance_minmax` is `minmax`), or of
    each lead by itself; "none" leaves the values as they are.
    """
    if how == "none":
        return signal.astype(np.float32)
    scaled = z_score if how.endswith("zscore") else min_max
    if how.startswith("lead_"):
        return np.concatenate([scaled(lead[None], eps) for lead in signal]).astype(np.float32)
    return scaled(signal, eps).astype(np.float32)


def z_score(signal: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """(x - mean) / (population deviation + eps) over all leads together: (C, L) float64; of a constant signal zeros."""
    values = signal.astype(np.float64)
    if signal.min() == signal.max():
        return np.zeros(signal.shape)
    values -= values.mean()
    return np.divide(values, values.std() + eps, out=values)


def min_max(signal: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """(x - min) / (max - min + eps) over all leads together, within [0, 1]: (C, L) float64.

    A constant signal becomes zeros, also with eps 0.
    """
    low, high = (np.float64(bound) for bound in (signal.min(), signal.max()))
    if high == low:
        return np.zeros(signal.shape)
    values = np.subtract(signal, low, dtype=np.float64)
    return np.divide(values, high - low + eps, out=values)  # both roundings keep order: nothing leaves [0, 1]
