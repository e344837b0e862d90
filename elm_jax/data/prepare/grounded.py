"""An ECG read in five steps, in words made of its measurements: evidence first, and a conclusion from its report.

The order is ECG-R1's and GEM's (arXiv 2602.04279, 2503.06073): technical quality, rate and rhythm; conduction and axis;
chambers; ischaemia and repolarisation by groups of leads; conclusion. No model writes: each number is the measurement
as `printed`, cited with its lead, beats with their time, and what cannot be measured is said to be so, and why.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from elm_jax.ecg.beats import findings
from elm_jax.ecg.beats.findings import Sizes
from elm_jax.ecg.beats.measurements import UNITS, Measurements
from elm_jax.scoring.grounding import evidence_of, ground

STEPS = (
    "Technical quality, rate and rhythm", "Conduction and axis", "Chambers", "Ischaemia and repolarisation",
    "Conclusion",
)  # fmt: skip
QUESTIONS = (
    "Read this ECG step by step, and give the evidence for each finding.",
    "Interpret this ECG systematically. Cite the measurements and leads that you rely on.",
    "What does this ECG show? Go through rate, rhythm, conduction, axis, chambers and repolarisation.",
    "Please analyse the ECG in order, from its technical quality to a conclusion, and say what you measure.",
    "Give a structured interpretation of this recording with evidence from the leads.",
    "Describe what can be measured in this ECG, then conclude.",
)
GROUPS = {"Inferior": ("II", "III", "aVF"), "Lateral": ("I", "aVL", "V5", "V6"), "Anterior": findings.CHEST[:4]}
_MOST_BEATS = 3  # of which the times are told
# Of each thing said, the wordings that take turns; {…} is what `printed` makes of a value.
_WORDINGS: dict[str, tuple[str, ...]] = {
    "usable": (
        "All leads are usable.", "The recording of {seconds} s can be read in all leads.", "No lead is disturbed.",
    ),
    "faults": ("Not usable: {0}.", "These leads are left out: {0}."),
    "rate": (
        "The heart rate is {rate}/min, {0}.", "Ventricular rate {rate} beats per minute: {0}.",
        "{beats} QRS complexes give a heart rate of {rate} bpm, which is {0}.",
    ),
    "no rate": ("The heart rate cannot be measured: {0}.",),
    "regular": ("The rhythm is regular.", "Regular rhythm.", "RR intervals are regular."),
    "varying": (
        "The rhythm is varying, with P waves before the complexes.", "With P waves throughout, the rhythm is varying.",
    ),
    "irregular": ("The rhythm is irregular.", "RR intervals are irregular."),
    "fibrillation": (
        "The rhythm is irregular, without P waves of one form, as in atrial fibrillation.",
        "RR intervals are irregular and P waves of one form are missing, as in atrial fibrillation.",
    ),
    "but": ("The rhythm is regular but for early beats.",),
    "often": ("Frequent early beats make the rhythm irregular.",),
    "unknown": ("There are too few beats to judge the rhythm.",),
    "early": ("Early beats of the usual form: {early}.",), "ectopic": ("Beats of another form, at {0} s.",),
    "pauses": ("Pauses: {pauses}, the longest {longest} s.",),
    "complexes": (
        "In lead {0} the first QRS complexes lie at {1} s.", "Lead {0} shows QRS complexes at {1} s, and so on.",
    ),
    "pr": ("PR interval {pr} ms, {0}.", "The PR interval measures {pr} ms and is {0}.", "PR {pr} ms: {0}."),
    "no pr": ("The PR interval cannot be measured: {0}.", "PR interval not measurable ({0})."),
    "qrs": ("QRS duration {qrs} ms, {0}.", "The QRS complex lasts {qrs} ms: {0}.", "QRS {qrs} ms, {0}."),
    "no qrs": ("The QRS duration cannot be measured: {0}.",),
    "second r": ("V1 has a second R wave of {r2 V1} mV.",),
    "axis": ("QRS axis {axis}°: {0}.", "The frontal QRS axis is {axis}°, {0}."),
    "no axis": ("The QRS axis cannot be measured: {0}.",),
    "p": ("P duration {p} ms.", "The P wave lasts {p} ms."), "no p": ("The duration of P is not measurable ({0}).",),
    "p II": ("In lead II the P wave is {p II} mV.", "P wave in II {p II} mV."),
    "sokolow": (
        "R in {0} {r {0}} mV and S in V1 {s V1} mV: Sokolow-Lyon index {sokolow_lyon} mV{1}.",
        "Sokolow-Lyon index {sokolow_lyon} mV{1}, of S in V1 {s V1} mV and R in {0} {r {0}} mV.",
    ),
    "no sokolow": ("The Sokolow-Lyon index cannot be measured: {0}.",),
    "cornell": ("R in aVL {r aVL} mV and S in V3 {s V3} mV: Cornell index {cornell} mV{0}.",),
    "low": ("Low voltage in all {0} leads.",),
    "q": ("Deep Q waves in {0}.", "Q waves are deep in {0}."),
    "up": ("ST elevation at J in {0}.", "ST segments are elevated at J in {0}."),
    "down": ("ST depression lasting beyond J in {0}.", "ST segments are depressed at J and beyond in {0}."),
    "alone": ("ST deviation in {0}, in that lead alone.",),
    "level": (
        "ST isoelectric in {0}; the largest ST level at J is {j {1}} mV, in {1}.",
        "ST segments are isoelectric in {0}; at J the ST level is {j {1}} mV in {1}.",
    ),
    "no st": ("ST cannot be judged: {0}.",),
    "t down": ("T waves inverted in {0}.", "Negative T waves in {0}."),
    "t": ("T waves upright in {0}. T in {1} {t {1}} mV.", "Upright T waves in {0}; T wave in {1} {t {1}} mV."),
    "no t": ("T waves cannot be measured: {0}.",),
    "qt": (
        "QT interval {qt} ms, QTc {qtc_bazett} ms by Bazett and {qtc_fridericia} ms by Fridericia: {0}.",
        "QT {qt} ms, the corrected QT {qtc_bazett} ms (Bazett) or {qtc_fridericia} ms (Fridericia), {0}.",
    ),
    "no qt": ("The QT interval cannot be measured: {0}.",),
}  # fmt: skip
_NAMES = {"long": "prolonged", "long for men": "long for men", "between": "slightly wide"}
_AXES = {
    "normal": "normal axis",
    "left": "left axis deviation",
    "right": "right axis deviation",
    "far": "extreme axis deviation",
}
# What a statement of the report rests on, by words in it: the values that are then cited behind it.
_SUPPORT: tuple[tuple[str, str], ...] = (
    (r"brady|tachy|sinus|normal ecg", "heart rate {rate}/min"), (r"av[- ]?block|\bpr\b", "PR interval {pr} ms"),
    (r"bundle|intraventricular|\bqrs\b", "QRS duration {qrs} ms"), (r"axis|fascicular|hemiblock", "QRS axis {axis}°"),
    (r"left ventricular hypertrophy|\blvh\b|voltage", "Sokolow-Lyon index {sokolow_lyon} mV"),
    (r"\bqt", "QT interval {qt} ms"),
)  # fmt: skip
_STATEMENT = re.compile(r"[.;](?=\s|$)|\n")


class Cited(NamedTuple):
    """A value that a text cites: what `printed` calls it, its lead or the number of its beat, and how it is written."""

    kind: str
    of: str
    text: str


@dataclass(frozen=True)
class Told:
    """steps: what is said in each of STEPS. cited: all numbers in them but those of `conclusions`, which are the
    report's statements; left_out: those of the report that contradict the measurements, or bring numbers of their own.
    """

    steps: tuple[str, ...]
    cited: tuple[Cited, ...]
    conclusions: tuple[str, ...]
    left_out: tuple[str, ...]

    def text(self, thinking: bool = False) -> str:
        """The steps as paragraphs; with `thinking` as a thought, and behind it the conclusions as an answer."""
        named = enumerate(zip(STEPS, self.steps, strict=True), 1)
        parts = [f"**Step {number}: {name}.** {said}" for number, (name, said) in named]
        whole = "\n".join(parts)
        return f"<think>\n{whole}\n</think>\n<answer>{'; '.join(self.conclusions)}</answer>" if thinking else whole


def printed(found: Measurements, kind: str, of: str = "") -> str:
    """A measured value as a text has it: of `kind` a name of UNITS, of AMPLITUDES in a lead (mV; Q and S as sizes),
    "beat" by its number (s), "beats", "early", "pauses", "longest" or "seconds"."""
    rhythm = found.rhythm
    whole = {"beats": len(found.beats), "early": rhythm.early, "pauses": rhythm.pauses}
    if kind in whole:
        return str(whole[kind])
    if kind in UNITS and not of:
        value, digits = found.values[kind].value, 2 if UNITS[kind] == "mV" else 0
        assert value is not None, kind
    elif kind in ("longest", "seconds"):
        value, digits = (rhythm.longest, 1) if kind == "longest" else (found.seconds, 0)
    elif kind == "beat":
        value, digits = found.beats[int(of)], 2
    else:
        value, digits = found.leads[of].amplitudes[kind], 2
        value = abs(value) if kind in ("q", "s") else value
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def tell(found: Measurements, report: str, draw: np.random.Generator) -> Told:
    """Read a measured ECG in five steps. Its conclusion is the report's statements, each behind what it rests on, or
    without a report what the limits in common use say; `draw` chooses among the wordings."""
    teller = _Teller(found, draw)
    steps = [teller.quality(), teller.conduction(), teller.chambers(), teller.repolarisation()]
    evidence, kept, left_out = evidence_of(found), [], []
    for statement in filter(None, (part.strip(" .") for part in _STATEMENT.split(report))):
        held = ground(statement, evidence).held
        wrong = any(one.verdict == "wrong" or not one.claim.word for one in held)
        (left_out if wrong else kept).append(statement)
    conclusions = kept or teller.summary()
    steps.append("; ".join(teller.supported(one) for one in conclusions) + ".")
    return Told(tuple(steps), tuple(teller.cited), tuple(conclusions), tuple(left_out))


@dataclass
class _Teller:
    found: Measurements
    draw: np.random.Generator
    cited: list[Cited] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leads = findings.usable(self.found)

    def _say(self, name: str, *values: str) -> str:
        """One of the wordings, with what it cites."""
        told = _WORDINGS[name]
        text = told[int(self.draw.integers(len(told)))]
        for place, value in enumerate(values):
            text = text.replace(f"{{{place}}}", value)
        return self._filled(text)

    def _filled(self, text: str) -> str:
        return re.sub(r"\{(\w+)(?: (\w+))?\}", lambda match: self._cite(match[1], match[2] or ""), text)

    def _cite(self, kind: str, of: str = "") -> str:
        self.cited.append(Cited(kind, of, printed(self.found, kind, of)))
        return self.cited[-1].text

    def _value(self, name: str, say: str, *values: str, of: str = "") -> str:
        """A sentence with a value, or why there is none."""
        value = self.found.values[of or name]
        return self._say(say, *values) if value.value is not None else self._say(f"no {say}", value.reason)

    def _at(self, kind: str, leads: Sequence[str]) -> str:
        return ", ".join(f"{lead} ({self._cite(kind, lead)} mV)" for lead in leads)

    def quality(self) -> str:
        found, rhythm = self.found, self.found.rhythm
        rate = found.values["rate"].value
        faults = ", ".join(f"{name} ({lead.reason})" for name, lead in found.leads.items() if lead.reason)
        said = [self._say("faults", faults) if faults else self._say("usable")]
        said.append(self._value("rate", "rate", findings.pace(rate or 0)))
        if rate is None:
            return " ".join(said)
        early = rhythm.early + rhythm.ectopic_early
        kind = "but" if early and rhythm.regularity == "regular" else rhythm.regularity
        said.append(self._say("often" if findings.early_often(found) else kind))
        said += [self._say("early")] if rhythm.early else []
        other = [str(n) for n, kind_of in enumerate(found.kinds) if kind_of][:_MOST_BEATS]
        said += [self._say("ectopic", self._times(other))] if other else []
        said += [self._say("pauses")] if rhythm.pauses else []
        usual = [str(n) for n, kind_of in enumerate(found.kinds) if not kind_of][:_MOST_BEATS]
        if self.leads and usual:
            said.append(
                self._say("complexes", "II" if "II" in self.leads else next(iter(self.leads)), self._times(usual))
            )
        return " ".join(said)

    def _times(self, beats: Sequence[str]) -> str:
        *most, last = (self._cite("beat", number) for number in beats)
        return f"{', '.join(most)} and {last}" if most else last

    def conduction(self) -> str:
        values = {name: value.value or 0.0 for name, value in self.found.values.items()}
        said = [self._value("pr", "pr", _named(findings.of_pr(values["pr"])))]
        said.append(self._value("qrs", "qrs", _named(findings.of_qrs(values["qrs"]))))
        said += [self._say("second r")] if self._amplitude("V1", "r2") else []
        said.append(self._value("axis", "axis", _AXES[findings.of_axis(values["axis"])]))
        return " ".join(said)

    def _amplitude(self, lead: str, kind: str) -> float:
        return self.leads[lead].amplitudes[kind] if lead in self.leads else 0.0

    def chambers(self) -> str:
        found, said = self.found, [self._value("p", "p")]
        said += [self._say("p II")] if "II" in self.leads and "p" in found.waves else []
        larger = max(("V5", "V6"), key=lambda lead: self._amplitude(lead, "r"))
        for name, say, limit, leads in (
            ("sokolow_lyon", "sokolow", findings.SOKOLOW, (larger,)), ("cornell", "cornell", findings.CORNELL, ()),
        ):  # fmt: skip
            value = found.values[name].value
            high = ", high" if value is not None and round(value, 1) > limit else ""
            if value is not None or name == "sokolow_lyon":
                said.append(self._value(name, say, *leads, high))
        for chest, name in ((False, "limb"), (True, "chest")):
            said += [self._say("low", name)] if findings.low_voltage(found, chest) else []
        return " ".join(said)

    def repolarisation(self) -> str:
        found, why = self.found, findings.st_unjudged(self.found)
        up, down, turned = findings.elevated(found), findings.depressed(found), findings.inverted(found)
        said = []
        if self.leads and why:
            said.append(self._say("no st", why))
        if self.leads and "t" not in found.waves:
            said.append(self._say("no t", found.values["qt"].reason))
        for group, members in GROUPS.items():
            leads = [lead for lead in members if lead in self.leads]
            told = [self._say("q", self._at("q", deep))] if (deep := _of(findings.deep_q(found), leads)) else []
            told += self._st(leads, up, down) if not why else []
            told += self._t(leads, turned) if "t" in found.waves else []
            said += [f"{group} leads: {' '.join(told)}"] if told else []
        judged = findings.of_qtc(found)
        said.append(self._value("qt", "qt", _named(judged[0]) if judged else ""))
        return " ".join(said)

    def _st(self, leads: list[str], up: Sizes, down: Sizes) -> list[str]:
        """Elevation and depression where neighbours have it, too; lone deviations; and that the rest is level."""
        told = [self._say("up", self._at("j", raised))] if (raised := _of(up, leads)) else []
        told += [self._say("down", self._at("st80", lowered))] if (lowered := _of(down, leads)) else []
        rest = [lead for lead in leads if lead not in (*up, *down)]
        lone = [lead for lead in rest if self._deviates(lead)]
        told += [self._say("alone", self._at("j", [lead])) for lead in lone]
        if level := [lead for lead in rest if lead not in lone]:
            largest = max(level, key=lambda lead: abs(self._amplitude(lead, "j")))
            told.append(self._say("level", _listed(level), largest))
        return told

    def _deviates(self, lead: str) -> bool:
        sizes = [round(self._amplitude(lead, kind), 2) for kind in ("j", "st80")]
        return sizes[0] >= findings.limit_of_elevation(lead) or max(sizes) <= findings.DEPRESSED

    def _t(self, leads: list[str], turned: Sizes) -> list[str]:
        told = [self._say("t down", self._at("t", down))] if (down := _of(turned, leads)) else []
        if upright := [lead for lead in leads if self._amplitude(lead, "t") > 0]:
            told.append(self._say("t", _listed(upright), max(upright, key=lambda lead: self._amplitude(lead, "t"))))
        return told

    def supported(self, statement: str) -> str:
        """A statement with what it rests on, where that is measured."""
        lower = statement.lower()
        told = [text for words, text in _SUPPORT if re.search(words, lower) and self._known(text)]
        because = self._filled(", ".join(told))
        return f"{statement} ({because})" if because else statement

    def _known(self, text: str) -> bool:
        return all(self.found.values[name].value is not None for name in re.findall(r"\{(\w+)\}", text))

    def summary(self) -> list[str]:
        """What the limits say, without a report."""
        found, values = self.found, {name: value.value for name, value in self.found.values.items()}
        judged: list[tuple[str, Callable[[float], str], Mapping[str, str]]] = [
            ("rate", findings.pace, {"slow": "slow heart rate", "fast": "fast heart rate"}),
            ("pr", findings.of_pr, {"short": "short PR interval", "long": "prolonged PR interval"}),
            ("qrs", findings.of_qrs, {"between": "slightly wide QRS complex", "wide": "wide QRS complex"}),
            ("axis", findings.of_axis, {kind: name for kind, name in _AXES.items() if kind != "normal"}),
        ]
        said = ["irregular rhythm"] if found.rhythm.regularity in ("irregular", "fibrillation") else []
        for name, of, words in judged:
            value = values[name]
            said += [words[of(value)]] if value is not None and of(value) in words else []
        for name, what in (("ST elevation", findings.elevated), ("ST depression", findings.depressed),
                           ("T wave inversion", findings.inverted), ("deep Q waves", findings.deep_q)):  # fmt: skip
            judged_there = not (name.startswith("ST") and findings.st_unjudged(found)) and what(found)
            said += [f"{name} in {_listed(list(judged_there))}"] if judged_there else []
        return said or ["nothing beyond the usual limits" if values["rate"] is not None else "no conclusion"]


def _named(word: str) -> str:
    return _NAMES.get(word, word)


def _of(sizes: Sizes, leads: Sequence[str]) -> list[str]:
    return [lead for lead in leads if lead in sizes]


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
