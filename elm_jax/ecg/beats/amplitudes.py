"""The waves of one lead of an averaged beat: how large they are, where they begin and end; and the frontal axis."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elm_jax.ecg.beats.delineate import Span, Waves, find_p, find_qrs, find_t, samples, speed_of
from elm_jax.ecg.beats.detect import RATE

AMPLITUDES = ("p", "q", "r", "s", "r2", "j", "st60", "st80", "t")
_WAVE, _SECOND_R = 0.02, 0.05  # mV: what is smaller is no Q, R or S wave, no second R wave
_SMALL = 0.03  # mV: what is smaller is no P or T wave that can be bounded in one lead
_NEAR = samples(40)  # beyond a wave over all leads, that of one lead
_AT = samples(4)  # on each side: what an ST level is the mean of


@dataclass(frozen=True)
class Lead:
    """amplitudes: mV by AMPLITUDES, 0 for a wave that is not there; a complex without R wave counts as S. waves: p,
    qrs and t as far as they are there, begin and end in ms from the beginning of the QRS complex over all leads.
    noise: its deviation in the averaged beat, mV. reason: why there is nothing else.
    """

    amplitudes: dict[str, float] = field(default_factory=dict)
    waves: dict[str, tuple[float, float]] = field(default_factory=dict)
    noise: float = 0.0
    reason: str = ""


def lead_of(beat: np.ndarray, noise: float, waves: Waves, middle: int, interval: int) -> Lead:
    """Of the averaged beat (W,) of one lead in mV, whose `waves` over all leads are known."""
    begin, end = waves.qrs
    found = _complex(beat[begin : end + 1])
    found["j"] = float(beat[end])
    for name, ms in (("st60", 60), ("st80", 80)):
        place = end + samples(ms)
        found[name] = float(beat[place - _AT : place + _AT + 1].mean())
    found["p"] = _largest(beat, waves.p, level=True)
    found["t"] = _largest(beat, waves.t and (max(waves.t[0], end + samples(60)), waves.t[1]))
    row, noises = beat[None], np.array([noise])
    spans: dict[str, Span] = {}
    if waves.p and abs(found["p"]) >= _SMALL:
        p = find_p(row, noises, waves.qrs, waves.t[1] - interval if waves.t else 0)
        spans |= {"p": _about(p[0], waves.p)} if p else {}
    if max(found["r"], -found["s"], -found["q"]) >= 2 * _WAVE:
        qrs = find_qrs(speed_of(row, noises), middle)
        spans["qrs"] = _about(qrs, waves.qrs)
    if waves.t and abs(found["t"]) >= _SMALL:
        t = find_t(row, noises, waves.qrs, interval, begin - waves.p[0] if waves.p else 0)
        spans |= {"t": _about(t[0], waves.t)} if t else {}
    shown = {name: (milliseconds(a - begin), milliseconds(b - begin)) for name, (a, b) in spans.items()}
    return Lead({name: round(found[name], 4) for name in AMPLITUDES}, shown, round(noise, 5))


def _about(span: Span, whole: Span) -> Span:
    return max(span[0], whole[0] - _NEAR), min(span[1], whole[1] + _NEAR)


def milliseconds(count: Any) -> Any:
    """Of so many samples: a number, or an array of them."""
    return count * 1000 / RATE


def _complex(wave: np.ndarray) -> dict[str, float]:
    """Q, R, S and second R wave, mV; Q and S are negative."""
    top = int(wave.argmax())
    if wave[top] < _WAVE:
        return {"q": 0.0, "r": 0.0, "s": min(0.0, float(wave.min())), "r2": 0.0}
    dip = int(wave[: top + 1].argmin())
    if wave[dip] < -_WAVE and wave[: dip + 1].max() > _SECOND_R:  # the largest is the second R wave: rSR'
        first, second = int(wave[:dip].argmax()), float(wave[top])
    else:
        behind = wave[top:]
        first, second = top, float(behind[np.minimum.accumulate(behind) < -_WAVE].max(initial=0.0))
    return {
        "q": _below(wave[: first + 1].min()), "r": float(wave[first]), "s": _below(wave[first:].min()),
        "r2": second if second > _SECOND_R else 0.0,
    }  # fmt: skip


def larger_r(amplitudes: dict[str, float]) -> float:
    """Of the first and the second R wave of a lead, mV."""
    return max(amplitudes["r"], amplitudes["r2"])


def _below(value: float) -> float:
    return float(value) if value < -_WAVE else 0.0


def _largest(beat: np.ndarray, span: Span | None, level: bool = False) -> float:
    """The value farthest from zero, or with `level` from the line between the ends."""
    if span is None or span[1] - span[0] < 2:
        return 0.0
    part = beat[span[0] : span[1] + 1]
    part = part - np.linspace(part[0], part[-1], len(part)) if level else part
    return float(part[np.abs(part).argmax()])


def axis_of(areas: dict[str, float]) -> float | None:
    """The direction in the frontal plane, degrees from -180 (excluded) to 180, of the net areas of I and aVF, or of II
    in place of aVF; None where these leads are not there, or their areas are nothing.

    aVF is augmented: it shows 0.87 of what a lead in its direction like I would.
    """
    if "I" not in areas or not {"aVF", "II"} & set(areas):
        return None
    down = areas["aVF"] if "aVF" in areas else areas["II"] - areas["I"] / 2
    if abs(down) + abs(areas["I"]) < 1e-6:
        return None
    degrees = float(np.degrees(np.arctan2(2 / np.sqrt(3) * down, areas["I"])))
    return degrees if degrees > -180 else 180.0
