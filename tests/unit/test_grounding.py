"""Grounding: measurable statements are found in texts, and held against what is measured of the ECG."""

from __future__ import annotations

import re
from functools import lru_cache
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_jax.ecg.beats.measurements import Measurements, measure
from elm_jax.ecg.beats.words import describe
from elm_jax.ecg.synthetic import synthesize
from elm_jax.scoring.claims import Claim, claims
from elm_jax.scoring.grounding import RULES, Evidence, Held, evidence_of, ground

INFERIOR = ("II", "III", "aVF")


@lru_cache(32)
def made(number: int) -> Measurements:
    return measure(synthesize((3, number), 250.0, 2500), 250.0)


def held_of(text: str, values: dict[str, Any]) -> list[Held]:
    """What a text says about an ECG of which these values are known; "st V2" is written st_V2."""
    known = {tuple(f"{name}_".split("_")[:2]): value for name, value in values.items()}
    evidence = Evidence({key: (value,) for key, value in known.items()}, {"pr": "no P wave of one look"}, frozenset())  # type: ignore[misc]
    return list(ground(text, evidence).held)


def held(text: str, **values: Any) -> dict[str, str]:
    """kind -> verdict."""
    return {one.claim.kind: one.verdict for one in held_of(text, values)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart rate is 72 bpm.", [("rate", (), 72, 72)]),
        ("Heart rate: 72", [("rate", (), 72, 72)]),
        ("A rate of seventy-two beats per minute.", [("rate", (), 72, 72)]),
        ("Ventricular rate between 60 and 80 bpm.", [("rate", (), 60, 80)]),
        ("heart rate 60–80/min", [("rate", (), 60, 80)]),
        ("PR 0.16 s, QRS 98 ms and QTc 430 ms.", [("pr", (), 160, 160), ("qrs", (), 98, 98), ("qtc", (), 430, 430)]),
        ("QT/QTc 380/420 ms.", [("qt", (), 380, 380), ("qtc", (), 420, 420)]),
        ("The PR interval of one hundred and sixty milliseconds", [("pr", (), 160, 160)]),
        ("QRS duration is less than 120 ms.", [("qrs", (), -inf, 120)]),
        ("The PR interval does not exceed 200 ms.", [("pr", (), -inf, 200)]),
        ("P wave 104 ms", [("p", (), 104, 104)]),
        ("RR interval 833 ms", [("rr", (), 833, 833)]),
        ("QRS axis of -46 degrees", [("axis", (), -46, -46)]),
        ("2 mm of ST elevation in leads V2 and V3.", [("st", ("V2",), 0.2, 0.2), ("st", ("V3",), 0.2, 0.2)]),
        ("one point five mm ST depression in lead I", [("st", ("I",), -0.15, -0.15)]),
        ("ST elevation at J in V2 (0.25 mV), V3 (300 µV).", [("st", ("V2",), 0.25, 0.25), ("st", ("V3",), 0.3, 0.3)]),
        ("ST depression at J + 80 ms in I (-0.07 mV)", [("st", ("I",), -0.07, -0.07)]),
        ("Inferior ST elevation of 1.5 mm", [("st", INFERIOR, 0.15, 0.15)]),
        ("R wave in V5 of 1.8 mV and S wave in V1 1.2 mV.", [("r", ("V5",), 1.8, 1.8), ("s", ("V1",), 1.2, 1.2)]),
        ("Sokolow-Lyon index 35 mm", [("sokolow", (), 3.5, 3.5)]),
        ("- **PR interval**: 160 ms (normal: 120-200 ms)", [("pr", (), 160, 160)]),
        ("PR 0,16 s", [("pr", (), 160, 160)]),
        ("The sum of the S wave in V1 and the R wave in V5 is 38 mm.", [("sokolow", (), 3.8, 3.8)]),
        ("P wave duration 110 ms, amplitude 0.15 mV in II", [("p_wave", ("II",), 0.15, 0.15), ("p", (), 110, 110)]),
        ("ST depression of 0.5 mm in V5 and 1 mm in V6.", [("st", ("V5",), -0.05, -0.05), ("st", ("V6",), -0.1, -0.1)]),
        ("complexes at 0.52, 1.31 and 2.10 s", [("beat", (), at, at) for at in (0.52, 1.31, 2.1)]),
    ],
)  # fmt: skip
def test_numbers_are_found_with_their_kind_lead_and_unit(text: str, expected: list[tuple[Any, ...]]) -> None:
    found = [(c.kind, c.leads, round(c.low, 4), round(c.high, 4)) for c in claims(text)]
    assert found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No ST elevation in V1-V2, but ST depression in I.",
         ["-st elevation V1", "-st elevation V2", "st depression I"]),
        ("There is no ST elevation or depression.", ["-st elevation ", "-st depression "]),
        ("Neither ST elevation nor T wave inversion is seen.", ["-st elevation ", "-t inverted "]),
        ("The ST segment is not elevated in aVL.", ["-st elevation aVL"]),
        ("ST elevation is absent.", ["-st elevation "]),
        ("ST segments are isoelectric.", ["st level "]),
        ("T waves are inverted in the inferior leads.", ["t inverted II III aVF"]),
        ("a narrow QRS, prolonged PR interval", ["qrs narrow ", "pr long "]),
        ("The QT interval is prolonged.", ["qtc long "]),
        ("Sinus bradycardia with first degree AV block", ["sinus present ", "rate slow ", "pr long "]),
        ("Left axis deviation", ["axis left "]),
        ("The rhythm is irregularly irregular.", ["-regular irregular "]),
        ("No evidence of atrial fibrillation.", ["-fibrillation present "]),
        ("Premature ventricular complexes", ["ectopic present "]),
        ("Pathological Q waves in II, III", ["q_deep deep II", "q_deep deep III"]),
        ("There are no Q waves in the inferior leads.", ["-q_deep deep II III aVF"]),
        ("The QRS complexes are narrow.", ["qrs narrow "]),
        ("QTc is prolonged (normal < 450 ms)", ["qtc long "]),
        ("I see a normal sinus rhythm.", ["sinus present "]),
    ],
)  # fmt: skip
def test_words_and_their_denials_are_found(text: str, expected: list[str]) -> None:
    found = [f"{'-' * c.negated}{c.kind} {c.word} {' '.join(c.leads)}" for c in claims(text)]
    assert found == expected


