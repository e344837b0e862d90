"""A signal at another rate. Dimension letters: C leads, L samples."""

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from elm_jax.errors import UserError

# The low-pass: how many samples of the lower rate it reaches to each side, Kaiser's beta, and where it is half down, as
# a part of half the lower rate (nothing is taken from a signal that is only read more finely).
_REACH, _KAISER, _CUT = 24, 7.0, 0.9
_FINEST = 10_000  # parts of a rate: the clocks of recorders are no truer than one in so many


def resample(signal: np.ndarray, rate: float, new_rate: float, length: int | None = None) -> np.ndarray:
    """(C, L) at `rate` Hz -> (C, int(L * new_rate / rate)) float64 at `new_rate` Hz, from the same first moment on;
    no more than `length` samples of it where that is given.

    What the lower of both rates cannot hold is filtered out first (more than 70 dB down from half that rate on), what
    is below 0.4 of it stays (within 0.1 %), nothing is delayed, and a constant stays one. Beyond its ends the signal
    is taken to go on mirrored about its first and last sample.
    """
    count = _new_count(signal, rate, new_rate)
    if length is not None and length < count:  # the rest is not worth its time, nor its memory where `rate` is tiny
        count = length
        signal = signal[:, : math.ceil((count + _REACH) * rate / new_rate) + _REACH]
    from scipy.signal import resample_poly  # slow to import, and not needed for prepared records

    step = Fraction(new_rate / rate).limit_denominator(max(_FINEST, 2 * math.ceil(rate / new_rate)))
    if step == 1:
        return signal[:, :count].astype(np.float64)
    up, down = step.numerator, step.denominator
    first = signal[:, :1].astype(np.float64)  # taken out, as the weights of each new sample sum up to nearly 1
    moved: Any = resample_poly(signal - first, up, down, 1, _low_pass(up, down), "antireflect")
    return first + moved[:, :count]


@lru_cache(maxsize=8)
def _low_pass(up: int, down: int) -> np.ndarray:
    """For a signal with `up` - 1 zeros put behind each sample, of which every `down`-th is kept."""
    from scipy.signal import firwin

    width = max(up, down)
    window: Any = "kaiser", _KAISER
    return np.asarray(firwin(2 * _REACH * width + 1, (_CUT if down > up else 1.0) / width, window=window))


def resample_by_spline(signal: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """Cubic spline (not-a-knot) through (C, L), read at int(L * new_rate / rate) points: (C, L') float64.

    Both grids run from the first sample to the last, as the reference's do, so a step is not exactly
    1 / new_rate; nothing is filtered before.
    """
    samples, count = signal.shape[1], _new_count(signal, rate, new_rate)
    from scipy.interpolate import make_interp_spline  # slow to import

    spline = make_interp_spline(np.linspace(0.0, samples - 1.0, samples), signal.astype(np.float64), axis=1)
    return spline(np.linspace(0.0, samples - 1.0, count))


def _new_count(signal: np.ndarray, rate: float, new_rate: float) -> int:
    samples = signal.shape[1]
    count = int(samples * new_rate / rate)
    if samples < 4 or count < 1:
        raise UserError(
            "recording",
            f"{samples} samples at {rate:g} Hz",
            f"enough to resample to {new_rate:g} Hz",
            "leave it out",
        )
    return count
