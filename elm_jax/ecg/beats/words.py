"""Measurements in words, in the order in which a reader goes: rate and rhythm, P and PR, axis, QRS, ST, T, QT.

Limits are those in common use (Kligfield, Surawicz, Rautaharju, Hancock et al., AHA/ACCF/HRS recommendations for the
standardization and interpretation of the electrocardiogram, Circulation 115 and 119, 2007 and 2009). What is judged is
the number as it is written, so that two that read alike are called alike.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from elm_jax.ecg.beats.amplitudes import Lead, larger_r
from elm_jax.ecg.beats.measurements import LATE, MERGED, Measurements, measure
from elm_jax.errors import UserError

CHEST = ("V1", "V2", "V3", "V4", "V5", "V6")
_ELEVATED, _HIGHER, _DEPRESSED = (0.1, 0.2), ("V2", "V3"), -0.05  # mV; leads of the second limit
_NEIGHBOURS = (("aVL", "I", "II", "aVF", "III"), CHEST)  # each beside the next
_T_DOWN, _Q_DEEP, _Q_PART = -0.1, 0.1, 0.25  # mV; part of the R wave
_SOKOLOW, _CORNELL = 3.5, 2.8  # mV
_SMALL_LIMBS, _SMALL_CHEST = 0.5, 1.0  # mV from peak to peak: low voltage
_OFTEN = 0.25  # of the beats: early ones that make a rhythm irregular
_USUAL_RATE, _LONG_QTC = (60, 100), (450, 460)  # 1/min where Bazett's formula holds; ms, men's limit and women's
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
        "but": "rhythm regular but for early beats", "often": "rhythm irregular by frequent early beats",
        "p": "P wave {} ms, PR interval {} ms", "no p": "P wave not measurable ({})",
        "pr": "P wave duration not measurable ({}), PR interval {} ms",
        "short": "short", "long": "long", "normal": "normal", "long for men": "long for men, not for women",
        "by Bazett": "by Bazett", "by Fridericia": "by Fridericia, at this rate",
        "axis": "QRS axis {}°", "left": "left axis deviation", "right": "right axis deviation",
        "far": "extreme axis deviation",
        "qrs": "QRS {} ms", "no qrs": "QRS duration not measurable ({})",
        "narrow": "narrow", "wide": "wide", "between": "slightly wide",
        "sokolow": "Sokolow-Lyon index {} mV", "cornell": "Cornell index {} mV", "high": "high",
        "low limb": "low voltage in the limb leads", "low chest": "low voltage in the chest leads",
        "q": "Q waves in {}", "up": "ST elevation at J in {}", "down": "ST depression at J and J + 80 ms in {}",
        "level": "No ST deviation in two neighbouring leads", "no st": "ST not judged ({})",
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
        "but": "Rhythmus bis auf vorzeitige Schläge regelmäßig",
        "often": "Rhythmus durch häufige vorzeitige Schläge unregelmäßig",
        "p": "P-Welle {} ms, PQ-Zeit {} ms", "no p": "P-Welle nicht messbar ({})",
        "pr": "Dauer der P-Welle nicht messbar ({}), PQ-Zeit {} ms",
        "short": "verkürzt", "long": "verlängert", "normal": "normal",
        "long for men": "für Männer verlängert, für Frauen nicht",
        "by Bazett": "nach Bazett", "by Fridericia": "nach Fridericia, bei dieser Frequenz",
        "axis": "QRS-Achse {}°", "left": "nach links abweichend", "right": "nach rechts abweichend",
        "far": "extrem abweichend",
        "qrs": "QRS-Dauer {} ms", "no qrs": "QRS-Dauer nicht messbar ({})",
        "narrow": "schmal", "wide": "breit", "between": "leicht verbreitert",
        "sokolow": "Sokolow-Lyon-Index {} mV", "cornell": "Cornell-Index {} mV", "high": "hoch",
        "low limb": "Niedervoltage in den Extremitätenableitungen",
        "low chest": "Niedervoltage in den Brustwandableitungen",
        "q": "Q-Zacken in {}", "up": "ST-Hebung an J in {}",
        "down": "ST-Senkung an J und J + 80 ms in {}",
        "level": "Keine ST-Abweichung in zwei benachbarten Ableitungen", "no st": "ST nicht beurteilt ({})",
        "t down": "T-Wellen negativ in {}", "t": "T-Wellen aufrecht, wo üblich", "no t": "T-Welle nicht messbar ({})",
        "qt": "QT-Zeit {} ms, QTc {} ms nach Bazett, {} ms nach Fridericia",
        "left out": "Nicht verwertbar: {}",
    },
}  # fmt: skip
_REASONS = {
    "too short": "zu kurz", "no lead with a signal": "keine Ableitung mit Signal", "noise": "Rauschen",
    "no heartbeat found": "kein Herzschlag gefunden", "flat": "Nulllinie", "samples missing": "Messwerte fehlen",
    "no P wave of one look": "keine P-Welle gleicher Form", "no T wave": "keine T-Welle", "one heartbeat": "ein Schlag",
    MERGED: "P- und T-Wellen nicht zu trennen",
    "sampled too coarsely": "zu grob abgetastet",
    LATE: "die T-Welle endet in der nächsten P-Welle oder im nächsten QRS-Komplex",
    "its end is not told from the QRS complex": "ihr Ende ist vom QRS-Komplex nicht zu trennen",
    "no two neighbouring leads": "keine zwei benachbarten Ableitungen",
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
        pr, p = values["pr"], self.found.values["p"]
        if pr is None:
            yield self._without("p")
        else:
            judged = "short" if round(pr) < 120 else "long" if round(pr) > 200 else "normal"
            told = self._say("pr", self._reason(p.reason), pr) if p.value is None else self._say("p", p.value, pr)
            yield f"{told}, {self.words[judged]}"
        if values["axis"] is not None:
            axis = round(values["axis"])
            where = "normal" if -30 <= axis <= 90 else "left" if -90 <= axis < -30 else "right" if axis > 90 else "far"
            yield f"{self._say('axis', axis)}, {self.words[where]}"
        yield self._complex(values)
        yield from self._segments()
        yield self._qt(values)
        faults = [f"{name} ({self._reason(lead.reason)})" for name, lead in self.found.leads.items() if lead.reason]
        yield self._say("left out", ", ".join(faults)) if faults else ""

    def _rhythm(self, rate: float | None) -> str:
        if rate is None:
            return self._say("no rate", self._reason(self.found.values["rate"].reason))
        rhythm, (slow, fast) = self.found.rhythm, _USUAL_RATE
        early = rhythm.early + rhythm.ectopic_early
        kind = "but" if early and rhythm.regularity == "regular" else rhythm.regularity
        kind = "often" if early >= _OFTEN * len(self.found.beats) and kind != "fibrillation" else kind
        pace = "slow" if round(rate) < slow else "fast" if round(rate) > fast else ""
        return _joined(
            self._say("rate", rate), self.words[pace] if pace else "", self.words[kind],
            self._say("early", rhythm.early) if rhythm.early else "",
            self._say("ectopic", rhythm.ectopic_early) if rhythm.ectopic_early else "",
            self._say("pauses", rhythm.pauses, self._written(rhythm.longest, 1)) if rhythm.pauses else "",
        )  # fmt: skip

    def _complex(self, values: dict[str, float | None]) -> str:
        qrs = values["qrs"]
        wide = "narrow" if round(qrs or 0) < 110 else "between" if round(qrs or 0) <= 120 else "wide"
        deep = self._where(
            lambda name, a: _if(a["q"], -round(a["q"], 2) > max(_Q_DEEP, _Q_PART * larger_r(a)) and name != "aVR")
        )
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
        high = f" ({self.words['high']})" if round(value, 1) > limit else ""
        return self._say(name, self._written(value, 1)) + high

    def _low(self, name: str, limit: float, chest: bool) -> str:
        sizes = [_size(lead) for lead_name, lead in self.leads.items() if (lead_name in CHEST) == chest]
        return self.words[name] if len(sizes) == len(CHEST) and max(sizes) < limit else ""

    def _segments(self) -> Iterator[str]:
        pairs = [pair for row in _NEIGHBOURS for pair in pairwise(row) if set(pair) <= set(self.leads)]
        why = self.found.values["qt"].reason if self.found.values["qt"].reason in (MERGED, LATE) else ""
        why = why or ("" if pairs else "no two neighbouring leads")

        def told(name: str, of: Callable[[str, dict[str, float]], float]) -> str:
            there = {one for one, lead in self.leads.items() if of(one, lead.amplitudes)}
            both = {one for pair in pairs if set(pair) <= there for one in pair}
            return self._say(name, self._where(lambda one, a: _if(of(one, a), one in both))) if both else ""

        up = told("up", lambda name, a: _if(a["j"], round(a["j"], 2) >= _ELEVATED[name in _HIGHER]))
        down = told("down", lambda _, a: _if(a["st80"], round(max(a["j"], a["st80"]), 2) <= _DEPRESSED))
        yield self._say("no st", self._reason(why)) if why else _joined(up, down) or self.words["level"]
        if "t" not in self.found.waves:
            yield self._without("t")
            return
        turned = self._where(lambda name, a: _if(a["t"], round(a["t"], 2) <= _T_DOWN and name not in _DOWN_AS_USUAL))
        yield self._say("t down", turned) if turned else self.words["t"]

    def _where(self, of: Callable[[str, dict[str, float]], float]) -> str:
        """The leads of which `of` their name and amplitudes is something, with that."""
        sizes = {name: of(name, lead.amplitudes) for name, lead in self.leads.items()}
        return ", ".join(f"{name} ({self._written(size, 2)} mV)" for name, size in sizes.items() if size)

    def _qt(self, values: dict[str, float | None]) -> str:
        """QTc by Bazett's formula, or where it is far off by Fridericia's; the limits of men and women, for nobody says
        whose ECG it is."""
        qt, bazett, fridericia, rate = (values[name] for name in ("qt", "qtc_bazett", "qtc_fridericia", "rate"))
        if qt is None or bazett is None or fridericia is None:
            return ""
        by = "by Bazett" if rate is None or _USUAL_RATE[0] <= round(rate) <= _USUAL_RATE[1] else "by Fridericia"
        length = round(bazett if by == "by Bazett" else fridericia)
        judged = "short" if length < 340 else "normal" if length <= _LONG_QTC[0] else "long for men"
        judged = "long" if length > _LONG_QTC[1] else judged
        return f"{self._say('qt', qt, bazett, fridericia)}: {self.words[judged]} ({self.words[by]})"

    def _without(self, wave: str) -> str:
        return self._say(f"no {wave}", self._reason(self.found.values["pr" if wave == "p" else "qt"].reason))

    def _say(self, name: str, *values: object) -> str:
        shown = (f"{value:.0f}" if isinstance(value, float) else str(value) for value in values)
        return self.words[name].format(*shown)

    def _written(self, value: float, digits: int) -> str:
        told = f"{value:.{digits}f}"
        return told if self.language == "en" else told.replace(".", ",")

    def _reason(self, reason: str) -> str:
        first, colon, rest = reason.partition(":")
        return reason if self.language == "en" else _REASONS.get(first, first) + colon + rest.replace(".", ",")


def _if(value: float, counts: bool) -> float:
    return value if counts else 0.0


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _size(lead: Lead) -> float:
    a = lead.amplitudes
    return larger_r(a) - min(a["q"], a["s"])
