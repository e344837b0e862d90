"""Twenty-four numbers that describe each lead of an ECG: amplitudes, spectrum, beats, wavelets, slopes.

The reference groups recordings by them. Dimension letters: C leads, L samples.
"""

from collections.abc import Sequence

import numpy as np

from elm_jax import compat as behaviours

NAMES = (  # in their order, as the reference calls them
    "mean", "std", "max", "min", "median", "25th percentile", "75th percentile", "total power", "peak frequency power",
    "dominant frequency", "spectral centroid", "heart rate", "heart rate variability", "qrs duration",
    "t wave amplitude", "st deviation", "wavelet coefficient approximation", "wavelet coefficient detail level 5",
    "wavelet coefficient detail level 4", "wavelet coefficient detail level 3", "wavelet coefficient detail level 2",
    "wavelet coefficient detail level 1", "average absolute difference", "root mean square difference",
)  # fmt: skip
PER_LEAD = len(NAMES)
_WELCH = 1024  # samples of a segment of the spectrum, at most
_PEAK_HEIGHT, _PEAK_DISTANCE = 0.3, 0.2  # part of the range above the minimum, s
_QRS_HALF, _QRS_HEIGHT = 0.1, 0.1  # s on either side of a peak, part of the window's range
_ST_AFTER = 0.08  # s after a peak
_LEVELS = 5  # of the wavelet decomposition
# Daubechies' low-pass filter with four vanishing moments (db4), for the analysis.
_LOW = np.array([
    -0.010597401784997278, 0.032883011666982945, 0.030841381835986965, -0.18703481171888114,
    -0.02798376941698385, 0.6308807679295904, 0.7148465705525415, 0.23037781330885523,
])  # fmt: skip
ALL_BANDS = (len(_LOW) - 1) << _LEVELS  # samples from which on the reference has every band
_HIGH = _LOW[::-1] * np.array([-1.0, 1.0] * 4)


def ecg_features(signal: np.ndarray, sampling_rate: float, compat: Sequence[str] = ()) -> np.ndarray:
    """The features of a signal (C, L): float64 (C * 24,), lead after lead, finite for a finite signal.

    In order: mean, standard deviation, maximum, minimum, median, 25th and 75th percentile; power, its peak, the
    peak's frequency and the mean frequency (Hz); heart rate (1/min), its variability (s), QRS duration (s), amplitude
    between the last two peaks, ST deviation (0 where a lead has fewer than two peaks); mean |coefficient| of the db4
    wavelet bands A5, D5, D4, D3, D2, D1 (0 where the signal is too short for a band); mean and RMS difference of
    neighbouring samples.

    With the compat name `feature_windows` all numbers are the reference's: the QRS duration counts samples above a
    threshold taken from the signal's own minimum, which are nearly always all; the ST deviation is taken at the last
    sample where the recording ends before; and bands for which the signal is too short are left out, so that there are
    fewer numbers.
    """
    behaviours.check(compat)
    theirs = behaviours.enabled("feature_windows", compat)
    x = np.asarray(signal, np.float64)
    beats = np.array([_beats(lead, sampling_rate, theirs) for lead in x])
    bands = _wavelets(x)[:, [0, *range(_LEVELS - _levels(x.shape[1]) + 1, _LEVELS + 1)] if theirs else slice(None)]
    return np.hstack([_amplitudes(x), _spectrum(x, sampling_rate), beats, bands, _slopes(x)]).reshape(-1)


def z_scored(features: np.ndarray, usual: np.ndarray | None = None) -> np.ndarray:
    """Features (N, F) less their means over the recordings of `usual` (M, F), by default themselves, in deviations:
    float64. Raw ones differ in size by a million, so that distances are those of the largest. What is the same in all
    of `usual` becomes 0."""
    usual = features if usual is None else usual
    mean, deviation = usual.mean(0, dtype=np.float64), usual.std(0, dtype=np.float64)
    varies = deviation > 1e-12 * np.maximum(1.0, np.abs(mean))
    return np.where(varies, (features - mean) / np.where(varies, deviation, 1.0), 0.0)


def _amplitudes(x: np.ndarray) -> np.ndarray:
    low, middle, high = np.percentile(x, (25, 50, 75), axis=1)
    return np.stack([x.mean(1), x.std(1), x.max(1), x.min(1), middle, low, high], 1)


def _spectrum(x: np.ndarray, rate: float) -> np.ndarray:
    from scipy.signal import welch  # slow to import

    frequency, power = welch(x, rate, nperseg=min(_WELCH, x.shape[1]))
    total = power.sum(1)
    centre = np.divide(power @ frequency, total, out=np.zeros_like(total), where=total > 0)
    return np.stack([total, power.max(1), frequency[power.argmax(1)], centre], 1)


def _beats(lead: np.ndarray, rate: float, theirs: bool) -> tuple[float, float, float, float, float]:
    from scipy.signal import find_peaks

    low, high = lead.min(), lead.max()
    height = low + _PEAK_HEIGHT * (high - low)
    peaks = find_peaks(lead, height=height, distance=max(1, int(_PEAK_DISTANCE * rate)))[0]
    if len(peaks) < 2:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    intervals = np.diff(peaks) / rate
    half, later = int(_QRS_HALF * rate), peaks[-1] + int(_ST_AFTER * rate)
    later = min(later, len(lead) - 1) if theirs else later
    widths = [_width(lead[max(0, peak - half) : peak + half + (not theirs)], theirs) for peak in peaks]
    between = lead[peaks[-2] : peaks[-1]]
    st = lead[later] - lead[peaks[-1]] if later < len(lead) else 0.0
    return 60 / intervals.mean(), intervals.std(), float(np.mean(widths)) / rate, float(np.ptp(between)), float(st)


def _width(window: np.ndarray, theirs: bool) -> int:
    away = np.abs(window - window.mean())
    of = window if theirs else away
    return int(np.count_nonzero(away > of.min() + _QRS_HEIGHT * np.ptp(of)))


def _wavelets(x: np.ndarray) -> np.ndarray:
    sizes: list[np.ndarray] = []
    levels = _levels(x.shape[1])
    for _ in range(levels):
        x, detail = _analyse(x)
        sizes.append(np.abs(detail).mean(1))
    missing = [np.zeros(len(x))] * (_LEVELS - levels)
    return np.stack([np.abs(x).mean(1), *missing, *reversed(sizes)], 1)


def _levels(length: int) -> int:
    """Of the decomposition, for which so many samples suffice."""
    return min(_LEVELS, max(0, int(np.log2(max(1.0, length / (len(_LOW) - 1))))))


def _analyse(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One level of the decomposition, the signal being mirrored at its ends: (approximation, detail)."""
    reach = len(_LOW) - 1
    mirrored = np.pad(x, ((0, 0), (reach, reach)), mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, len(_LOW), axis=1)[:, 1::2]
    return windows @ _LOW[::-1], windows @ _HIGH[::-1]


def _slopes(x: np.ndarray) -> np.ndarray:
    if x.shape[1] < 2:
        return np.zeros((len(x), 2))
    steps = np.diff(x, axis=1)
    return np.stack([np.abs(steps).mean(1), np.sqrt((steps**2).mean(1))], 1)
