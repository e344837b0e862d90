"""A recording among named values, as MATLAB and HDF5 files have them: which is the signal, its rate, its leads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from elm_jax.ecg.names import LEADS
from elm_jax.ecg.stored import Channel, Stored
from elm_jax.errors import UserError, some

Value = np.ndarray | str | list[str]
SIGNALS = ("val", "ecg", "ecgsignal", "signal", "signals", "data", "feats", "tracings", "tracing", "waveform", "leads")
RATES = (
    *("fs", "sf", "sr", "hz", "samplingrate", "samplerate", "samplingfrequency", "samplefrequency", "sfreq"),
    *("targetsf", "frequency", "freq", "currsamplerate", "orgsamplerate"),
)
NAMES = ("leads", "leadnames", "leadorder", "lead", "labels", "channels", "channelnames", "signame")
UNITS = ("unit", "units")
# What these data sets say of their files elsewhere than in them: values that a file has, its rate.
KNOWN: dict[frozenset[str], float] = {frozenset(("ECG.sex", "ECG.age", "ECG.data")): 500.0}  # CPSC 2018


def folded(name: str) -> str:
    """`Sampling_Rate`, `sampling rate`, `ECG.samplingRate`: all the same."""
    return re.sub(r"[\s_-]", "", name.rpartition(".")[2].casefold())


def stored_of(path: Path, values: Mapping[str, Value]) -> Stored:
    """The recording among `values`, by their names (`group.name`). Raises UserError where it is not clear."""
    key, signal = _signal(path, values)
    rate = next((_rate(path, name, values[name]) for name in _called(values, RATES)), KNOWN.get(frozenset(values)))
    texts = {name: value for name, value in values.items() if isinstance(value, str | list)}
    names = next((_list(texts[name]) for name in _called(texts, NAMES)), None)
    units = next((_list(texts[name]) for name in _called(texts, UNITS)), None)
    signal = _leads_first(path, key, signal, None if names is None else len(names))
    if units is not None and len(units) not in (1, len(signal)):
        raise UserError(path, f"{len(units)} units for {len(signal)} leads", "one, or one for each", "correct them")
    each = [None] * len(signal) if units is None else units * len(signal) if len(units) == 1 else units
    report = next((value for name, value in texts.items() if folded(name) == "report" and isinstance(value, str)), "")
    rows = zip(names or [""] * len(signal), signal, each, strict=True)
    return Stored(path, [Channel(name, row, rate, unit) for name, row, unit in rows], report)


def _called(values: Mapping[str, Value], names: Sequence[str]) -> list[str]:
    """The keys that are called so, in the order of `names`."""
    return [key for name in names for key in values if folded(key) == name]


def _signal(path: Path, values: Mapping[str, Value]) -> tuple[str, np.ndarray]:
    arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray) and value.ndim >= 2}
    arrays = {key: value for key, value in arrays.items() if value.dtype.kind in "fiu" and min(value.shape[-2:]) > 1}
    called = _called(arrays, SIGNALS) or list(arrays)
    if len(called) != 1:
        found = f"{some(called)}" if called else f"{some(values) or 'nothing'}: no array of leads and samples"
        raise UserError(path, found, "one recording, called ecg, signal, data or val", "leave one, and call it so")
    key, value = called[0], arrays[called[0]]
    if value.ndim > 2 and value.shape[0] > 1 or value.ndim > 3:
        raise UserError(path, f"{key} of shape {value.shape}", "(leads, samples): one recording", "write one a file")
    return key, value[0] if value.ndim == 3 else value


def _leads_first(path: Path, key: str, signal: np.ndarray, names: int | None) -> np.ndarray:
    count = len(LEADS) if names is None else names
    if signal.shape[0] == count:
        return signal
    if signal.shape[1] == count:
        return signal.T
    if names is None and min(signal.shape) < 64:  # lead_order may name them
        return signal if signal.shape[0] < signal.shape[1] else signal.T
    raise UserError(path, f"{key} of shape {signal.shape}", f"{count} leads along one side", "name each lead, once")


def _rate(path: Path, name: str, value: Value) -> float:
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "fiu":
        return float(value.ravel()[0])
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value.strip()):
        return float(value)
    raise UserError(path, f"{name} that is no number", "samples a second", f"correct {name}")


def _list(value: Value) -> list[str]:
    """`["I", "II"]`, or one text that holds as much."""
    if isinstance(value, list):
        return [item.strip() for item in value]
    return [item.strip() for item in re.split(r"[,;|]|\s+", str(value).strip()) if item.strip()]
