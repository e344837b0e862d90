"""What an answer says of an ECG, held against what is measured of it: which of its statements are right, and which of
the findings that a full answer has it cites.

A number is right within its kind's tolerance, which is that of the measurements themselves (docs/measurements.md); a
word ("prolonged") within a smaller one of the limits of `ecg.beats.findings`. What could not be measured is neither
right nor wrong, and so is a range so wide that it says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple

import numpy as np

from elm_jax.ecg.beats import findings
from elm_jax.ecg.beats.measurements import Measurements
from elm_jax.scoring.claims import PER_LEAD, Claim, claims
from elm_jax.scoring.statistics import Patients, ci95

VERDICTS = ("right", "wrong", "vague", "unmeasured")
LISTED = 50  # contradictions of a kind that are listed
Key = tuple[str, str]  # a kind, and the lead or ""


class Rule(NamedTuple):
    """tolerance: of numbers; border: by how much a word may be beyond its limit; widest: a range that still says
    something; group: how the kind is reported, and what of facts it counts for."""

    group: str
    tolerance: float
    border: float
    widest: float
    unit: str


RULES = {
    "rate": Rule("rate", 5, 3, 20, "/min"), "rr": Rule("rate", 50, 0, 200, " ms"),
    "beat": Rule("beat", 0.1, 0, 0.5, " s"), "p": Rule("p", 25, 0, 60, " ms"),
    "pr": Rule("pr", 25, 10, 60, " ms"), "qrs": Rule("qrs", 15, 5, 40, " ms"),
    "qt": Rule("qt", 25, 0, 80, " ms"), "qtc": Rule("qtc", 30, 10, 80, " ms"), "axis": Rule("axis", 15, 5, 60, "°"),
    "p_axis": Rule("axis", 30, 0, 90, "°"), "t_axis": Rule("axis", 30, 0, 90, "°"),
    "st": Rule("st", 0.05, 0.03, 0.2, " mV"), "t": Rule("t", 0.1, 0.05, 0.4, " mV"),
    **{kind: Rule("amplitude", 0.1, 0, 0.4, " mV") for kind in ("p_wave", "q", "s")},
    "r": Rule("amplitude", 0.15, 0, 0.5, " mV"), "q_deep": Rule("amplitude", 0, 0, 0, ""),
    "sokolow": Rule("amplitude", 0.2, 0.1, 1, " mV"), "cornell": Rule("amplitude", 0.2, 0.1, 1, " mV"),
    **{kind: Rule("rhythm", 0, 0, 0, "") for kind in ("regular", "fibrillation", "sinus", "early", "ectopic")},
}  # fmt: skip
_WORDS: dict[tuple[str, str], tuple[float, float]] = {
    ("rate", "slow"): (-inf, findings.RATES[0]), ("rate", "normal"): findings.RATES,
    ("rate", "fast"): (findings.RATES[1], inf), ("pr", "short"): (-inf, findings.PR[0]), ("pr", "normal"): findings.PR,
    ("pr", "long"): (findings.PR[1], inf), ("qrs", "narrow"): (-inf, findings.QRS[1]),
    ("qrs", "wide"): (findings.QRS[0], inf), ("qtc", "short"): (-inf, findings.QTC[0]),
    ("qtc", "normal"): (findings.QTC[0], findings.QTC[2]), ("qtc", "long"): (findings.QTC[1], inf),
    ("axis", "normal"): findings.AXES, ("axis", "left"): (-90, findings.AXES[0]),
    ("axis", "right"): (findings.AXES[1], 180), ("axis", "far"): (-180, -90), ("t", "upright"): (0, inf),
    ("t", "inverted"): (-inf, findings.T_DOWN), ("st", "depression"): (-inf, findings.DEPRESSED),
}  # fmt: skip
_YES, _NO, _EITHER = (1.0,), (0.0,), (0.0, 1.0)


@dataclass(frozen=True)
class Evidence:
    """What is measured of an ECG, as answers are held against it.

    values: by kind and lead, those of which any may be meant. reasons: of kinds without a value. facts: what a full
    answer cites.
    """

    values: Mapping[Key, tuple[float, ...]]
    reasons: Mapping[str, str]
    facts: frozenset[Key]


@dataclass(frozen=True)
class Held:
    """A claim; right, wrong, vague or unmeasured; what is measured in its place."""

    claim: Claim
    verdict: str
    measured: str


@dataclass(frozen=True)
class Grounded:
    """An answer's claims, and which of the facts it cites."""

    held: tuple[Held, ...]
    cited: frozenset[Key]
    facts: frozenset[Key]

    def counts(self, group: str = "") -> tuple[int, int, int, int]:
        """Right claims, right and wrong ones, facts that are cited, all facts; of a group, or all."""
        told = Counter(held.verdict for held in self.held if group in ("", RULES[held.claim.kind].group))
        facts = {fact for fact in self.facts if group in ("", fact[0])}
        return told["right"], told["right"] + told["wrong"], len(facts & self.cited), len(facts)

    @property
    def f1(self) -> float:
        """Of precision and recall of evidence; 0 where nothing is right."""
        right, held, cited, facts = self.counts()
        precision, recall = right / max(held, 1), cited / max(facts, 1)
        return 2 * precision * recall / (precision + recall) if right and cited else 0.0


