"""Synthetic sets as ECG-Preprocess's ECGComprehension makes them (the compat name `comprehension_sets`).

Its labels are not what its questions ask for: peaks of one lead are counted, at most 150 a minute; a rate is 60 over
the median interval where the question says number over duration, and is cut off where it says rounded; an answer's
letter is always the same.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

_BAND, _ORDER = (0.5, 40.0), 3  # Hz
_WINDOW, _REFRACTORY = 0.05, 0.4  # s
_SEED = 42
Answer = tuple[str, str]  # kind, answer


def smoothed_energy(lead: np.ndarray, rate: float) -> np.ndarray:
    """The squared slope of a lead (L,), band-passed, as its mean over 50 ms: (L - 1,)."""
    from scipy.signal import butter, sosfiltfilt

    slope = np.diff(sosfiltfilt(butter(_ORDER, _BAND, "band", fs=rate, output="sos"), lead))
    width = int(_WINDOW * rate)
    return np.convolve(slope**2, np.ones(width) / width, "same")


def energy_peaks(lead: np.ndarray, rate: float) -> np.ndarray:
    """Where the heart beats, for ECG-Preprocess: samples (N,) of a lead (L,)."""
    from scipy.signal import find_peaks

    energy = smoothed_energy(lead, rate)
    return find_peaks(energy, energy.mean() + energy.std(), distance=int(_REFRACTORY * rate))[0]


def answers(lead: np.ndarray, rate: float) -> dict[str, str]:
    """Kind of question -> answer, of lead II (L,) at `rate` Hz; no rates below two peaks."""
    peaks = energy_peaks(lead, rate)
    found = {"r_peak_count": str(len(peaks))}
    if len(peaks) > 1:
        beats = 60 / np.median(np.diff(peaks) / rate)
        found |= {"heart_rate_bpm_int": str(int(beats)), "heart_rate_bpm_float": f"{beats:.2f}"}
    return found


def options(signals: Sequence[str]) -> str:
    return "\n".join(f"{signal}) {chr(ord('A') + place)}" for place, signal in enumerate(signals))


def balanced(asked: Sequence[Answer], per_answer: int | None) -> list[int]:
    """Which of `asked` are kept, in their order: `per_answer` of each answer (None: all), none that is alone."""
    chosen = list(range(len(asked)))
    if per_answer is not None:
        generator, groups = np.random.default_rng(_SEED), dict[str, list[int]]()
        for place, (_, answer) in enumerate(asked):
            groups.setdefault(answer, []).append(place)
        large = [group for group in groups.values() if len(group) >= per_answer]
        chosen = [group[i] for group in large for i in generator.choice(len(group), per_answer, replace=False)]
    counts = Counter(asked[place][1] for place in chosen)
    return [place for place in chosen if counts[asked[place][1]] > 1]