@pytest.mark.parametrize(
    "text",
    [
        "The normal range is 120 to 200 ms for PR.", "PR (normal 120-200 ms)", "Speed 25 mm/s, 10 mm/mV, 12 leads.",
        "The patient is 72 years old.", "A 10 second recording at 500 Hz.", "QRS complexes of normal morphology", "",
    ],
)  # fmt: skip
def test_what_is_no_measurement_is_no_claim(text: str) -> None:
    assert not [claim for claim in claims(text) if not claim.word or claim.kind == "qrs"]


WRITTEN = {
    "rate": (
        "The heart rate is {:.0f} bpm.",
        "Rate of {:.0f} beats per minute",
        "It beats at {:.0f}/min.",
        "HR {:.0f}",
    ),
    "pr": ("The PR interval measures {:.0f} ms.", "a {:.0f} ms PR interval", "PQ interval: {:.0f}"),
    "qrs": ("QRS {:.0f} ms", "with a {:.0f} ms QRS", "The QRS complex lasts {:.0f} milliseconds."),
    "qt": ("The QT interval is {:.0f} ms", "QT duration {:.0f} msec"),
    "qtc": ("QTc of {:.0f} ms", "the corrected QT interval is about {:.0f} ms"),
    "axis": ("The QRS axis is {:.0f}°.", "axis {:.0f} degrees", "mean electrical axis of {:.0f} deg"),
    "st": ("ST elevation of {:.2f} mV in V4", "In V4 the ST segment shows {:.2f} mV elevation."),
    "r": ("The R wave in V4 is {:.2f} mV.", "R in V4 {:.2f} mV"),
}
BOUNDS = {"rate": (30, 180), "pr": (90, 300), "qrs": (60, 180), "qt": (280, 520), "qtc": (320, 560), "axis": (-89, 179)}


@settings(max_examples=80)
@given(st.data())
def test_what_is_measured_is_right_and_a_planted_number_is_wrong(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(WRITTEN)))
    text, rule = data.draw(st.sampled_from(WRITTEN[kind])), RULES[kind]
    low, high = BOUNDS.get(kind, (0.1, 0.6))
    value = data.draw(st.floats(low, high))
    key = f"{kind}_V4" if kind in ("st", "r") else kind
    assert held(text.format(value), **{key: value}) == {kind: "right"}, text.format(value)
    beyond = rule.tolerance * data.draw(st.floats(1.1, 3)) * data.draw(st.sampled_from([-1, 1]))
    planted = round(value + beyond, 2 if kind in ("st", "r") else 0)  # as it is written
    least = {"axis": -180, "st": 0, "r": 0}.get(kind, 20)  # what is less is no such value, and no claim
    if abs(planted - value) > rule.tolerance and planted >= least:
        assert held(text.format(planted), **{key: value}) == {kind: "wrong"}, text.format(planted)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 11), st.integers(0, 7), st.sampled_from([-1, 1]))
def test_measurements_in_words_are_grounded_and_one_wrong_number_is_not(number: int, place: int, sign: int) -> None:
    found = made(number)
    evidence, text = evidence_of(found), describe(found)
    whole = ground(text, evidence)
    assert {one.verdict for one in whole.held} == {"right"} and whole.cited == whole.facts and whole.f1 == 1.0
    kinds = BOUNDS.keys() - {"qtc"}  # which has a value by each of two formulas
    asked = [one for one in whole.held if one.claim.low == one.claim.high and one.claim.kind in kinds]
    claim = asked[place % len(asked)].claim
    planted = claim.low + sign * 3 * RULES[claim.kind].tolerance
    wrong = ground(re.sub(rf" {claim.low:.0f}\b", f" {planted:.0f}", text), evidence)
    assert any(one.verdict == "wrong" and one.claim.kind == claim.kind for one in wrong.held)
    assert wrong.f1 < 1.0


