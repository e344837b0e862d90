"""Rules of guidelines, held against planted measurements: to either side of each limit."""

from __future__ import annotations

from typing import Any

import pytest

from elm_jax.ecg.beats.amplitudes import AMPLITUDES, Lead
from elm_jax.ecg.beats.measurements import UNITS, Measurements, Value
from elm_jax.ecg.beats.rhythm import Rhythm
from elm_jax.ecg.guidelines import CHEST, LIMBS, RULES, Person, said
from elm_jax.ecg.names import LEADS

BY_NAME = {rule.finding: rule for rule in RULES}
MAN, WOMAN, BOY = Person("male", 60.0), Person("female", 60.0), Person("male", 30.0)
USUAL = {"rate": 72, "p": 100, "pr": 160, "qrs": 90, "qt": 400, "qtc_bazett": 430, "axis": 40, "sokolow_lyon": 2.0,
         "cornell": 1.2}  # fmt: skip
# V1 negative, the others positive, without Q waves.
WAVES = {lead: {"r": 0.2, "s": -0.9} if lead in ("V1", "V2", "aVR") else {"r": 0.9, "s": -0.05} for lead in LEADS}


def planted(values: dict[str, Any] | None = None, waves: dict[str, Any] | None = None, **more: Any) -> Measurements:
    """An ECG as usual but for these values, and these waves of leads; None takes a value or a lead away."""
    told: dict[str, Any] = {**USUAL, **(values or {})}
    found = {n: Value(told.get(n), 1.0, "" if told.get(n) is not None else "planted") for n in UNITS}
    leads = {}
    for lead in LEADS:
        own = (waves or {}).get(lead, {})
        sizes = {**dict.fromkeys(AMPLITUDES, 0.0), "t": 0.2, **WAVES[lead], **(own or {})}
        leads[lead] = Lead(reason="planted") if own is None else Lead(sizes)
    return Measurements(10.0, found, Rhythm(more.get("rhythm", "regular")), leads)


def several(leads: Any, **sizes: float) -> dict[str, dict[str, float]]:
    return {lead: sizes for lead in leads}


LEFT = {**several(("I", "V5", "V6"), q=0.0, r=1.2, s=0.0), "V1": {"r": 0.1, "s": -1.4}}
RIGHT = {"V1": {"r": 0.2, "s": -0.5, "r2": 0.6}, **several(("I", "V6"), s=-0.4)}
FASCICLE = {"aVL": {"q": -0.1, "r": 0.8, "s": 0.0}, **several(("II", "III", "aVF"), r=0.2, s=-0.8)}
# finding, what is planted so that it is there, and so that it is not, though nearly.
PLANTED = [
    ("bradycardia", {"values": {"rate": 59}}, {"values": {"rate": 59.6}}),
    ("tachycardia", {"values": {"rate": 101}}, {"values": {"rate": 100.4}}),
    ("atrial fibrillation", {"rhythm": "fibrillation"}, {"rhythm": "irregular"}),
    ("a short PR interval", {"values": {"pr": 119}}, {"values": {"pr": 120}}),
    ("first-degree AV block", {"values": {"pr": 201}}, {"values": {"pr": 200}}),
    ("a prolonged P wave", {"values": {"p": 121}}, {"values": {"p": 120}}),
    ("right atrial abnormality", {"waves": {"II": {"p": 0.26}}}, {"waves": {"II": {"p": 0.25}}}),
    ("a wide QRS complex", {"values": {"qrs": 120}}, {"values": {"qrs": 119}}),
    ("complete left bundle branch block", {"values": {"qrs": 140}, "waves": LEFT},
     {"values": {"qrs": 119}, "waves": LEFT}),
    ("complete left bundle branch block", {"values": {"qrs": 120}, "waves": LEFT},
     {"values": {"qrs": 140}, "waves": {**LEFT, "V6": {"q": -0.1, "r": 1.2}}}),
    ("complete right bundle branch block", {"values": {"qrs": 130}, "waves": RIGHT},
     {"values": {"qrs": 130}, "waves": {**RIGHT, "V6": {"s": -0.05}}}),
    ("left anterior fascicular block", {"values": {"axis": -50}, "waves": FASCICLE},
     {"values": {"axis": -44}, "waves": FASCICLE}),
    ("a normal QRS axis", {"values": {"axis": -30}}, {"values": {"axis": -31}}),
    ("left axis deviation", {"values": {"axis": -31}}, {"values": {"axis": -91}}),
    ("right axis deviation", {"values": {"axis": 91}}, {"values": {"axis": 90}}),
    ("left ventricular hypertrophy by the Sokolow-Lyon index", {"values": {"sokolow_lyon": 3.5}},
     {"values": {"sokolow_lyon": 3.49}}),
    ("low voltage in the limb leads", {"waves": several(LIMBS, r=0.3, s=-0.15)},
     {"waves": {**several(LIMBS, r=0.3, s=-0.15), "III": {"r": 0.3, "s": -0.2}}}),
    ("low voltage in the chest leads", {"waves": several(CHEST, r=0.5, s=-0.49)},
     {"waves": several(CHEST, r=0.5, s=-0.5)}),
    ("ST elevation", {"waves": several(("II", "aVF"), j=0.1)}, {"waves": several(("II", "III"), j=0.1)}),
    ("ST depression", {"waves": several(("V4", "V5"), j=-0.05, st80=-0.06)},
     {"waves": several(("V4", "V5"), j=-0.04, st80=-0.2)}),
    ("T wave inversion", {"waves": several(("V5", "V6"), t=-0.11)}, {"waves": several(("V5", "V6"), t=-0.1)}),
]  # fmt: skip


