"""What is wrong with a recording that can be read: leads without a signal, clipped, mis-scaled, in the wrong place.

Rules that are stated, with their bounds, and only look: nothing is repaired. `check_signal` returns what they find.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from elm_jax.ecg.names import LEADS

FLAT_S = 1.0  # s of one value: longer is no signal
CLIPPED_S, CLIPPED_RUNS = 0.01, 2  # s at the largest or smallest value, at least four samples, so many times
LARGEST, SMALLEST = 20.0, 0.05  # mV from the lowest to the highest value, but for one of a hundred at either end
MISFIT = 0.5  # of the larger lead's own size: what limb leads may miss in what they add up to
WEAK = 0.08  # of the largest of I, II and III: one that is smaller lies between two electrodes of the legs
_WINDOW, _BEATS = 0.3, 3  # s on either side of a beat; fewer beats tell nothing
_SLOWEST = 50  # Hz: fewer samples a second show no P
_P, _QRS = (-0.22, -0.08), (-0.05, 0.05)  # s around the steepest part of a beat
SWAPPED = "in each other's place"
_SURE = 0.25  # of a lead's largest QRS or P: a net area that is smaller has no sign


@dataclass(frozen=True)
class Finding:
    """kind: `not_finite`, `flat`, `clipped`, `scale`, `limb_sums` or `reversal`; leads: which; text: what, in words."""

    kind: str
    leads: tuple[str, ...]
    text: str


def check_signal(signal: np.ndarray, sampling_rate: float) -> list[Finding]:
    """What the rules find in (12, L) mV, rows in the order of LEADS, by kind in the order of `Finding.kind`.

    - not_finite: values that are NaN or infinite.
    - flat: one value for `FLAT_S` or longer, or always.
    - clipped: `CLIPPED_RUNS` stretches or more of `CLIPPED_S` at a lead's largest, or smallest, value.
    - scale: leads of more than `LARGEST` or less than `SMALLEST` mV (as microvolts or volts taken for mV are).
    - limb_sums: II = I + III, aVR = -(I + II)/2, aVL = (I - III)/2, aVF = (II + III)/2 do not hold (`MISFIT`); which
      two leads in each other's place, or which one negated, would mend it, where one such change does.
    - reversal: the sums hold, and electrodes are likely in each other's place. Right and left arm: P and QRS of lead I
      point down, not the P of aVF, and I goes against V6 (in dextrocardia it goes with it). Right arm and left leg: P
      and QRS of II point down, P of aVF too, those of aVR up. An arm and the right leg: I, II or III is next to nothing
      (`WEAK`). Left arm and left leg look like another heart's axis and are not told; nor is P or QRS below 50 Hz.
    """
    found = []
    whole = np.isfinite(signal)
    for lead, row in zip(LEADS, whole, strict=True):
        if not row.all():
            found.append(Finding("not_finite", (lead,), f"{lead}: {np.count_nonzero(~row)} values that are no numbers"))
    if found:
        return found
    signal = np.asarray(signal, np.float64)
    found += _flat(signal, sampling_rate)
    alive = [lead for lead in LEADS if np.ptp(signal[LEADS.index(lead)]) > 0]
    found += _clipped(signal, sampling_rate, alive)
    found += _scale(signal, alive)
    if set(LEADS[:6]) <= set(alive):
        sums = limb_sums(signal)
        found += [sums] if sums else _reversal(signal, sampling_rate)
    return found


def _runs(same: np.ndarray) -> np.ndarray:
    """Lengths of the stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    return edges[1::2] - edges[::2]


def _flat(signal: np.ndarray, rate: float) -> Iterator[Finding]:
    for lead, row in zip(LEADS, signal, strict=True):
        longest = 1 + max(_runs(np.diff(row) == 0), default=0)
        if longest == len(row):
            yield Finding("flat", (lead,), f"{lead}: flat")
        elif longest >= FLAT_S * rate:
            yield Finding("flat", (lead,), f"{lead}: flat for {longest / rate:.3g} s")


def _clipped(signal: np.ndarray, rate: float, alive: Sequence[str]) -> Iterator[Finding]:
    least = max(4, round(CLIPPED_S * rate))
    for lead in alive:
        row = signal[LEADS.index(lead)]
        for name, bound in (("largest", row.max()), ("smallest", row.min())):
            runs = _runs(row == bound)
            if np.count_nonzero((runs >= least) & (runs < FLAT_S * rate)) >= CLIPPED_RUNS:
                yield Finding("clipped", (lead,), f"{lead}: clipped at its {name} value, {bound:.4g} mV")