def evidence_of(found: Measurements) -> Evidence:
    """What answers about a measured ECG are held against."""
    values: dict[Key, tuple[float, ...]] = {}
    alone = {name: value.value for name, value in found.values.items()}
    several = {"sokolow": ("sokolow_lyon",), "qtc": ("qtc_bazett", "qtc_fridericia")}
    for kind in ("rate", "p", "pr", "qrs", "qt", "qtc", "axis", "p_axis", "t_axis", "sokolow", "cornell"):
        told = tuple(value for name in several.get(kind, (kind,)) if (value := alone[name]) is not None)
        values |= {(kind, ""): told} if told else {}
    if alone["rate"]:
        values["rr", ""] = (60000 / alone["rate"],)
    if found.beats:
        values["beat", ""] = found.beats
    reasons = {kind: found.values[several.get(kind, (kind,))[0]].reason for kind in RULES if kind in found.values}
    reasons |= {"st": findings.st_unjudged(found), "t": found.values["qt"].reason}
    values |= _rhythm(found) | _of_leads(found, reasons)
    facts = {(kind, "") for kind in ("rate", "pr", "qrs", "qt", "qtc", "axis") if (kind, "") in values}
    facts |= {("rhythm", "")} if ("regular", "") in values else set()
    for group, there, measured in (
        ("st", {*findings.elevated(found), *findings.depressed(found)}, not reasons["st"]),
        ("t", {*findings.inverted(found)}, "t" in found.waves),
    ):
        facts |= {(group, lead) for lead in there or ("",)} if measured and findings.usable(found) else set()
    return Evidence(values, {kind: why for kind, why in reasons.items() if why}, frozenset(facts))


