"""What a reader measures in an ECG, out of the samples: rate, rhythm, intervals, axis, amplitudes, ST levels.

Each value has a quality from 0 to 1 and, where it cannot be measured, a reason. Intervals are those of the averaged
beat over all leads (`delineate`), amplitudes are from the level before the QRS complex (Kligfield et al., Circulation
115 (2007) 1306: recommendations for the standardization of the electrocardiogram).
Dimension letters: C leads, L samples, N beats, W samples of the averaged beat.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elm_jax.ecg.beats import delineate
from elm_jax.ecg.beats.amplitudes import Lead, axis_of, larger_r, lead_of, milliseconds
from elm_jax.ecg.beats.average import BEFORE, Average, average, median
from elm_jax.ecg.beats.delineate import Waves
from elm_jax.ecg.beats.detect import CONTRAST, RATE, Beats, find_beats
from elm_jax.ecg.beats.rhythm import Rhythm, rhythm_of, sudden
from elm_jax.ecg.names import LEADS
from elm_jax.ecg.resampling import resample
from elm_jax.errors import UserError

UNITS = {
    "rate": "1/min", "p": "ms", "pr": "ms", "qrs": "ms", "qt": "ms", "qtc_bazett": "ms", "qtc_fridericia": "ms",
    "axis": "°", "p_axis": "°", "t_axis": "°", "sokolow_lyon": "mV", "cornell": "mV",
}  # fmt: skip
_COARSE, _FINE = 90.0, 250.0  # Hz: intervals are not measured below, and trusted less up to the other
_SHORTEST, _FLAT, _HOLES = 1.5, 1e-3, 0.2  # s; mV from the 1st to the 99th percentile; part that may be missing
_NOISY = 0.06, 8.0  # mV, and times the noise of the other leads: a lead that is left out
_SPARSE = 5  # of so many samples one tells whether a lead is flat
_MOST = 1e4  # mV: what is more is no voltage of a heart
_P_HEIGHT, _P_ALIKE = 0.012, 0.6  # mV in its combination of leads, and likeness from beat to beat
_P_LIKELY = 0.032, 0.5  # mV that are alike, and likeness: waves that are no fibrillation's, though they are not bounded
_P_NEAR, _P_LONGEST = 10, 160  # ms before the complex, and long: where a P wave's end was not told from the complex
_T_LATE = 0.8  # of the interval: a T wave that ends later has the next P wave or complex in it
_SHORT_QT = 0.32  # s at an interval of 1 s: what is shorter does not end a T wave
_EARLY_T = 0.28  # likewise behind the complex, where a T wave has surely not ended before
MERGED, LATE = "P and T waves cannot be told apart", "the T wave ends in the next P wave or QRS complex"
NO_P = "no P wave of one look"
_LEAST = 3  # beats that do not come early, of which the averaged beat is then
_LARGE_T = 0.3  # of the largest: the T waves of leads whose ends count


@dataclass(frozen=True)
class Value:
    """A number, how far it can be trusted (0 to 1), and where there is none, why."""

    value: float | None
    quality: float
    reason: str = ""


@dataclass(frozen=True)
class Measurements:
    """seconds: of the recording. values: by the names of UNITS. leads: by name. beats: the middle of each QRS complex
    in s; kinds: which look alike, 0 the usual look. waves: of the averaged beat over all leads, begin and end of p, qrs
    and t in ms from the beginning of its QRS complex. beat (C, W): the averaged beat of those leads that have no
    `reason`, in mV, at RATE, its complex beginning at sample `onset`; None without heartbeats.
    """

    seconds: float
    values: dict[str, Value]
    rhythm: Rhythm
    leads: dict[str, Lead]
    beats: tuple[float, ...] = ()
    kinds: tuple[int, ...] = ()
    waves: dict[str, tuple[float, float]] = field(default_factory=dict)
    beat: np.ndarray | None = field(default=None, repr=False, compare=False)
    onset: int = 0


def measure(signal: np.ndarray, sampling_rate: float, leads: Sequence[str] | None = None) -> Measurements:
    """Of a signal (C, L) in mV at `sampling_rate` Hz, of any length and number of leads.

    leads: their names, by default those of a 12-lead ECG or numbers. Samples that are not finite are bridged; a lead
    that lacks many, is flat or noise alone is left out, and says so. Raises UserError for what is no such array.
    """
    signal = np.asarray(signal)
    names = tuple(leads or (LEADS if len(signal) == len(LEADS) else map(str, range(1, len(signal) + 1))))
    if signal.ndim != 2 or signal.dtype.kind not in "fiu" or len(names) != len(signal) or len(set(names)) < len(names):
        found = f"{signal.dtype} of shape {signal.shape} for {len(names)} leads"
        raise UserError("signal", found, "numbers (leads, samples), one name for each lead", "correct it")
    if not (np.isfinite(sampling_rate) and sampling_rate > 0):
        raise UserError("sampling_rate", f"{sampling_rate}", "a positive number of Hz", "correct it")
    seconds = signal.shape[1] / sampling_rate
    if seconds < _SHORTEST or signal.shape[1] < 4:
        return _nothing(seconds, dict.fromkeys(names, ""), f"too short: {seconds:.1f} s")
    values, faults = _repaired(signal.astype(np.float64), names)
    usable = [row for row, name in enumerate(names) if not faults[name]]
    if not usable:
        return _nothing(seconds, faults, "no lead with a signal")
    values = values[usable] if sampling_rate == RATE else resample(values[usable], sampling_rate, RATE)
    found = _measure(values, tuple(names[row] for row in usable), faults, seconds)
    return found if sampling_rate >= _FINE else _less_trusted(found, sampling_rate)


def _less_trusted(found: Measurements, sampling_rate: float) -> Measurements:
    """Intervals at a rate that does not tell well where waves begin and end."""
    values = dict(found.values)
    for name in ("p", "pr", "qrs", "qt", "qtc_bazett", "qtc_fridericia"):
        value = found.values[name]
        values[name] = replace(value, quality=round(value.quality * sampling_rate / _FINE, 3))
        if sampling_rate < _COARSE:
            values[name] = Value(None, 0.0, value.reason or "sampled too coarsely")
    return replace(found, values=values)


def _nothing(seconds: float, faults: dict[str, str], reason: str) -> Measurements:
    values = {name: Value(None, 0.0, reason) for name in UNITS}
    return Measurements(seconds, values, Rhythm(), {name: Lead(reason=why or reason) for name, why in faults.items()})


def _repaired(values: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
    """The signal without gaps, and what is wrong with each lead."""
    faults = {}
    for name, lead in zip(names, values, strict=True):
        holes = ~(np.abs(lead) < _MOST)  # NaN too
        faults[name] = "samples missing" if holes.mean() > _HOLES else ""
        if holes.any():
            place = np.arange(len(lead))
            lead[holes] = 0.0 if holes.all() else np.interp(place[holes], place[~holes], lead[~holes])
        if not faults[name] and np.subtract(*np.percentile(lead[::_SPARSE], (99, 1))) < _FLAT:
            faults[name] = "flat"
    return values, faults


def _measure(signal: np.ndarray, names: tuple[str, ...], faults: dict[str, str], seconds: float) -> Measurements:
    beats = find_beats(signal)
    if not beats.at.size or beats.contrast < CONTRAST:
        return _nothing(seconds, faults, "noise" if beats.at.size else "no heartbeat found")
    usual = beats.at[beats.kind == 0]
    mean = average(signal, usual)
    noisy = mean.noise > np.maximum(_NOISY[0], _NOISY[1] * np.median(mean.noise))
    faults = faults | {names[row]: "noise" for row in np.flatnonzero(noisy)}
    names, signal = tuple(name for name in names if not faults[name]), signal[~noisy]
    qrs = delineate.find_qrs(delineate.speed_of(mean.beat[~noisy], mean.noise[~noisy]), BEFORE)
    mean = average(signal, usual, qrs[0] - BEFORE)  # now on the level right before the complex
    interval = int(np.median(np.diff(beats.at))) if len(beats.at) > 1 else RATE
    waves, alike, likely, reasons = _waves(mean, interval, interval)
    timely = (beats.kind == 0) & ~sudden(beats.at)
    if reasons["p"] == NO_P and timely[1:].sum() >= _LEAST:  # the P waves of early beats lie in T waves
        rest = average(signal, beats.at[timely], qrs[0] - BEFORE)
        again = _waves(rest, interval, int(np.median(np.diff(beats.at)[timely[1:]])))
        if again[2]:
            mean, (waves, alike, likely, reasons) = rest, again
    leads = {name: Lead(reason=why) for name, why in faults.items()}
    for row, name in enumerate(names):
        leads[name] = lead_of(mean.beat[row], float(mean.noise[row]), waves, BEFORE, interval)
    begin = waves.qrs[0]
    spans = {"p": waves.p, "qrs": waves.qrs, "t": waves.t}
    shown = {k: (milliseconds(v[0] - begin), milliseconds(v[1] - begin)) for k, v in spans.items() if v}
    values = _rate(beats) | _intervals(mean, waves, alike, reasons, interval) | _directions(mean, names, waves)
    values |= _voltages(leads, values["qrs"].quality)
    middles = tuple(round(float(at) / RATE, 3) for at in beats.at)
    rhythm = rhythm_of(beats, waves.p is not None, likely)
    kinds = tuple(int(kind) for kind in beats.kind)
    values = {name: values[name] for name in UNITS}
    return Measurements(seconds, values, rhythm, leads, middles, kinds, shown, mean.beat, begin)


def _waves(mean: Average, interval: int, before: int) -> tuple[Waves, float, bool, dict[str, str]]:
    """The waves over all leads, how like the P waves of all beats are, whether there likely are such, and why P or T
    are not there. `before`: the interval before the beats that were averaged."""
    beat, noise = mean.beat, mean.noise
    qrs = delineate.find_qrs(delineate.speed_of(beat, noise), BEFORE)
    p, alike, likely = _p_wave(mean, qrs, qrs[1] + round(_EARLY_T * (interval * RATE) ** 0.5) - before)
    t = _t_wave(mean, qrs, interval, qrs[0] - p[0] if p else 0)
    if t is not None:
        p, alike, likely = _p_wave(mean, qrs, t[1] - before)
    if t is not None and t[1] - qrs[0] < _SHORT_QT * (interval * RATE) ** 0.5:
        return Waves(qrs), 0.0, False, dict.fromkeys("pt", MERGED)
    if t is not None and t[1] - qrs[0] > _T_LATE * interval:
        return Waves(qrs, p), alike, likely, {"p": "" if p else NO_P, "t": LATE}
    reasons = {"p": "" if p else NO_P, "t": "" if t else "no T wave"}
    return Waves(qrs, p, t), alike, likely, reasons


def _p_wave(mean: Average, qrs: delineate.Span, previous_t: int) -> tuple[delineate.Span | None, float, bool]:
    """The P wave, where there is one; how alike such waves are; and whether they are large and alike enough to be no
    fibrillation's."""
    found = delineate.find_p(mean.beat, mean.noise, qrs, previous_t)
    if found is None or found[1] < max(_P_HEIGHT, 2 * float(np.median(mean.noise))):
        return None, 0.0, False
    (begin, end), height = found
    parts = mean.beats[:, :, max(0, begin - 10) : end + 5]
    parts = (parts - parts.mean(-1, keepdims=True)) * delineate.trust(mean.noise)[:, None]
    usual = median(parts)
    size = np.sqrt(np.square(parts).sum((1, 2)) * np.square(usual).sum()) + 1e-12
    alike = float(np.median((parts * usual).sum((1, 2)) / size))
    likely = alike >= _P_LIKELY[1] and alike * height >= _P_LIKELY[0]
    return ((begin, end) if alike >= _P_ALIKE else None), alike, likely