@pytest.mark.parametrize(("finding", "there", "absent"), PLANTED, ids=[f"{n}" for n, _ in enumerate(PLANTED)])
def test_a_finding_is_told_from_its_limit_on(finding: str, there: dict[str, Any], absent: dict[str, Any]) -> None:
    rule = BY_NAME[finding]
    assert rule.of(planted(**there), MAN) is True and rule.of(planted(**absent), MAN) is False
    assert rule.shows(planted(**there)) and rule.shows(planted(**absent))
    assert rule.of(planted(), MAN) is (finding == "a normal QRS axis"), "an ECG as usual has none"


def test_every_rule_has_a_source_and_is_planted() -> None:
    by_person = {"a prolonged QTc interval", "left ventricular hypertrophy by the Cornell voltage"}
    assert {name for name, *_ in PLANTED} | by_person == BY_NAME.keys() and len(BY_NAME) == len(RULES)
    assert all(rule.source and any(letter.isdigit() for letter in rule.source) for rule in RULES)
    bare = planted(dict.fromkeys(USUAL), dict.fromkeys(LEADS), rhythm="unknown")
    assert [rule.of(bare, MAN) for rule in RULES] == [None] * len(RULES), "nothing is told of what is not measured"


def test_limits_depend_on_sex_and_age_and_are_not_guessed() -> None:
    def told(finding: str, found: Measurements) -> list[bool | None]:
        return [BY_NAME[finding].of(found, person) for person in (MAN, WOMAN, BOY, Person())]

    qtc = "a prolonged QTc interval"
    assert told(qtc, planted({"qtc_bazett": 455})) == [True, False, True, None]
    assert told(qtc, planted({"qtc_bazett": 461})) == [True] * 4
    assert told(qtc, planted({"qtc_bazett": 450})) == [False] * 4
    cornell = "left ventricular hypertrophy by the Cornell voltage"
    assert told(cornell, planted({"cornell": 2.4})) == [False, True, False, None]
    for level, expected in ((0.25, [True] * 4), (0.2, [True, True, False, None]), (0.15, [False, True, False, None])):
        assert told("ST elevation", planted(waves=several(("V2", "V3"), j=level))) == expected, level
    assert told("ST elevation", planted(waves=several(("V2", "V3"), j=0.14))) == [False] * 4


def test_st_is_not_judged_beside_a_wide_complex_or_hypertrophy_nor_where_a_lead_might_decide() -> None:
    raised, rule = several(("II", "aVF"), j=0.2), BY_NAME["ST elevation"]
    assert rule.of(planted({"qrs": 120}, raised), MAN) is None
    assert rule.of(planted({"sokolow_lyon": 3.6}, raised), MAN) is None
    one = {"II": {"j": 0.2}}
    assert rule.of(planted(waves=one), MAN) is False and rule.of(planted(waves={**one, "aVF": None}), MAN) is None
    assert rule.of(planted(waves={**raised, "V6": None}), MAN) is True, "two leads are enough"


def test_what_one_value_rules_out_needs_no_other() -> None:
    found, rule = planted({"qrs": None, "axis": 40}, dict.fromkeys(LEADS)), BY_NAME["left anterior fascicular block"]
    assert rule.of(found, MAN) is False and rule.shows(found) == "QRS axis 40°"


def test_numbers_are_told_as_they_are_judged() -> None:
    assert said(planted({"pr": 200.4}), "pr") == "PR interval 200 ms"
    assert said(planted({"sokolow_lyon": 3.499}), "sokolow_lyon").endswith("3.5 mV")
    assert "II: ST at J 0.20 mV" in BY_NAME["ST elevation"].shows(planted(waves={"II": {"j": 0.2}}))
    lowered = planted(waves=several(("II", "aVF"), j=-0.1, st80=-0.02))
    told = BY_NAME["ST depression"].shows(lowered)
    assert BY_NAME["ST depression"].of(lowered, MAN) is False, "not at both"
    assert "II: ST at J -0.10, ST at J + 80 ms -0.02 mV" in told