def share(sums: np.ndarray) -> np.ndarray:
    """Sums (..., 2) -> the first by the second, (...); 0 where there is nothing: who says nothing cites nothing."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def _rhythm(found: Measurements) -> dict[Key, tuple[float, ...]]:
    """What is judged of the rhythm: yes, no, or either where one may say both."""
    rhythm, regularity = found.rhythm, found.rhythm.regularity
    told: dict[str, tuple[float, ...]] = {}
    early, p_waves = rhythm.early + rhythm.ectopic > 0, found.values["pr"].value is not None
    if regularity == "regular":
        told["regular"] = _EITHER if early or rhythm.pauses else _YES
    elif regularity != "unknown":
        told["regular"] = _EITHER if regularity == "varying" else _NO
    if regularity in ("regular", "varying") and p_waves:
        told |= {"sinus": _YES, "fibrillation": _NO}
    elif regularity == "fibrillation":
        told |= {"sinus": _NO, "fibrillation": _YES}
    if found.beats:
        told |= {"ectopic": _YES if rhythm.ectopic else _NO}
        told |= {"early": _YES if early else _NO} if regularity != "fibrillation" else {}
    return {(kind, ""): value for kind, value in told.items()}


def _of_leads(found: Measurements, reasons: Mapping[str, str]) -> dict[Key, tuple[float, ...]]:
    values: dict[Key, tuple[float, ...]] = {}
    deep = findings.deep_q(found)
    leads = findings.usable(found) if found.beat is not None else {}
    for name, lead in leads.items():
        a = lead.amplitudes
        told: dict[str, tuple[float, ...]] = {"p_wave": (a["p"],), "q": (-a["q"],), "s": (-a["s"],)}
        told["r"] = (a["r"], a["r2"]) if a["r2"] else (a["r"],)
        told |= {"st": (a["j"], a["st60"], a["st80"])} if not reasons["st"] else {}
        told |= {"t": (a["t"],)} if "t" in found.waves else {}
        told |= {"q_deep": _YES if name in deep else _NO}
        values |= {(kind, name): value for kind, value in told.items()}
    # Where no lead is named: whether there is such in any, and either where it is in none that counts.
    sets: list[tuple[str, str, Callable[[Measurements], Mapping[str, float]]]] = [
        ("st", "elevation", findings.elevated), ("st", "depression", findings.depressed),
        ("t", "inverted", findings.inverted),
    ]  # fmt: skip
    for kind, word, of in sets:
        if leads and not reasons[kind]:
            known = [name for name in leads if (kind, name) in values]
            claimed = Claim(kind, tuple(known), word=word)
            some = any(_in(_span(claimed, name), values[kind, name], 0, any) for name in known)
            values[f"{kind} {word}", ""] = _YES if of(found) else _EITHER if some else _NO
    return values


def ground(text: str, evidence: Evidence) -> Grounded:
    """Hold what a text says against the evidence."""
    held, cited = [], set[Key]()
    for claim in claims(text):
        verdict, leads, measured = _verdict(claim, evidence)
        held.append(Held(claim, verdict, measured))
        if verdict == "right":
            group = RULES[claim.kind].group
            cited |= {(group, ""), *((group, lead) for lead in leads)}
    return Grounded(tuple(held), frozenset(cited & evidence.facts), evidence.facts)


def _verdict(claim: Claim, evidence: Evidence) -> tuple[str, tuple[str, ...], str]:
    """Of a claim: what it is, the leads in which it holds, what is measured."""
    if claim.negated and not claim.word:
        return _denied(claim, evidence), (), _measured(claim, evidence)
    parts = [claim]
    if claim.kind == "st" and claim.word in ("level", "deviation"):  # neither, or one of both
        no = claim.negated != (claim.word == "level")
        parts = [Claim("st", claim.leads, word=word, negated=no) for word in ("elevation", "depression")]
    told = [_holds(part, evidence) for part in parts]
    if any(one is None for one in told):
        why = evidence.reasons.get(claim.kind, "not measured")
        return "unmeasured", (), why
    right = [bool(one) for one in told]
    leads = tuple(lead for one in told if one for lead in one)
    true = any(right) if len(parts) > 1 and not parts[0].negated else all(right)
    verdict = "wrong" if not true else "vague" if _vague(claim, evidence) else "right"
    return verdict, () if claim.negated else leads, _measured(claim, evidence)


def _denied(claim: Claim, evidence: Evidence) -> str:
    """The verdict of a number that is denied: "not above x" is "at most x", in all leads. Not to be a number, or
    between two, is wrong where a value is so, and else says next to nothing."""
    bound = inf in (-claim.low, claim.high)
    holds = _holds(claim if bound else replace(claim, negated=False), evidence)
    if holds is None:
        return "unmeasured"
    if not bound:
        return "wrong" if holds else "vague"
    low, high = (-inf, claim.low) if claim.high == inf else (claim.high, inf)
    return "wrong" if not holds else "vague" if _vague(replace(claim, low=low, high=high), evidence) else "right"


def _holds(claim: Claim, evidence: Evidence) -> tuple[str, ...] | None:
    """The leads, or "", in which a claim holds, () where it does not; None where nothing of it was measured."""
    rule, leads, kind = RULES[claim.kind], claim.leads or ("",), claim.kind
    if _of_any(claim):
        kind = f"{kind} {'inverted' if kind == 't' else claim.word}"
    elif kind in PER_LEAD and not claim.leads:
        leads = tuple(lead for one, lead in evidence.values if one == kind)
    values = {lead: evidence.values[kind, lead] for lead in leads if (kind, lead) in evidence.values}
    if not values:
        return None
    slack = rule.tolerance if not claim.word else 0.0 if _of_any(claim) else rule.border
    if claim.negated:  # what all values say is not so
        there = any(_in(_span(claim, lead), those, -slack, all) for lead, those in values.items())
        return () if there else tuple(values)
    return tuple(lead for lead, those in values.items() if _in(_span(claim, lead), those, slack, any))


def _of_any(claim: Claim) -> bool:
    """Whether a word is of a lead, and none is named."""
    return claim.kind in PER_LEAD and bool(claim.word) and not claim.leads


def _span(claim: Claim, lead: str) -> tuple[float, float]:
    """The values of which a claim says that they are so, in a lead."""
    if not claim.word:
        return claim.low, claim.high
    if _of_any(claim):
        return (0.0, 0.0) if claim.word == "upright" else (1.0, 1.0)
    if (claim.kind, claim.word) == ("st", "elevation"):
        return findings.limit_of_elevation(lead), inf
    return _WORDS.get((claim.kind, claim.word), (1.0, 1.0))


def _in(
    span: tuple[float, float], values: Sequence[float], slack: float, how: Callable[[Iterable[bool]], bool]
) -> bool:
    return how(span[0] - slack <= value <= span[1] + slack for value in values)


def _vague(claim: Claim, evidence: Evidence) -> bool:
    """Whether a range or a bound is so far that it says next to nothing."""
    if claim.word or claim.low == claim.high:
        return False
    values = [v for lead in claim.leads or ("",) for v in evidence.values.get((claim.kind, lead), ())]
    low = claim.low if claim.low > -inf else min(values, default=0.0)
    high = claim.high if claim.high < inf else max(values, default=0.0)
    return high - low > RULES[claim.kind].widest


def _measured(claim: Claim, evidence: Evidence) -> str:
    """What is measured of what a claim is about, to be read."""
    unit, shown = RULES[claim.kind].unit, []
    values = {lead: evidence.values.get((claim.kind, lead), ()) for lead in claim.leads or ("",)}
    if not unit:
        told = next(iter(values.values()))
        return "yes" if told == _YES else "no" if told == _NO else "either"
    digits = 2 if unit in (" mV", " s") else 0
    for lead, those in values.items():
        told = " or ".join(dict.fromkeys(f"{value:.{digits}f}" for value in sorted(those)))
        shown += [f"{lead} {told}{unit}".strip()] if told and claim.kind != "beat" else []
    return ", ".join(shown) or "none"


def by_kind(answers: Mapping[str, Grounded], patients: Patients) -> dict[str, Any]:
    """Of the answers by their ids, about these patients: how many "claims"; "kinds": by group how many are right,
    wrong, vague or unmeasured, how many "facts" are "cited", and "precision" and "recall" as {"value", "ci95"} where
    there are such; "contradictions": by group {"id", "said", "measured"}, of each the first LISTED."""
    kinds: dict[str, Any] = {}
    wrong: dict[str, list[dict[str, str]]] = {}
    for group in dict.fromkeys(rule.group for rule in RULES.values()):
        rows = np.array([grounded.counts(group) for grounded in answers.values()], float).reshape(-1, 4)
        held = [(name, one) for name, g in answers.items() for one in g.held if RULES[one.claim.kind].group == group]
        if not held and not rows[:, 3].any():
            continue
        verdicts, resampled = Counter(one.verdict for _, one in held), patients.resampled(rows)
        kinds[group] = {verdict: verdicts[verdict] for verdict in VERDICTS}
        kinds[group] |= {"cited": int(rows[:, 2].sum()), "facts": int(rows[:, 3].sum())}
        for name, first in (("precision", 0), ("recall", 2)):
            if rows[:, first + 1].any():
                columns = slice(first, first + 2)
                value, interval = float(share(rows.sum(0)[columns])), ci95(share(resampled[:, columns]))
                kinds[group][name] = {"value": value, "ci95": interval}
        against = [(name, one) for name, one in held if one.verdict == "wrong"][:LISTED]
        told = [{"id": name, "said": one.claim.said, "measured": one.measured} for name, one in against]
        wrong |= {group: told} if told else {}
    return {"claims": sum(len(grounded.held) for grounded in answers.values()), "kinds": kinds, "contradictions": wrong}