def _t_wave(mean: Average, qrs: delineate.Span, interval: int, p_room: int) -> delineate.Span | None:
    """Begin over all leads; its end is the median of those of the leads that have much of it."""
    found = delineate.find_t(mean.beat, mean.noise, qrs, interval, p_room)
    if found is None or found[1] < max(_P_HEIGHT, 2 * float(np.median(mean.noise))):
        return None
    rows = (slice(row, row + 1) for row in range(len(mean.beat)))
    each = [delineate.find_t(mean.beat[row], mean.noise[row], qrs, interval, p_room) for row in rows]
    sized = [one for one in each if one]
    largest = max(height for _, height in sized)
    ends = [span[1] for span, height in sized if height >= _LARGE_T * largest]
    return found[0][0], int(np.median(ends))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _rate(beats: Beats) -> dict[str, Value]:
    count = len(beats.at)
    if count < 2:
        return {"rate": Value(None, 0.0, "one heartbeat")}
    minutes = (beats.at[-1] - beats.at[0]) / RATE / 60
    clear = min(1.0, (beats.contrast - CONTRAST) / CONTRAST)
    return {"rate": Value(float((count - 1) / minutes), _quality(clear, beats.likeness.mean(), count))}


def _quality(clear: float, alike: float, count: int) -> float:
    """How much larger than its noise, how alike from beat to beat, of how many beats."""
    return round(float(np.clip(clear, 0, 1) * np.clip(alike, 0, 1) * count / (count + 1)), 3)


