"""Where the heart beats: QRS complexes of all leads at once, by their look. Dimension letters: C leads, L samples,
N beats.

Everything here is at RATE. A complex is found by how steep all leads together are (the vector's speed, in a band where
QRS complexes are larger than P, T, hum and drift), against a threshold that follows the record, with a search back in
gaps: Pan and Tompkins, IEEE Trans Biomed Eng 32 (1985) 230, carried from one lead to many.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

RATE = 500  # Hz
CONTRAST = 2.2  # complexes are so much steeper than what lies between them, or they are none
_SMOOTH, _BASE, _WIDTH = 10, 5, 40  # samples: the mean that takes out hum, half a slope's base, a complex
_REFRACTORY, _T_WAVE = 100, 190  # samples: no second complex so near, and none that is half as steep
_BLOCK, _AROUND = 1000, 5  # samples that hold a complex at least, and blocks on each side that set a threshold
_HIGH, _LOW, _GAP = 0.3, 0.15, 1.6  # thresholds, as a part of what complexes have; gaps that are searched, in intervals
_MOST = 1.5  # times the usual steepness of a lead's complexes: what it counts at most
_LEAST_SPEED = 0.002  # mV a sample: what is slower is no complex
_HALF, _SHIFT = 45, 25  # samples to each side that tell a beat's look, and by which it may lie elsewhere
_ALIKE, _MOST_KINDS, _CHUNK = 0.8, 12, 512
_IN_TIME = 0.15  # of the usual interval: by which an interval may differ from it


@dataclass(frozen=True)
class Beats:
    """at (N,): the sample of each beat, at the same place of all beats of a kind; kind (N,): those that look alike,
    0 the most frequent; likeness (N,): correlation with the mean of its kind. contrast: how much steeper complexes
    are than what lies between them.
    """

    at: np.ndarray
    kind: np.ndarray
    likeness: np.ndarray
    contrast: float


def find_beats(signal: np.ndarray) -> Beats:
    """The beats of (C, L) in mV at RATE, without NaN."""
    slope = _slope(signal)
    speed = np.sqrt(moving_mean(np.square(slope).mean(0), _WIDTH))
    at = _complexes(speed)
    contrast = float(np.median(speed[at]) / max(np.median(speed), 1e-9)) if at.size else 0.0
    place, kind, likeness = _by_look(at, slope)
    kept = ~_artefacts(place, kind, signal.shape[1])
    return Beats(place[kept], kind[kept], likeness[kept], contrast)


def moving_mean(x: np.ndarray, width: int) -> np.ndarray:
    """The mean of `width` samples about each one, along the last axis; beyond the ends it goes on as it is there."""
    left = (width + 1) // 2
    before, behind = np.repeat(x[..., :1], left, -1), np.repeat(x[..., -1:], width - left, -1)  # np.pad takes longer
    total = np.cumsum(np.concatenate([before, x, behind], -1), -1, dtype=np.float64)
    return (total[..., width:] - total[..., :-width]) / width


def _slope(signal: np.ndarray) -> np.ndarray:
    """mV a sample (C, L), each lead weighed by how still it is between complexes, and held to little more than what is
    usual of its complexes: a jump of one lead is none."""
    smooth = np.pad(moving_mean(signal, _SMOOTH), ((0, 0), (_BASE, _BASE)), mode="edge")
    slope = (smooth[:, 2 * _BASE :] - smooth[:, : -2 * _BASE]) / (2 * _BASE)
    size = np.abs(slope)
    most = _MOST * np.median(_in_blocks(size, _BLOCK // 2).max(2), axis=1)
    slope = np.clip(slope, -most[:, None], most[:, None])
    noise = np.median(size[:, ::5], axis=1)
    return slope * (np.median(noise) / np.maximum(noise, np.median(noise) / 2 + 1e-9))[:, None]


def _complexes(speed: np.ndarray) -> np.ndarray:
    from scipy.signal import find_peaks  # slow to import

    found = find_peaks(speed, height=_LEAST_SPEED, distance=_REFRACTORY)[0]
    height = speed[found]
    usual = _usual(speed)[found // _BLOCK]
    taken = _without_t_waves(found, height, height > _HIGH * usual)
    at = found[taken]
    if len(at) < 3:
        return at
    interval = np.diff(at)
    for gap in np.flatnonzero(interval > _GAP * local_median(interval)):
        left, right = at[gap], at[gap + 1]
        inside = (found > left + _T_WAVE) & (found < right - _REFRACTORY) & (height > _LOW * usual)
        if inside.any():
            taken[np.flatnonzero(inside)[height[inside].argmax()]] = True
    return found[taken]


def _usual(speed: np.ndarray) -> np.ndarray:
    """How steep complexes are in each block: the median of the blocks' largest speeds about it."""
    return local_median(_in_blocks(speed[None], _BLOCK)[0].max(1))