def _scale(signal: np.ndarray, alive: Sequence[str]) -> Iterator[Finding]:
    sizes = {lead: float(np.ptp(np.percentile(signal[LEADS.index(lead)], (1, 99)))) for lead in alive}
    for name, leads in (
        ("large: microvolts taken as mV?", tuple(lead for lead, size in sizes.items() if size > LARGEST)),
        ("small: volts taken as mV, or a wrong gain?", tuple(lead for lead, size in sizes.items() if size < SMALLEST)),
    ):
        if leads:
            size = np.median([sizes[lead] for lead in leads])
            yield Finding("scale", leads, f"{', '.join(leads)}: {size:.3g} mV from low to high, too {name}")


def limb_sums(signal: np.ndarray) -> Finding | None:
    """The finding `limb_sums` of (C >= 6, L), where the limb leads contradict each other."""
    limbs = signal[:6] - signal[:6].mean(1, keepdims=True)
    if _fit(limbs):
        return None
    mended = []
    for one, two in combinations(range(6), 2):
        order = list(range(6))
        order[one], order[two] = two, one
        mended += [(one, two)] * _fit(limbs[order])
    turned = [one for one in range(6) if _fit(limbs * np.where(np.arange(6) == one, -1, 1)[:, None])]
    told, leads = "check their order", LEADS[:6]
    if len(mended) + len(turned) == 1:
        leads = tuple(LEADS[place] for place in (mended[0] if mended else turned))
        told = f"{' and '.join(leads)} {SWAPPED if mended else 'negated'}?"
    return Finding("limb_sums", leads, f"the limb leads contradict each other: {told}")


def _fit(limbs: np.ndarray) -> bool:
    one, two, three, avr, avl, avf = limbs
    sums = ((two, one + three), (avr, -(one + two) / 2), (avl, (one - three) / 2), (avf, (two + three) / 2))
    return all(np.std(lead - expected) <= MISFIT * max(np.std(lead), np.std(expected)) for lead, expected in sums)


def _reversal(signal: np.ndarray, rate: float) -> Iterator[Finding]:
    sizes = np.ptp(np.percentile(signal[:3], (1, 99), axis=1), axis=0)
    weak, electrodes = int(sizes.argmin()), ("both arms and legs", "right arm and right leg", "left arm and right leg")
    if sizes[weak] < WEAK * sizes.max():
        text = f"{LEADS[weak]} is next to nothing: electrodes of {electrodes[weak]} {SWAPPED}?"
        yield Finding("reversal", (LEADS[weak],), text)
        return
    beat = _average_beat(signal, rate)
    if beat is None:
        return
    p, qrs = _sign(beat, rate, _P), _sign(beat, rate, _QRS)
    one, two, _, avr, _, avf = range(6)
    middle = slice(round((_WINDOW + _QRS[0]) * rate), round((_WINDOW + _QRS[1]) * rate))
    with np.errstate(invalid="ignore"):  # of a flat V6
        against = np.corrcoef(beat[one, middle], beat[11, middle])[0, 1] < -0.3
    if p[two] < 0 and qrs[two] < 0 and p[avf] < 0 and p[avr] > 0 and qrs[avr] > 0:
        text = f"P and QRS of II point down, P of aVF too, those of aVR up: right arm and left leg {SWAPPED}?"
        yield Finding("reversal", ("II", "aVF", "aVR", "I", "III"), text)
    elif p[one] < 0 and qrs[one] < 0 and p[avr] >= 0 and p[avf] >= 0 and against:
        text = f"P and QRS of lead I point down and against V6: electrodes of the arms {SWAPPED}?"
        yield Finding("reversal", ("I", "aVR", "aVL", "II", "III"), text)


def _average_beat(signal: np.ndarray, rate: float) -> np.ndarray | None:
    """Median beat (12, 2 * _WINDOW s) around the steepest slopes of all leads together; None for too few."""
    reach, width = round(_WINDOW * rate), round(0.06 * rate)
    if rate < _SLOWEST or signal.shape[1] < 2 * reach:
        return None
    slope = np.convolve(np.abs(np.diff(signal, axis=1)).sum(0), np.ones(width) / width, "same")
    steep = np.flatnonzero(slope >= 0.4 * np.percentile(slope, 98))
    peaks, at = [], reach
    while (place := np.searchsorted(steep, at)) < len(steep):
        at = int(steep[place])
        peaks.append(at + int(slope[at : at + reach // 2].argmax()))
        at = peaks[-1] + reach
    beats = [signal[:, peak - reach : peak + reach] for peak in peaks if peak < signal.shape[1] - reach]
    return np.median(beats, axis=0) if len(beats) >= _BEATS else None


def _sign(beat: np.ndarray, rate: float, span: tuple[float, float]) -> np.ndarray:
    """Of each lead, where the net area of a part of the beat points: 1, -1, or 0 where that is little of it."""
    first, last = (round((_WINDOW + edge) * rate) for edge in span)
    part = beat[:, first:last]
    line = np.linspace(beat[:, first], beat[:, last], last - first, axis=1)
    area, size = (part - line).sum(1), np.abs(part - line).sum(1)
    return np.where(np.abs(area) < _SURE * size, 0, np.sign(area))
