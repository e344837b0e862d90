"""What the intervals between beats say: regular or not, early beats, pauses."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from elm_jax.ecg.beats.detect import RATE, Beats, local_median

Regularity = Literal["regular", "varying", "irregular", "fibrillation", "unknown"]
_EARLY, _PAUSE, _LONG = 0.82, 1.6, 2.0  # parts of the usual interval; a pause in s, whatever is usual
_REGULAR, _JUMPS = 0.06, 0.08  # variation of intervals; their usual change, as in fibrillation from there on
_FEW = 3  # intervals that say nothing of regularity, if there are no more


@dataclass(frozen=True)
class Rhythm:
    """regularity: regular; varying, with P waves, as with breathing; irregular; fibrillation, as in that of the atria;
    unknown, of too few beats. variation: deviation of the intervals over their mean, without those about early beats
    and beats of another look. early: beats of the usual look that come early; ectopic: beats of another look, of which
    `ectopic_early` come early. pauses: intervals that are much longer than usual, or two seconds; longest: s.
    """

    regularity: Regularity = "unknown"
    variation: float = 0.0
    early: int = 0
    ectopic: int = 0
    ectopic_early: int = 0
    pauses: int = 0
    longest: float = 0.0


def sudden(at: np.ndarray) -> np.ndarray:
    """Which beats (N,) come early after the interval before, more suddenly than breathing shortens intervals."""
    intervals = np.diff(at)
    return np.concatenate([[False] * min(2, len(at)), intervals[1:] < _EARLY * intervals[:-1]])


def rhythm_of(beats: Beats, p_waves: bool, p_likely: bool = False) -> Rhythm:
    """Of beats at RATE; `p_waves`: whether P waves of one look precede them, or those that do not come early;
    `p_likely`: whether waves do that are too large, and too alike, for fibrillation."""
    other = beats.kind != 0
    if len(beats.at) < 2:
        return Rhythm(ectopic=int(other.sum()))
    intervals = np.diff(beats.at) / RATE
    usual = local_median(intervals)
    jumps = _jumps(intervals[~(other[1:] | other[:-1])])
    fibrillation = not p_waves and not p_likely and jumps > _JUMPS
    soon = np.append(False, intervals < _EARLY * usual) & (sudden(beats.at) | other)
    early = soon & ~other if not fibrillation else np.zeros_like(other)
    odd = early | other
    kept = intervals[~(odd[1:] | odd[:-1])]
    kept = kept if len(kept) >= _FEW else intervals
    variation = float(kept.std() / kept.mean())
    if len(intervals) < _FEW:
        regularity: Regularity = "unknown"
    elif fibrillation:
        regularity = "fibrillation"
    else:
        regularity = "regular" if variation < _REGULAR else "varying" if p_waves else "irregular"
    pauses = (intervals > _LONG) | (intervals > _PAUSE * usual) & (not fibrillation)
    return Rhythm(
        regularity, variation, int(early.sum()), int(other.sum()), int((soon & other).sum()), int(pauses.sum()),
        float(intervals.max()),
    )  # fmt: skip


def _jumps(intervals: np.ndarray) -> float:
    """How much intervals usually differ from the one before, as a part of the usual one."""
    if len(intervals) <= _FEW:
        return 0.0
    return float(np.median(np.abs(np.diff(intervals))) / np.median(intervals))
