"""Synthetic 12-lead ECGs whose heart rate and rhythm are known.

Model. The heart is a current dipole that moves in three dimensions. Each wave (P, Q, R, S, T) is a Gaussian
in time, placed relative to the R peak and pointing along its own vector: the sum of Gaussians of McSharry et
al. 2003 (ECGSYN, doi:10.1109/TBME.2003.808805), with a vector per wave as in Sameni et al. 2007
(doi:10.1155/2007/43407). Dower's matrix (Dower et al. 1980, doi:10.1002/clc.4960030202) projects the Frank
dipole (x left, y down, z back) on the leads I, II, V1-V6; the other limb leads follow from I and II, so that
Einthoven's law holds exactly. P and T waves move with the cube root of the preceding RR interval
(Fridericia). RR intervals vary with breathing and Mayer waves; in atrial fibrillation they are irregular, P
waves are missing and fibrillatory waves take their place.

One ECG is a product of a small weight matrix and a few time courses; it depends on its key alone.
Dimension letters: C leads, L samples, W time courses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RATE_RANGE = (40, 150)  # beats per minute, the truth of every recording lies inside
IRREGULAR_SHARE = 0.25
Key = tuple[int, ...]

# Leads I, II, V1..V6 from the Frank dipole (x, y, z).
_DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)


# (12, 8): every lead, in the order of `recording.LEADS`, from the independent leads I, II, V1..V6.
_ALL_LEADS = np.zeros((12, 8), np.float32)
_ALL_LEADS[:6, :2] = [[1, 0], [0, 1], [-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]]
_ALL_LEADS[6:, 2:] = np.eye(6)

# The typical heart, one row per wave: centre and width in seconds at a rate of 60, dipole (x, y, z) in mV.
# P is timed from the next R peak; Q, R, S from the nearest;
# T, two Gaussians for its slow rise and fast fall, from the last.
_P, _QRS, _T = slice(0, 1), slice(1, 4), slice(4, 6)
_CENTRE = np.array([[-0.165], [-0.024], [0.0], [0.026], [0.255], [0.295]])
_WIDTH = np.array([[0.021], [0.0085], [0.0115], [0.0105], [0.048], [0.031]])
_DIPOLE = np.array(
    [
        [0.055, 0.110, -0.010],
        [-0.160, -0.060, -0.260],
        [1.150, 0.850, 0.220],
        [-0.120, -0.180, 0.520],
        [0.140, 0.100, -0.085],
        [0.130, 0.095, -0.080],
    ]
)
# How hearts differ: logarithmic size of each wave, turns in the frontal and the horizontal plane in radians.
_SIZE_SD = np.array([[0.25], [0.3], [0.15], [0.3], [0.2], [0.2]])
_TURN_SD = np.radians([18, 12])
_FIBRILLATION_DIPOLE = np.array([0.01, 0.03, -0.06])


@dataclass(frozen=True)
class Rhythm:
    """The truth of a recording.

    `r_peaks`: increasing times of the R peaks in seconds, from two before the window to some behind it.
    `heart_rate`: beats per minute between the first and the last R peak inside the window, rounded.
    `regular`: sinus rhythm (True) or atrial fibrillation (False).
    """

    r_peaks: np.ndarray
    heart_rate: int
    regular: bool


def draw_rhythm(key: Key, seconds: float) -> Rhythm:
    """The rhythm of recording `key`: rate uniform over RATE_RANGE, one in four irregular. Makes no signal."""
    rng = _generator(key, 0)
    rate = rng.uniform(*RATE_RANGE)
    regular = bool(rng.random() >= IRREGULAR_SHARE)
    beat = np.arange(math.ceil(seconds * rate / 60 / 0.6) + 5)
    if regular:
        breathing, mayer = rng.uniform(0.15, 0.4), 0.1  # Hz
        phase = rng.uniform(0, 2 * math.pi, 2)
        factor = 1 + rng.uniform(0, 0.05) * np.sin(2 * math.pi * breathing * 60 / rate * beat + phase[0])
        factor += rng.uniform(0, 0.03) * np.sin(2 * math.pi * mayer * 60 / rate * beat + phase[1])
        factor += 0.008 * rng.standard_normal(beat.size)
    else:
        factor = rng.uniform(0.65, 1.35, beat.size)
    times = np.cumsum(60 / rate * factor)
    times -= times[1] + rng.random() * (times[2] - times[1])
    times, measured = _into_range(times, seconds)
    return Rhythm(times, round(measured), regular)


def _generator(key: Key, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([*key, stream]))


def _into_range(times: np.ndarray, seconds: float) -> tuple[np.ndarray, float]:
    """The beats on a time line stretched until their rate lies in RATE_RANGE, and that rate.

    A round that is not the last adds beats (too slow) or drops them (too fast), so there are few.
    """
    low, high = RATE_RANGE
    while True:
        inside = times[(times >= 0) & (times < seconds)]
        rate = 60 * (inside.size - 1) / (inside[-1] - inside[0])
        if low - 1e-6 <= rate <= high + 1e-6:
            return times, rate
        times = times * (rate / min(max(rate, low), high))


def synthesize(key: Key, sampling_rate: float = 100.0, length: int = 1000) -> np.ndarray:
    """The recording `key`: (12, length) float32 in mV, leads in the order of `recording.LEADS`.

    Beats are those of `draw_rhythm(key, length / sampling_rate)`; the window begins at the first sample.
    """
    rhythm = draw_rhythm(key, length / sampling_rate)
    rng = _generator(key, 1)
    t = np.arange(length) / sampling_rate
    breathing = 2 * math.pi * (rng.uniform(0.15, 0.4) * t + rng.random()).astype(np.float32)
    gain = rng.lognormal(0, 0.25) * (1 + rng.uniform(0, 0.1) * np.sin(breathing))

    waves, dipoles = _waves(rng, rhythm, t, 1 / sampling_rate), _dipoles(rng)
    if not rhythm.regular:
        waves[_P], dipoles[_P] = _fibrillation(rng, t), rng.uniform(0.5, 1.5) * _FIBRILLATION_DIPOLE
    waves *= gain
    disturbances, sizes = _disturbances(rng, t, breathing, sampling_rate)
    weights = np.concatenate([_DOWER @ dipoles.T, sizes], axis=1).astype(np.float32)
    leads = rng.standard_normal((8, length), dtype=np.float32)  # muscle noise
    leads *= np.float32(rng.uniform(0.004, 0.035))
    leads += weights @ np.concatenate([waves, disturbances])
    return _ALL_LEADS @ leads


def _waves(rng: np.random.Generator, rhythm: Rhythm, t: np.ndarray, interval: float) -> np.ndarray:
    """(6, L) float32: the Gaussians of P, Q, R, S and the two of T along the recording, of height 1.

    A sample is the mean over its `interval` in seconds, which makes narrow waves lower and wider.
    """
    peaks = rhythm.r_peaks
    stretch = np.cbrt(np.diff(peaks, prepend=2 * peaks[0] - peaks[1]))
    last = np.searchsorted(peaks, t, side="right") - 1
    since, until = t - peaks[last], t - peaks[last + 1]
    argument = np.empty((6, t.size), np.float32)
    argument[_P] = until / stretch[last + 1]
    argument[_QRS] = np.where(since < -until, since, until)
    argument[_T] = since / stretch[last]
    centre = _CENTRE * (1 + 0.06 * rng.standard_normal((6, 1)))
    width = _WIDTH * np.exp(0.1 * rng.standard_normal((6, 1)))
    sampled_width = np.sqrt(width**2 + interval**2 / 12)
    argument -= centre.astype(np.float32)
    argument /= sampled_width.astype(np.float32)
    square = np.minimum(argument * argument, 100)  # the bound keeps out denormal numbers, which are slow
    return (width / sampled_width).astype(np.float32) * np.exp(-0.5 * square)


def _dipoles(rng: np.random.Generator) -> np.ndarray:
    """(6, 3) in mV: this heart's wave vectors, sized and turned at random."""
    frontal, horizontal = _TURN_SD * rng.standard_normal(2)
    cos, sin = math.cos(frontal), math.sin(frontal)
    about_z = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    cos, sin = math.cos(horizontal), math.sin(horizontal)
    about_y = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    sizes = np.exp(_SIZE_SD * rng.standard_normal((6, 1)))
    return _DIPOLE * sizes * (1 + 0.12 * rng.standard_normal((6, 3))) @ about_z @ about_y


