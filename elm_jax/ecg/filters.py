"""The filters of the ECG-LM papers of 2025. Dimension letters: C leads, L samples.

Each one is run forwards and backwards, so that nothing is delayed, as second-order sections: in one polynomial the
0.05 Hz high-pass has its poles moved by a thousandth of their distance to the unit circle, which is up to 0.02 mV in
records that drift. The ends are extended as scipy.signal.filtfilt does, by lengths that belong to the numbers.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from elm_jax.errors import UserError

# Daubechies' wavelet with six vanishing moments, the low-pass of its analysis ("Ten Lectures on Wavelets", table 6.1).
_DB6 = np.array(
    [
        -0.00107730108499558, 0.004777257511010651, 0.0005538422009938016, -0.031582039318031156,
        0.02752286553001629, 0.09750160558707936, -0.12976686756709563, -0.22626469396516913,
        0.3152503517092432, 0.7511339080215775, 0.4946238903983854, 0.11154074335008017,
    ]
)  # fmt: skip
_TAPS, _LEVELS = len(_DB6), 4
_ANALYSIS = np.stack([_DB6[::-1], _DB6 * np.resize([1.0, -1.0], _TAPS)], axis=1)  # taps x (low-pass, high-pass)
_SYNTHESIS = _ANALYSIS.reshape(_TAPS // 2, 2, 2)[::-1].transpose(2, 0, 1)  # each: taps x (even, odd)
_PADDING = (9, 9, 27, 15)  # samples by which each end is extended, for each of `_filters`
_NOISE = 0.6745  # the median of |x| for a standard normal x


def filter_2025(signal: np.ndarray, rate: float) -> np.ndarray:
    """(C, L) in mV at `rate` Hz -> (C, L) float64: notches at 50 and 60 Hz (Q 30), Butterworth's band-pass of order 4
    from 0.5 to 100 Hz, his high-pass of order 4 at 0.05 Hz, and `shrink`.

    Raises UserError for a rate that does not hold 100 Hz, and for a signal that is too short to be extended.
    """
    if rate <= 200 or signal.shape[1] <= max(_PADDING):
        found = f"{signal.shape[1]} samples at {rate:g} Hz"
        fix = "leave it out, or choose another --profile"
        raise UserError("recording", found, f"more than {max(_PADDING)} samples at more than 200 Hz to filter", fix)
    values = signal.astype(np.float64)
    for (sections, settled), padding in zip(_filters(rate), _PADDING, strict=True):
        values = _both_ways(values, sections, settled, padding)
    return shrink(values)


def _both_ways(signal: np.ndarray, sections: np.ndarray, settled: np.ndarray, padding: int) -> np.ndarray:
    """scipy.signal.sosfiltfilt with an odd extension by `padding`, at half its cost."""
    from scipy.signal import sosfilt  # slow to import, and not needed by `clean`

    before = 2 * signal[:, :1] - signal[:, padding:0:-1]
    behind = 2 * signal[:, -1:] - signal[:, -2 : -padding - 2 : -1]
    values = np.concatenate([before, signal, behind], axis=1)
    for _ in range(2):  # the second time it lies backwards
        values = sosfilt(sections, values, zi=settled[:, None] * values[:, :1])[0][:, ::-1]
    return np.ascontiguousarray(values[:, padding:-padding])


@lru_cache(maxsize=8)
def _filters(rate: float) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """In their order: sections (n, 6), and their state (n, 2) once they have settled on a steady 1."""
    from scipy.signal import butter, iirnotch, sosfilt_zi

    notches = [np.hstack(iirnotch(mains, 30, rate))[None] for mains in (50, 60)]
    band: Any = butter(4, (0.5, 100), "bandpass", fs=rate, output="sos")
    high: Any = butter(4, 0.05, "highpass", fs=rate, output="sos")
    return tuple((sections, sosfilt_zi(sections)) for sections in (*notches, band, high))


def shrink(signal: np.ndarray) -> np.ndarray:
    """Soft thresholds for the details of four levels of db6: (C, L) -> (C, L) float64.

    The threshold of a lead is the median of |d| / 0.6745 over the coarsest details d. Where L is odd the synthesis has
    a sample too many, and the whole lead is resampled to L by Fourier's series, as the reference does.
    """
    approximation, details = signal, []
    for _ in range(_LEVELS):
        approximation, detail = _analyse(approximation)
        details.append(detail)
    threshold = np.median(np.abs(details[-1]), axis=1, keepdims=True) / _NOISE
    for detail in reversed(details):
        size = np.abs(detail)
        kept = np.where(size > 1e-10, np.sign(detail) * np.maximum(size - threshold, 0), 0)
        approximation = _synthesise(approximation[:, : kept.shape[1]], kept)
    if approximation.shape[1] == signal.shape[1]:
        return approximation
    from scipy.signal import resample

    return np.asarray(resample(approximation, signal.shape[1], axis=1))


def _analyse(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One level: (C, L) -> approximation and detail, (C, (L + 11) // 2) each; the ends are mirrored."""
    count = (signal.shape[1] + _TAPS - 1) // 2
    mirrored = np.pad(signal, ((0, 0), (_TAPS - 2, _TAPS - 1)), "symmetric")
    both = sliding_window_view(mirrored, _TAPS, axis=1)[:, ::2][:, :count] @ _ANALYSIS
    return both[..., 0], both[..., 1]


def _synthesise(approximation: np.ndarray, detail: np.ndarray) -> np.ndarray:
    """One level back: (C, n) twice -> (C, 2 n - 10)."""
    parts = zip((approximation, detail), _SYNTHESIS, strict=True)
    low, high = (sliding_window_view(part, _TAPS // 2, axis=1) @ taps for part, taps in parts)
    return (low + high).reshape(len(detail), -1)
