"""What is done to a recording's signal before it is cut: one function for each `--profile`."""

from collections.abc import Callable

import numpy as np

from elm_jax.ecg.filters import filter_2025
from elm_jax.ecg.resampling import resample, resample_by_spline

Profile = Callable[[np.ndarray, float, float], np.ndarray]  # (12, L) mV, its rate, the new one -> (12, L'); UserError


def clean(signal: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """Ours: what the new rate cannot hold is filtered out first, and nothing else is done. float64."""
    return signal if rate == new_rate else resample(signal, rate, new_rate)


def elm_2026(signal: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """As ECG-Preprocess in 2026: a cubic spline, no filter of any kind, so that what lies above folds. float64."""
    return signal if rate == new_rate else resample_by_spline(signal, rate, new_rate)


def paper_2025(signal: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """As ECG-Bench 0.0.4, of the results of 2025: `filter_2025` at the file's own rate, then the spline. float32."""
    filtered = filter_2025(signal, rate)
    return (filtered if rate == new_rate else resample_by_spline(filtered, rate, new_rate)).astype(np.float32)


PROFILES: dict[str, Profile] = {"clean": clean, "elm-2026": elm_2026, "paper-2025": paper_2025}
# How a report says it: resampling, filters.
MADE = {"clean": ("low-pass", "none"), "elm-2026": ("spline", "none"), "paper-2025": ("spline", "paper-2025")}
