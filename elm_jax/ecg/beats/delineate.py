"""Where the waves of an averaged beat begin and end, in all leads together or in one.

The QRS complex lasts while the vector of the leads moves faster than before and behind it. P and T are sought in the
combination of leads that has most of them (the first principal component), and bounded where the area of a trapezium is
largest: Vázquez-Seisdedos et al., Biomed Eng Online 10 (2011) 43; the idea is of Zhang et al., Comput Cardiol 33 (2006)
229. Dimension letters: C leads, W samples of the averaged beat; times are samples of it.
"""

from dataclasses import dataclass

import numpy as np

from elm_jax.ecg.beats.detect import RATE, moving_mean

Span = tuple[int, int]


def samples(ms: float) -> int:
    """The number of samples of `ms` milliseconds."""
    return round(ms * RATE / 1000)


@dataclass(frozen=True)
class Waves:
    """First and last sample of each wave; None: there is none."""

    qrs: Span
    p: Span | None = None
    t: Span | None = None


# Speeds that end a complex: a part of its own largest one, in mV/ms at least and at most, and the multiple of the speed
# that noise has.
_BEFORE, _BEHIND = (0.03, 1.5e-3, 5e-3, 2.0), (0.05, 1.5e-3, 5e-3, 3.0)
_ST_SPEED = 1.8  # the multiple of the ST segment's speed that ends a complex
_STILL = samples(14)  # for how long
_NARROW = samples(80), samples(90)  # on each side of a beat's place, where a complex is fastest
_LONGEST = samples(150)  # on each side of that, a complex
_P_EARLIEST, _P_LATEST = samples(420), samples(24)  # before a complex
_P_FALL, _T_FALL, _FOOT = samples(70), samples(140), samples(66)  # from top to the steepest place, and on to the end
_P_PHASES, _T_PHASES, _SECOND = samples(90), samples(160), 0.5  # from phase to phase, part of the first's height
_T_EARLIEST, _T_END = samples(60), 0.62  # behind the complex; as a part of the square root of the interval in s
_SMOOTH_P, _SMOOTH_T, _SLOW = samples(12), samples(20), samples(260)
_TAIL = samples(30)  # of a T wave, behind its end


def trust(noise: np.ndarray) -> np.ndarray:
    """How much leads of this noise (C,) count: 1, or less where it is more than the usual noise."""
    return np.minimum(1, (np.median(noise) + 1e-4) / (noise + 1e-9)) if len(noise) > 1 else np.ones(1)


