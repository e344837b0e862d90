"""Measurements in words, in the order in which a reader goes: rate and rhythm, P and PR, axis, QRS, ST, T, QT.

What is judged, and by which limits, is in `findings`.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from elm_jax.ecg.beats import findings
from elm_jax.ecg.beats.findings import Sizes
from elm_jax.ecg.beats.measurements import LATE, MERGED, Measurements, measure
from elm_jax.errors import UserError

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

    def sentences(self) -> Iterator[str]:
        values = {name: value.value for name, value in self.found.values.items()}
        yield self._rhythm(values["rate"])
        if not findings.usable(self.found):
            return
        pr, p = values["pr"], self.found.values["p"]
        if pr is None:
            yield self._without("p")
        else:
            told = self._say("pr", self._reason(p.reason), pr) if p.value is None else self._say("p", p.value, pr)
            yield f"{told}, {self.words[findings.of_pr(pr)]}"
        if values["axis"] is not None:
            yield f"{self._say('axis', round(values['axis']))}, {self.words[findings.of_axis(values['axis'])]}"
        yield self._complex(values)
        yield from self._segments()
        yield self._qt(values)
        faults = [f"{name} ({self._reason(lead.reason)})" for name, lead in self.found.leads.items() if lead.reason]
        yield self._say("left out", ", ".join(faults)) if faults else ""

    def _rhythm(self, rate: float | None) -> str:
        if rate is None:
            return self._say("no rate", self._reason(self.found.values["rate"].reason))
        rhythm, pace = self.found.rhythm, findings.pace(rate)
        kind = "but" if rhythm.early + rhythm.ectopic_early and rhythm.regularity == "regular" else rhythm.regularity
        kind = "often" if findings.early_often(self.found) else kind
        return _joined(
            self._say("rate", rate), self.words[pace] if pace != "normal" else "", self.words[kind],
            self._say("early", rhythm.early) if rhythm.early else "",
            self._say("ectopic", rhythm.ectopic_early) if rhythm.ectopic_early else "",
            self._say("pauses", rhythm.pauses, self._written(rhythm.longest, 1)) if rhythm.pauses else "",
        )  # fmt: skip

    def _complex(self, values: dict[str, float | None]) -> str:
        qrs, deep = values["qrs"], findings.deep_q(self.found)
        return _joined(
            self._say("no qrs", self._reason(self.found.values["qrs"].reason)) if qrs is None else
            f"{self._say('qrs', qrs)}, {self.words[findings.of_qrs(qrs)]}",
            self._index("sokolow", values["sokolow_lyon"], findings.SOKOLOW),
            self._index("cornell", values["cornell"], findings.CORNELL),
            self.words["low limb"] if findings.low_voltage(self.found, chest=False) else "",
            self.words["low chest"] if findings.low_voltage(self.found, chest=True) else "",
            self._at("q", deep),
        )  # fmt: skip

    def _index(self, name: str, value: float | None, limit: float) -> str:
        if value is None:
            return ""
        high = f" ({self.words['high']})" if round(value, 1) > limit else ""
        return self._say(name, self._written(value, 1)) + high

    def _segments(self) -> Iterator[str]:
        why = findings.st_unjudged(self.found)
        up, down = self._at("up", findings.elevated(self.found)), self._at("down", findings.depressed(self.found))
        yield self._say("no st", self._reason(why)) if why else _joined(up, down) or self.words["level"]
        if "t" not in self.found.waves:
            yield self._without("t")
            return
        yield self._at("t down", findings.inverted(self.found)) or self.words["t"]

    def _at(self, name: str, sizes: Sizes) -> str:
        """What is in these leads, with their sizes; "" without leads."""
        told = ", ".join(f"{lead} ({self._written(size, 2)} mV)" for lead, size in sizes.items())
        return self._say(name, told) if told else ""

    def _qt(self, values: dict[str, float | None]) -> str:
        qt, bazett, fridericia = (values[name] for name in ("qt", "qtc_bazett", "qtc_fridericia"))
        judged = findings.of_qtc(self.found)
        if qt is None or bazett is None or fridericia is None or judged is None:
            return ""
        by = "by Bazett" if judged[1] == "qtc_bazett" else "by Fridericia"
        return f"{self._say('qt', qt, bazett, fridericia)}: {self.words[judged[0]]} ({self.words[by]})"

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


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