def _intervals(mean: Average, waves: Waves, alike: float, reasons: dict[str, str], interval: int) -> dict[str, Value]:
    noise, count = _rms(mean.noise), len(mean.beats)

    def clear(span: delineate.Span) -> float:
        height = np.sqrt(np.square(mean.beat[:, span[0] : span[1] + 1]).mean(0)).max()
        return 1 - 4 * noise / (height + 1e-9)

    (begin, end), p, t = waves.qrs, waves.p, waves.t
    of_qrs = _quality(clear(waves.qrs), 1.0, count)
    found = dict.fromkeys(UNITS, Value(None, 0.0, reasons["p"])) | {"qrs": Value(milliseconds(end - begin), of_qrs)}
    if p:
        of_p = min(of_qrs, _quality(clear(p), alike, count))
        length = milliseconds(p[1] - p[0])
        unclear = milliseconds(begin - p[1]) < _P_NEAR or length > _P_LONGEST
        found["p"] = Value(None, 0.0, "its end is not told from the QRS complex") if unclear else Value(length, of_p)
        found["pr"] = Value(milliseconds(begin - p[0]), round(of_p / 2, 3) if unclear else of_p)
    of_t = min(of_qrs, _quality(clear(t), 1.0, count)) if t else 0.0
    qt, seconds = (milliseconds(t[1] - begin) if t else None), interval / RATE
    for name, power in (("qt", 0.0), ("qtc_bazett", 1 / 2), ("qtc_fridericia", 1 / 3)):
        found[name] = Value(qt and qt / seconds**power, of_t, reasons["t"])
    return {name: found[name] for name in ("p", "pr", "qrs", "qt", "qtc_bazett", "qtc_fridericia")}


