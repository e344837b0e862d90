"""Measurements in words, in the order in which a reader goes: rate and rhythm, P and PR, axis, QRS, ST, T, QT.

Limits are those in common use (Kligfield, Surawicz, Rautaharju, Hancock et al., AHA/ACCF/HRS recommendations for the
standardization and interpretation of the electrocardiogram, Circulation 115 and 119, 2007 and 2009).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from elm_jax.ecg.beats.amplitudes import Lead, larger_r
from elm_jax.ecg.beats.measurements import Measurements, measure
from elm_jax.errors import UserError

CHEST = ("V1", "V2", "V3", "V4", "V5", "V6")
_ELEVATED, _HIGHER, _DEPRESSED = (0.1, 0.2), ("V2", "V3"), -0.05  # mV at J + 60 ms; leads of the second limit
_T_DOWN, _Q_DEEP, _Q_PART = -0.1, 0.1, 0.25  # mV; part of the R wave
_SOKOLOW, _CORNELL = 3.5, 2.8  # mV
_SMALL_LIMBS, _SMALL_CHEST = 0.5, 1.0  # mV from peak to peak: low voltage
_DOWN_AS_USUAL = ("aVR", "V1", "III")  # leads in which a negative T wave is usual

# For each language, in one order: a name and what it says.
_WORDS = {
    "en": {
        "rate": "Heart rate {}/min", "no rate": "Heart rate not measurable ({})",
        "regular": "rhythm regular", "varying": "rhythm varying, with P waves", "irregular": "rhythm irregular",
        "fibrillation": "rhythm irregular without P waves, as in atrial fibrillation",
        "unknown": "too few beats for the rhythm",
        "slow": "slow", "fast": "fast", "early": "early beats of the usual form: {}",
        "ectopic": "early beats of another form: {}", "pauses": "pauses: {}, the longest {} s",
        "p": "P wave {} ms, PR interval {} ms", "no p": "P wave not measurable ({})",
        "short": "short", "long": "long", "normal": "normal",
        "axis": "QRS axis {}°", "left": "left axis deviation", "right": "right axis deviation",
        "far": "extreme axis deviation",
        "qrs": "QRS {} ms", "no qrs": "QRS duration not measurable ({})",
        "narrow": "narrow", "wide": "wide", "between": "slightly wide",
        "sokolow": "Sokolow-Lyon index {} mV", "cornell": "Cornell index {} mV", "high": "high",
        "low limb": "low voltage in the limb leads", "low chest": "low voltage in the chest leads",
        "q": "Q waves in {}", "up": "ST elevation in {}", "down": "ST depression in {}", "level": "No ST deviation",
        "t down": "T waves negative in {}", "t": "T waves upright where usual", "no t": "T wave not measurable ({})",
        "qt": "QT interval {} ms, QTc {} ms by Bazett, {} ms by Fridericia",
        "left out": "Not usable: {}",
    },
    "de": {
        "rate": "Herzfrequenz {}/min", "no rate": "Herzfrequenz nicht messbar ({})",
        "regular": "Rhythmus regelmäßig", "varying": "Rhythmus wechselnd, mit P-Wellen",
        "irregular": "Rhythmus unregelmäßig",
        "fibrillation": "Rhythmus unregelmäßig ohne P-Wellen, wie bei Vorhofflimmern",
        "unknown": "zu wenige Schläge für den Rhythmus",
        "slow": "langsam", "fast": "schnell", "early": "vorzeitige Schläge üblicher Form: {}",
        "ectopic": "vorzeitige Schläge anderer Form: {}", "pauses": "Pausen: {}, längste {} s",
        "p": "P-Welle {} ms, PQ-Zeit {} ms", "no p": "P-Welle nicht messbar ({})",
        "short": "verkürzt", "long": "verlängert", "normal": "normal",
        "axis": "QRS-Achse {}°", "left": "nach links abweichend", "right": "nach rechts abweichend",
        "far": "extrem abweichend",
        "qrs": "QRS-Dauer {} ms", "no qrs": "QRS-Dauer nicht messbar ({})",
        "narrow": "schmal", "wide": "breit", "between": "leicht verbreitert",
        "sokolow": "Sokolow-Lyon-Index {} mV", "cornell": "Cornell-Index {} mV", "high": "hoch",
        "low limb": "Niedervoltage in den Extremitätenableitungen",
        "low chest": "Niedervoltage in den Brustwandableitungen",
        "q": "Q-Zacken in {}", "up": "ST-Hebung in {}", "down": "ST-Senkung in {}",
        "level": "Keine ST-Abweichung",
        "t down": "T-Wellen negativ in {}", "t": "T-Wellen aufrecht, wo üblich", "no t": "T-Welle nicht messbar ({})",
        "qt": "QT-Zeit {} ms, QTc {} ms nach Bazett, {} ms nach Fridericia",
        "left out": "Nicht verwertbar: {}",
    },
}  # fmt: skip
_REASONS = {
    "too short": "zu kurz", "no lead with a signal": "keine Ableitung mit Signal", "noise": "Rauschen",
    "no heartbeat found": "kein Herzschlag gefunden", "flat": "Nulllinie", "samples missing": "Messwerte fehlen",
    "no P wave of one look": "keine P-Welle gleicher Form", "no T wave": "keine T-Welle", "one heartbeat": "ein Schlag",
    "P and T waves cannot be told apart": "P- und T-Wellen nicht zu trennen",
    "sampled too coarsely": "zu grob abgetastet",
}  # fmt: skip
LANGUAGES = tuple(_WORDS)


def written(signal: np.ndarray, sampling_rate: float, leads: Sequence[str]) -> str:
    """What a view writes of leads (C, L) in mV, which are called so: their measurements in English."""
    return describe(measure(signal, sampling_rate, leads))


def describe(found: Measurements, language: str = "en") -> str:
    """The measurements as sentences. Raises UserError for a language that is none of LANGUAGES."""
    if language not in _WORDS:
        raise UserError("--language", repr(language), f"one of {', '.join(LANGUAGES)}", "choose one of these")
    teller = _Teller(found, language)
    return " ".join(sentence[:1].upper() + sentence[1:] + "." for sentence in teller.sentences() if sentence)


class _Teller:
    def __init__(self, found: Measurements, language: str) -> None:
        self.found, self.language, self.words = found, language, _WORDS[language]
        self.leads = {name: lead for name, lead in found.leads.items() if not lead.reason}

    def sentences(self) -> Iterator[str]:
        values = {name: value.value for name, value in self.found.values.items()}
        yield self._rhythm(values["rate"])
        if not self.leads:
            return
        pr = values["pr"]
        yield self._judged("p", pr, (120, "short"), (200, "long"), shown=(values["p"], pr)) or self._without("p")
        axis = values["axis"]
        if axis is not None:
            where = "normal" if -30 <= axis <= 90 else "left" if -90 <= axis < -30 else "right" if axis > 90 else "far"
            yield f"{self._say('axis', axis)}, {self.words[where]}"
        yield self._complex(values)
        yield from self._segments()
        bazett = values["qtc_bazett"]
        shown = values["qt"], bazett, values["qtc_fridericia"]
        yield self._judged("qt", bazett, (340, "short"), (450, "long"), shown=shown) or ""
        faults = [f"{name} ({self._reason(lead.reason)})" for name, lead in self.found.leads.items() if lead.reason]
        yield self._say("left out", ", ".join(faults)) if faults else ""

    def _rhythm(self, rate: float | None) -> str:
        if rate is None:
            return self._say("no rate", self._reason(self.found.values["rate"].reason))
        rhythm = self.found.rhythm
        return _joined(
            self._say("rate", rate), self.words["slow"] if rate < 60 else self.words["fast"] if rate > 100 else "",
            self.words[rhythm.regularity], self._say("early", rhythm.early) if rhythm.early else "",
            self._say("ectopic", rhythm.ectopic_early) if rhythm.ectopic_early else "",
            self._say("pauses", rhythm.pauses, f"{rhythm.longest:.1f}") if rhythm.pauses else "",
        )  # fmt: skip

    def _complex(self, values: dict[str, float | None]) -> str:
        qrs = values["qrs"]
        wide = "narrow" if (qrs or 0) < 110 else "between" if (qrs or 0) <= 120 else "wide"
        deep = self._where(lambda name, a: _if(a["q"], -a["q"] > max(_Q_DEEP, _Q_PART * larger_r(a)) and name != "aVR"))
        return _joined(
            self._say("no qrs", self._reason(self.found.values["qrs"].reason)) if qrs is None else
            f"{self._say('qrs', qrs)}, {self.words[wide]}",
            self._index("sokolow", values["sokolow_lyon"], _SOKOLOW),
            self._index("cornell", values["cornell"], _CORNELL),
            self._low("low limb", _SMALL_LIMBS, chest=False), self._low("low chest", _SMALL_CHEST, chest=True),
            self._say("q", deep) if deep else "",
        )  # fmt: skip

    def _index(self, name: str, value: float | None, limit: float) -> str:
        if value is None:
            return ""
        return self._say(name, f"{value:.1f}") + (f" ({self.words['high']})" if value > limit else "")

    def _low(self, name: str, limit: float, chest: bool) -> str:
        sizes = [_size(lead) for lead_name, lead in self.leads.items() if (lead_name in CHEST) == chest]
        return self.words[name] if len(sizes) == len(CHEST) and max(sizes) < limit else ""

    def _segments(self) -> Iterator[str]:
        up = self._where(lambda name, a: _if(a["st60"], a["st60"] >= _ELEVATED[name in _HIGHER]))
        down = self._where(lambda name, a: _if(a["st60"], a["st60"] <= _DEPRESSED and name != "aVR"))
        told = _joined(self._say("up", up) if up else "", self._say("down", down) if down else "")
        yield told or self.words["level"]
        if "t" not in self.found.waves:
            yield self._without("t")
            return
        turned = self._where(lambda name, a: _if(a["t"], a["t"] <= _T_DOWN and name not in _DOWN_AS_USUAL))
        yield self._say("t down", turned) if turned else self.words["t"]

    def _where(self, of: Callable[[str, dict[str, float]], float]) -> str:
        """The leads of which `of` their name and amplitudes is something, with that."""
        sizes = {name: of(name, lead.amplitudes) for name, lead in self.leads.items()}
        return ", ".join(f"{name} ({size:.2f} mV)" for name, size in sizes.items() if size)

    def _judged(
        self, name: str, value: float | None, low: tuple[float, str], high: tuple[float, str],
        shown: tuple[float | None, ...],
    ) -> str:  # fmt: skip
        if value is None:
            return ""
        judged = low[1] if value < low[0] else high[1] if value > high[0] else "normal"
        return f"{self._say(name, *shown)}, {self.words[judged]}"

    def _without(self, wave: str) -> str:
        return self._say(f"no {wave}", self._reason(self.found.values["pr" if wave == "p" else "qt"].reason))

    def _say(self, name: str, *values: object) -> str:
        shown = (f"{value:.0f}" if isinstance(value, float) else str(value) for value in values)
        return self.words[name].format(*shown)

    def _reason(self, reason: str) -> str:
        first, colon, rest = reason.partition(":")
        return reason if self.language == "en" else _REASONS.get(first, first) + colon + rest


def _if(value: float, counts: bool) -> float:
    return value if counts else 0.0


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _size(lead: Lead) -> float:
    a = lead.amplitudes
    return larger_r(a) - min(a["q"], a["s"])