def _fibrillation(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """(L,) float32: saw-like fibrillatory waves, 4 to 9 Hz and wandering, of height about 1."""
    turns = 2 * math.pi * t.astype(np.float32)
    phase = rng.uniform(4, 9) * turns + 1.5 * np.sin(rng.uniform(0.2, 0.6) * turns)
    size = 1 + 0.4 * np.sin(rng.uniform(0.3, 0.9) * turns)
    return size * (np.sin(phase) + 0.4 * np.sin(2 * phase))


def _disturbances(
    rng: np.random.Generator, t: np.ndarray, breathing: np.ndarray, sampling_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Baseline wander and mains hum: courses (W, L) float32, sizes in the independent leads (8, W) in mV.

    There is no hum where the sampling rate cannot hold it: an anti-aliasing filter has removed it.
    """
    turns = 2 * math.pi * t.astype(np.float32)
    mains = (50, 60)[int(rng.integers(2))]
    phases = [breathing, rng.uniform(0.03, 0.12) * turns, mains * turns]
    hum = rng.uniform(0, 0.012) * (mains < 0.45 * sampling_rate)
    sizes = [0.03 * rng.lognormal(0, 0.6), 0.05 * rng.lognormal(0, 0.6), hum]
    courses = np.concatenate([np.sin(phases), np.cos(phases)])
    return courses, rng.standard_normal((8, len(courses))) * (sizes * 2)