PIECES = (
    "no not without ST T QRS PR elevation depression inverted axis in V1 V2-V4 I II and or , . ( ) 72 0.2 mV ms bpm"
)
PIECES += " - to between less than normal prolonged leads lead rate rhythm irregular beats at 1.2 s ° one hundred point"


@given(st.lists(st.sampled_from(PIECES.split(" "))).map(" ".join) | st.text())
def test_any_text_is_read(text: str) -> None:
    evidence = evidence_of(made(0))
    found = ground(text, evidence)
    right, both, cited, facts = found.counts()
    assert right <= both and cited <= facts and 0.0 <= found.f1 <= 1.0


def test_verdicts() -> None:
    assert held("PR interval 160 ms") == {"pr": "unmeasured"}
    assert held("The rate is between 20 and 200 bpm.", rate=72.0) == {"rate": "vague"}
    assert held("QRS below 120 ms", qrs=96.0) == {"qrs": "right"}
    assert held("QRS below 120 ms", qrs=150.0) == {"qrs": "wrong"}
    assert held("No ST elevation in V2", st_V2=0.4) == {"st": "wrong"}
    assert held("No ST elevation in V2", st_V2=0.05) == {"st": "right"}
    assert held("left axis deviation", axis=60.0) == {"axis": "wrong"}
    assert held("ST elevation in the inferior leads", st_II=0.0, st_III=0.15) == {"st": "right"}
    assert Claim("rate", low=1.0, high=1.0, said="a") == Claim("rate", low=1.0, high=1.0, said="b")


TRUE = {"rate": 100.0, "pr": 160.0, "qrs": 98.0, "qtc": 430.0, "st_V2": 0.1, "st_V5": 0.02}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart rate is not 72/min.", {"rate": "vague"}), ("The heart rate is not 102/min.", {"rate": "wrong"}),
        ("The PR is not 900 ms.", {"pr": "vague"}), ("The PR is not between 120 and 200 ms.", {"pr": "wrong"}),
        ("QRS is not above 5000 ms", {"qrs": "vague"}), ("QRS is not above 120 ms", {"qrs": "right"}),
        ("QRS is not above 70 ms", {"qrs": "wrong"}), ("QRS is not below 90 ms", {"qrs": "right"}),
        ("QRS is not below 140 ms", {"qrs": "wrong"}), ("The rate is no higher than 110/min", {"rate": "right"}),
        ("The QTc is not prolonged at 430 ms.", {"qtc": "right"}),
        ("The QTc is not prolonged at 330 ms.", {"qtc": "wrong"}),
        ("A QTc of 430 ms is not prolonged.", {"qtc": "right"}), ("A PR of 900 ms is not seen.", {"pr": "vague"}),
        ("No prolongation of the PR interval at 160 ms.", {"pr": "right"}),
        ("No prolongation of the PR interval at 260 ms.", {"pr": "wrong"}),
        ("The QTc is not prolonged above 450 ms.", {"qtc": "right"}),
        ("The QTc is not prolonged at less than 450 ms.", {"qtc": "right"}),
        ("No atrial fibrillation at a rate of 140/min.", {"rate": "wrong"}),
        ("No acute ischaemia at a rate of 100/min.", {"rate": "right"}),
        ("Not tachycardic at 60 bpm", {"rate": "wrong"}),
        ("No ST elevation above 0.15 mV in V2.", {"st": "right"}),
        ("No ST elevation above 0.02 mV in V2.", {"st": "wrong"}), ("No 1 mm ST elevation in V2.", {"st": "wrong"}),
        ("No 3 mm ST elevation in V2.", {"st": "vague"}), ("ST depression of 2 mm in V2 is not seen.", {"st": "vague"}),
    ],
)  # fmt: skip
def test_a_denied_number_is_no_evidence(text: str, expected: dict[str, str]) -> None:
    assert {one.claim.kind: one.verdict for one in held_of(text, TRUE) if not one.claim.word} == expected


def test_a_number_behind_a_denied_word_is_held_beside_it() -> None:
    evidence = Evidence({("st", "V2"): (0.0,), ("rate", ""): (72.0,)}, {}, frozenset({("st", ""), ("rate", "")}))
    told = [(one.claim.word, one.verdict) for one in ground("No ST elevation in V2 (0.30 mV).", evidence).held]
    assert sorted(told) == [("", "wrong"), ("elevation", "right")]
    assert ground("No ST depression in V2 (0.02 mV).", evidence).counts()[:2] == (2, 2)
    for text in ("The rate is not 50/min.", "The rate is not above 500/min.", "The rate is not 72/min."):
        assert not ground(text, evidence).cited and ground(text, evidence).f1 == 0.0


def test_nothing_measured_is_nothing_to_cite() -> None:
    flat = evidence_of(measure(synthesize((3, 0), 250.0, 2500) * 0, 250.0))
    assert not flat.facts and ground("Heart rate 72/min, sinus rhythm.", flat).f1 == 0.0
    assert {one.verdict for one in ground("Heart rate 72/min, ST elevation in V2.", flat).held} == {"unmeasured"}