def speed_of(beat: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """How fast the vector of the leads (C, W) moves, mV/ms (W,): the root mean square, noisy leads counting less."""
    base = 4
    smooth = moving_mean(beat, 3)
    slope = np.zeros_like(smooth)
    slope[:, base // 2 : -base // 2] = (smooth[:, base:] - smooth[:, :-base]) * (RATE / 1000 / base)
    weight = trust(noise) ** 2
    return np.sqrt(weight @ np.square(slope) / weight.sum())


def find_qrs(speed: np.ndarray, middle: int) -> Span:
    """The complex about `middle`."""
    top = middle - _NARROW[0] + int(speed[middle - _NARROW[0] : middle + _NARROW[1]].argmax())
    quiet = np.partition(speed, len(speed) // 5)[len(speed) // 5]
    st = _ST_SPEED * np.median(speed[middle + samples(130) : middle + samples(190)])

    def limit(part: float, least: float, most: float, of_noise: float) -> float:
        return max(min(max(part * speed[top], least), most), of_noise * quiet)

    begin = _rests(speed[top - _LONGEST : top][::-1] < limit(*_BEFORE))
    end = _rests(speed[top : top + _LONGEST] < max(limit(*_BEHIND), st))
    return top - begin, top + end


def _rests(still: np.ndarray) -> int:
    """The first place from which on it is still for long enough; the last where there is none."""
    run = np.convolve(still, np.ones(_STILL), "valid")
    found = np.flatnonzero(run > _STILL - 0.5)
    return int(found[0]) if found.size else len(still) - 1


def find_t(beat: np.ndarray, noise: np.ndarray, qrs: Span, interval: int, p_room: int) -> tuple[Span, float] | None:
    """The T wave behind a complex, and its height. `interval`: to the next beat; `p_room`: samples from the beginning
    of the P wave to that of the complex, 0 where there is no P wave."""
    seconds = interval / RATE
    first = qrs[1] + _T_EARLIEST
    last = min(qrs[0] + interval - p_room - samples(10 if p_room else 50), qrs[0] + round(_T_END * seconds**0.5 * RATE))
    last = min(last, beat.shape[1] - 1)
    if last - first < samples(80):
        return None
    wave = moving_mean(_combine(beat, noise, first, last), _SMOOTH_T)
    size = np.abs(wave[first : last - samples(30)])
    top = _other_phase(wave, first + int(size.argmax()), min(last - samples(30), len(wave)), _T_PHASES)
    end = top + _trapezium(wave[top:last], _T_FALL)
    start = top - _trapezium(wave[qrs[1] : top + 1][::-1], _T_FALL)
    return (start, end), float(size.max())


def find_p(beat: np.ndarray, noise: np.ndarray, qrs: Span, previous_t: int) -> tuple[Span, float] | None:
    """The P wave before a complex, and its height; `previous_t`: where the T wave of the beat before ends (it may lie
    before the averaged beat)."""
    first = max(qrs[0] - _P_EARLIEST, previous_t + _TAIL, 0)
    last = qrs[0] - samples(4)
    if last - first < samples(80):
        return None
    part = moving_mean(beat, _SMOOTH_P)[:, first:last]
    part = part - moving_mean(part, _SLOW)  # the tail of the T wave before
    wave = _combine(part, noise, 0, last - first)
    inner = len(wave) - _P_LATEST
    top = _TAIL + int(np.abs(wave[_TAIL:inner]).argmax())
    early = len(wave) - 1 - _other_phase(wave[::-1], len(wave) - 1 - top, len(wave), _P_PHASES)
    late = _other_phase(wave, top, inner, _P_PHASES)
    begin = early - _trapezium(wave[: early + 1][::-1], _P_FALL)
    return (first + begin, first + late + _trapezium(wave[late:], _P_FALL)), float(abs(wave[top]))


def _other_phase(wave: np.ndarray, top: int, last: int, within: int) -> int:
    """The top of a second phase, of the other sign, that a wave with its largest at `top` may have behind it."""
    part = -np.sign(wave[top]) * wave[top : min(last, top + within)]
    second = int(part.argmax()) if len(part) else 0
    inside = 0 < second < len(part) - samples(10)
    return top + second if inside and part[second] > _SECOND * abs(wave[top]) else top


def _combine(beat: np.ndarray, noise: np.ndarray, first: int, last: int) -> np.ndarray:
    """(W,): the combination of leads with most in the samples from `first` to `last`, in mV of a root mean square."""
    if len(beat) == 1:
        return beat[0]
    weight = trust(noise)[:, None]
    weighed = beat * weight
    part = weighed[:, first:last]
    _, vectors = np.linalg.eigh(part @ part.T)
    return vectors[:, -1] @ weighed / np.sqrt(np.square(weight).sum())


def _trapezium(wave: np.ndarray, within: int) -> int:
    """Where a wave that begins at its top has ended; its steepest place lies `within` so many samples."""
    if len(wave) < 4:
        return len(wave) - 1
    sign = np.sign(wave[0]) or 1.0
    steepest = int((sign * np.diff(wave[: within + 1])).argmin())
    place = np.arange(steepest, min(len(wave), steepest + _FOOT + 1))
    area = sign * (wave[steepest] - wave[place]) * (2 * place[-1] - place - steepest)
    return int(place[area.argmax()])