def _directions(mean: Average, names: Sequence[str], waves: Waves) -> dict[str, Value]:
    """Of the net areas of I and aVF."""
    found = {}
    for name, span in (("axis", waves.qrs), ("p_axis", waves.p), ("t_axis", waves.t)):
        if span is None:
            found[name] = Value(None, 0.0, "no such wave")
            continue
        parts = mean.beat[:, span[0] : span[1] + 1]
        if name == "p_axis":
            parts = parts - np.linspace(parts[:, 0], parts[:, -1], parts.shape[1], axis=1)
        areas = dict(zip(names, milliseconds(1) * parts.sum(1), strict=True))
        degrees = axis_of(areas)
        if degrees is None:
            found[name] = Value(None, 0.0, "I and aVF, or I and II, are needed")
            continue
        rough = milliseconds(1) * _rms(mean.noise) * parts.shape[1] ** 0.5 * 4
        size = float(np.hypot(areas["I"], areas.get("aVF", areas.get("II", 0.0))))
        found[name] = Value(degrees, _quality(1 - rough / (size + 1e-9), 1.0, len(mean.beats)))
    return found


def _voltages(leads: dict[str, Lead], quality: float) -> dict[str, Value]:
    """Sokolow and Lyon, Am Heart J 37 (1949) 161: S in V1 and the larger R in V5 or V6. Cornell (Casale et al., J Am
    Coll Cardiol 6 (1985) 572): R in aVL and S in V3."""
    found = {}
    for name, s, r in (("sokolow_lyon", "V1", ("V5", "V6")), ("cornell", "V3", ("aVL",))):
        absent = [lead for lead in (s, *r) if lead not in leads or leads[lead].reason]
        if absent:
            found[name] = Value(None, 0.0, f"no {', '.join(absent)}")
        else:
            largest = max(larger_r(leads[lead].amplitudes) for lead in r)
            found[name] = Value(largest - leads[s].amplitudes["s"], quality)
    return found