def _in_blocks(values: np.ndarray, size: int) -> np.ndarray:
    """(C, L) -> (C, blocks, size); the last block reaches back where there is no whole one left."""
    length = values.shape[1]
    if length < size:
        return values[:, None]
    starts = np.minimum(np.arange(0, length, size), length - size)
    return sliding_window_view(values, size, axis=1)[:, starts]


def local_median(values: np.ndarray) -> np.ndarray:
    """The median of the values about each one: (n,) -> (n,), n > 0."""
    width = min(2 * _AROUND + 1, len(values) - (len(values) + 1) % 2)
    around = np.pad(values, (width // 2, width // 2), mode="reflect") if width > 1 else values
    return np.median(sliding_window_view(around, width), axis=-1)


def _without_t_waves(at: np.ndarray, height: np.ndarray, taken: np.ndarray) -> np.ndarray:
    taken, last = taken.copy(), -1
    for i in np.flatnonzero(taken):
        if last >= 0 and at[i] - at[last] < _T_WAVE and height[i] < 0.5 * height[last]:
            taken[i] = False
        else:
            last = i
    return taken


def _by_look(at: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Beats at the place where they are most like the mean of their kind, their kinds, and how like they are."""
    reach = _HALF + _SHIFT
    padded = np.pad(slope, ((0, 0), (reach, reach))).astype(np.float32)
    place, kind = at.copy(), np.full(len(at), -1)
    likeness = np.zeros(len(at))
    looks: list[np.ndarray] = []
    while (rest := np.flatnonzero(kind < 0)).size and len(looks) < _MOST_KINDS:
        strength = np.array([np.square(padded[:, at[i] : at[i] + 2 * reach]).sum() for i in rest])
        first = rest[np.abs(strength - np.median(strength)).argmin()]
        look = padded[:, at[first] + _SHIFT : at[first] + _SHIFT + 2 * _HALF]
        for _ in range(2):
            shift, alike = _compare(padded, at[rest], look)
            same = alike > _ALIKE
            if not same.any():
                break
            starts = at[rest[same]] + shift[same]
            look = np.mean([padded[:, s : s + 2 * _HALF] for s in starts], 0)
        same[rest == first] = True
        chosen = rest[same]
        place[chosen] = at[chosen] + shift[same] - _SHIFT
        likeness[chosen], kind[chosen] = alike[same], len(looks)
        looks.append(look)
    kind[kind < 0] = len(looks)  # what is like nothing
    order = np.argsort(-np.bincount(kind, minlength=1), kind="stable")
    kind = np.argsort(order)[kind] if len(at) else kind
    return place, kind, likeness


def _artefacts(at: np.ndarray, kind: np.ndarray, length: int) -> np.ndarray:
    """Which beats (N,) of a look that none else has are no beats: such as are cut by an end of the recording, such as
    leave the rhythm as it is if they are left out, and a first one without the pause that follows early beats."""
    if len(at) < 4:
        return np.zeros(len(at), bool)
    alone = (kind != 0) & (np.bincount(kind)[kind] == 1)
    usual = np.median(np.diff(at))
    cut = (at < _HALF + _SHIFT) | (at > length - _HALF - _SHIFT)
    around = np.abs((at[2:] - at[:-2]) / usual - 1) < _IN_TIME
    hurried = at[1] - at[0] < (1 - _IN_TIME) * usual
    return alone & (cut | np.concatenate([[hurried], around, [False]]))


def _compare(padded: np.ndarray, at: np.ndarray, look: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in its neighbourhood each beat is most like `look` (C, 2 HALF), and how like: (N,), (N,)."""
    shifts, alike = np.zeros(len(at), int), np.zeros(len(at))
    size = np.sqrt(np.square(look).sum()) + 1e-9
    from scipy.signal import fftconvolve

    for start in range(0, len(at), _CHUNK):
        part = np.stack([padded[:, a : a + 2 * (_HALF + _SHIFT)] for a in at[start : start + _CHUNK]])
        product = fftconvolve(part, look[None, :, ::-1], mode="valid", axes=2).sum(1)
        power = sliding_window_view(np.square(part).sum(1), 2 * _HALF, axis=1).sum(-1)
        correlation = product / (np.sqrt(np.maximum(power, 1e-12)) * size)
        best = correlation.argmax(1)
        shifts[start : start + len(best)] = best
        alike[start : start + len(best)] = correlation[np.arange(len(best)), best]
    return shifts, alike
