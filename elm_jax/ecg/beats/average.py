"""The averaged beat of a recording: the median of beats that look alike, each on the level of its PR segment.

Dimension letters: C leads, L samples, N beats, W samples of the averaged beat.
"""

from dataclasses import dataclass

import numpy as np

from elm_jax.ecg.beats.detect import RATE, moving_mean

BEFORE, AFTER = round(0.5 * RATE), round(0.8 * RATE)  # samples of an averaged beat to each side of a beat's place
_MOST = 100  # beats, evenly from all of a long recording
_LEVEL = round(0.02 * RATE), round(0.006 * RATE)  # before a complex: where its level is taken
_ROUGH, _WHITE = 5, 1.4826 * (5 / 4) ** 0.5  # white noise less its mean of five, median of its size, to its deviation


@dataclass(frozen=True)
class Average:
    """beat (C, W): mV, zero on the PR segment; beats (N, C, W): those that it is the median of; noise (C,): the
    deviation of its noise, mV."""

    beat: np.ndarray
    beats: np.ndarray
    noise: np.ndarray


def average(signal: np.ndarray, at: np.ndarray, onset: int = round(-0.07 * RATE)) -> Average:
    """Of the beats `at` (N,), one or more, of (C, L); complexes begin `onset` samples from there.

    Of beats that reach over the recording's ends, which count where there are no others, it goes on as it ends.
    """
    size = signal.shape[1]
    whole = at[(at >= BEFORE) & (at + AFTER <= size)]
    whole = whole if len(whole) else at
    chosen = whole[np.linspace(0, len(whole) - 1, min(len(whole), _MOST)).round().astype(int)]
    knots = at + onset
    places = np.clip(knots, _LEVEL[0], size)  # a complex may begin before the recording
    near = [signal[:, place - _LEVEL[0] : place - _LEVEL[1]].mean(1) for place in places]
    time = np.arange(-BEFORE, AFTER)
    beats = signal[:, np.clip(chosen[:, None] + time, 0, size - 1)].swapaxes(0, 1)  # (N, C, W)
    for lead, level in enumerate(np.stack(near, 1)):
        beats[:, lead] -= np.interp(chosen[:, None] + time, knots, level)
    beat = median(beats)
    rough = beat - moving_mean(beat, _ROUGH)
    return Average(beat, beats, _WHITE * np.median(np.abs(rough), axis=1))


def median(values: np.ndarray) -> np.ndarray:
    """Along the first axis; of a few long rows several times as fast as numpy's."""
    ordered, count = np.sort(values, axis=0), len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
