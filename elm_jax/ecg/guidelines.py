"""Findings as guidelines define them: each with its criterion in words, its source, and the measurements it is told by.

A number is judged as it is written: whole ms, degrees and beats per minute, hundredths of a mV. Where a criterion
depends on sex or age and these are not known, a finding is there if it is for everybody, absent if it is for nobody.
ST and T are not judged where the QRS complex is wide or the Sokolow-Lyon index high, as their source has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

from elm_jax.ecg.beats.findings import CHEST, NEIGHBOURS
from elm_jax.ecg.beats.measurements import Measurements

LIMBS = ("I", "II", "III", "aVR", "aVL", "aVF")
_YOUNG, _OLD = 39.0, 40.0  # years, to either side of the limit of ST elevation

_RATES = "Robles de Medina et al., WHO/ISFC task force, Eur J Cardiol 8 (1978) 127"
_SVT = "Page et al., ACC/AHA/HRS guideline, Circulation 133 (2016) e506"
_FIBRILLATION = "Hindricks et al., ESC guidelines, Eur Heart J 42 (2021) 373"
_SLOW = "Kusumoto et al., ACC/AHA/HRS guideline, Circulation 140 (2019) e382"
_CONDUCTION = "Surawicz et al., AHA/ACCF/HRS recommendations III, Circulation 119 (2009) e235"
_REPOLARIZATION = "Rautaharju et al., AHA/ACCF/HRS recommendations IV, Circulation 119 (2009) e241"
_HYPERTROPHY = "Hancock et al., AHA/ACCF/HRS recommendations V, Circulation 119 (2009) e251"
_INFARCTION = "Thygesen et al., fourth universal definition of myocardial infarction, Circulation 138 (2018) e618"
_VOLTAGE = "Surawicz and Knilans, Chou's Electrocardiography in Clinical Practice, 6th ed. (2008)"

Holds = Callable[[Measurements, str, float], bool]  # of measurements, sex and age; LookupError where not measured


@dataclass(frozen=True)
class Person:
    """Whose ECG it is, as far as it is known. sex: male or female; age in years."""

    sex: str | None = None
    age: float | None = None


@dataclass(frozen=True)
class Rule:
    """finding: what it is called behind "this ECG shows"; criterion: what one sees then; source: who says so.

    shows: the measurements it is told by, in words, whether it holds or not.
    """

    finding: str
    criterion: str
    source: str
    holds: Holds
    shows: Callable[[Measurements], str]

    def of(self, found: Measurements, person: Person = Person()) -> bool | None:
        """Whether an ECG has the finding; None where what it needs is not measured, or who it is decides."""
        sexes = (person.sex,) if person.sex else ("male", "female")
        ages = (_YOUNG, _OLD) if person.age is None else (person.age,)
        try:
            told = {self.holds(found, sex, age) for sex, age in product(sexes, ages)}
        except LookupError:
            return None
        return told.pop() if len(told) == 1 else None


def value_of(found: Measurements, name: str) -> float:
    """A value of `measurements.UNITS` as it is written. Raises LookupError where it is not measured."""
    value = found.values[name].value
    if value is None:
        raise LookupError(name)
    return round(value, 2) if name in ("sokolow_lyon", "cornell") else round(value)


def _lead(found: Measurements, lead: str) -> Mapping[str, float]:
    if lead not in found.leads or found.leads[lead].reason:
        raise LookupError(lead)
    return found.leads[lead].amplitudes


def _wave(found: Measurements, lead: str, name: str) -> float:
    return round(_lead(found, lead)[name], 2)


def _r(found: Measurements, lead: str) -> float:
    """The larger R wave; of who tells of no second one the first."""
    return max(_wave(found, lead, "r"), round(_lead(found, lead).get("r2", 0.0), 2))


def _size(found: Measurements, lead: str) -> float:
    return round(_r(found, lead) - min(_wave(found, lead, "q"), _wave(found, lead, "s")), 2)


def _between(name: str, low: float, high: float) -> Holds:
    return lambda found, *_: low <= value_of(found, name) <= high


def _small(found: Measurements, leads: Iterable[str], limit: float) -> bool:
    return max(_size(found, lead) for lead in leads) < limit


def _beside(found: Measurements, of: Callable[[str], bool]) -> bool:
    """Whether two contiguous leads are so. Raises LookupError where a lead that is not measured might be one."""
    known: dict[str, bool] = {}
    for lead in dict.fromkeys(lead for row in NEIGHBOURS for lead in row):
        try:
            known[lead] = of(lead)
        except LookupError:
            continue
    pairs = [pair for row in NEIGHBOURS for pair in pairwise(row)]
    if any(known.get(first) and known.get(second) for first, second in pairs):
        return True
    if any(known.get(first, True) and known.get(second, True) for first, second in pairs):
        raise LookupError("leads")
    return False


def _contiguous(found: Measurements, of: Callable[[str], bool]) -> bool:
    """As `_beside`, of ST and T, which tell nothing with bundle branch block or left ventricular hypertrophy."""
    hypertrophy = found.values["sokolow_lyon"].value
    if value_of(found, "qrs") >= 120 or (hypertrophy or 0) >= 3.5:
        raise LookupError("bundle branch block or hypertrophy")
    return _beside(found, of)


def _elevated(found: Measurements, sex: str, age: float) -> bool:
    higher = 0.15 if sex == "female" else 0.25 if age < _OLD else 0.2
    return _contiguous(found, lambda lead: _wave(found, lead, "j") >= (higher if lead in ("V2", "V3") else 0.1))


def _depressed(found: Measurements, *_: object) -> bool:
    return _contiguous(found, lambda lead: max(_wave(found, lead, "j"), _wave(found, lead, "st80")) <= -0.05)


def _inverted(found: Measurements, *_: object) -> bool:
    """T waves below -0.1 mV in contiguous leads whose R wave is the larger part."""
    return _contiguous(
        found, lambda lead: _wave(found, lead, "t") < -0.1 and _r(found, lead) > -_wave(found, lead, "s")
    )


def _left_bundle(found: Measurements, *_: object) -> bool:
    return (
        value_of(found, "qrs") >= 120
        and -_wave(found, "V1", "s") > _r(found, "V1")
        and all(_r(found, lead) > -_wave(found, lead, "s") for lead in ("I", "V6"))
        and all(_wave(found, lead, "q") >= -0.05 for lead in ("I", "V5", "V6"))
    )


def _right_bundle(found: Measurements, *_: object) -> bool:
    return (
        value_of(found, "qrs") >= 120
        and (_lead(found, "V1").get("r2", 0.0) >= 0.1 or _r(found, "V1") > -_wave(found, "V1", "s"))
        and all(_wave(found, lead, "s") <= -0.1 for lead in ("I", "V6"))
    )


def _anterior_fascicle(found: Measurements, *_: object) -> bool:
    return (
        -90 <= value_of(found, "axis") <= -45
        and value_of(found, "qrs") < 120
        and _wave(found, "aVL", "q") < 0
        and _r(found, "aVL") > -_wave(found, "aVL", "s")
        and all(_r(found, lead) < -_wave(found, lead, "s") for lead in ("II", "III", "aVF"))
    )


_SAID = {
    "rate": "heart rate {} per minute", "p": "P wave {} ms", "pr": "PR interval {} ms", "qrs": "QRS duration {} ms",
    "qt": "QT interval {} ms", "qtc_bazett": "QTc by Bazett {} ms", "axis": "QRS axis {}°",
    "sokolow_lyon": "S in V1 and the larger R of V5 and V6 together {} mV",
    "cornell": "R in aVL and S in V3 together {} mV",
}  # fmt: skip


def said(found: Measurements, name: str) -> str:
    """A value in words. Raises LookupError where it is not measured."""
    return _SAID[name].format(f"{value_of(found, name):g}")


SAID = tuple(_SAID)  # the values that `said` tells


def _values(*names: str) -> Callable[[Measurements], str]:
    """Those of these values that are measured, in words."""
    return lambda found: ", ".join(said(found, name) for name in names if found.values[name].value is not None)


def _and_waves(values: tuple[str, ...], leads: tuple[str, ...], *names: str) -> Callable[[Measurements], str]:
    return lambda found: "; ".join(filter(None, (_values(*values)(found), _waves(found, leads, *names))))


def _waves(found: Measurements, leads: Iterable[str], *names: str) -> str:
    """The waves of these leads in words, as far as they are measured."""
    words = {"q": "Q", "r": "R", "s": "S", "t": "T", "j": "ST at J", "st80": "ST at J + 80 ms", "p": "P"}
    told = []
    for lead in leads:
        known = found.leads[lead].amplitudes if lead in found.leads and not found.leads[lead].reason else {}
        shown = {name: _r(found, lead) if name == "r" else known[name] for name in names if name in known}
        sizes = [f"{words[name]} {size:.2f}" for name, size in shown.items()]
        told += [f"{lead}: {', '.join(sizes)} mV"] if sizes else []
    return "; ".join(told)


def _levels(found: Measurements, *names: str) -> str:
    return _waves(found, dict.fromkeys(lead for row in NEIGHBOURS for lead in row), *names)


def _sizes(found: Measurements, leads: Iterable[str]) -> str:
    largest = max(leads, key=lambda lead: _size(found, lead))
    return f"the largest of these complexes, in {largest}, {_size(found, largest):.2f} mV from peak to peak"


def _fibrillates(found: Measurements, *_: object) -> bool:
    if found.rhythm.regularity == "unknown":
        raise LookupError("rhythm")
    return found.rhythm.regularity == "fibrillation"


def _rhythm(found: Measurements) -> str:
    fibrillates = _fibrillates(found)
    return "irregular intervals without P waves of one look" if fibrillates else f"rhythm {found.rhythm.regularity}"


RULES: tuple[Rule, ...] = (
    Rule("bradycardia", "a heart rate below 60 per minute", _RATES, _between("rate", 0, 59), _values("rate")),
    Rule("tachycardia", "a heart rate above 100 per minute", _SVT, _between("rate", 101, 999), _values("rate")),
    Rule(
        "atrial fibrillation", "irregular intervals between beats without P waves of one look", _FIBRILLATION,
        _fibrillates, _rhythm,
    ),
    Rule("a short PR interval", "a PR interval below 120 ms", _CONDUCTION, _between("pr", 0, 119), _values("pr")),
    Rule("first-degree AV block", "a PR interval above 200 ms", _SLOW, _between("pr", 201, 999), _values("pr")),
    Rule("a prolonged P wave", "a P wave longer than 120 ms", _HYPERTROPHY, _between("p", 121, 999), _values("p")),
    Rule(
        "right atrial abnormality", "a P wave taller than 0.25 mV in lead II", _HYPERTROPHY,
        lambda found, *_: _wave(found, "II", "p") > 0.25, lambda found: _waves(found, ("II",), "p"),
    ),
    Rule("a wide QRS complex", "a QRS duration of 120 ms or more", _CONDUCTION, _between("qrs", 120, 999),
         _values("qrs")),
    Rule(
        "complete left bundle branch block",
        "a QRS duration of 120 ms or more, a mainly negative complex in V1, mainly positive ones in I and V6, and no Q "
        "wave in I, V5 and V6", _CONDUCTION, _left_bundle,
        _and_waves(("qrs",), ("V1", "I", "V5", "V6"), "q", "r", "s"),
    ),
    Rule(
        "complete right bundle branch block",
        "a QRS duration of 120 ms or more, a second or dominant R wave in V1, and S waves in I and V6", _CONDUCTION,
        _right_bundle, _and_waves(("qrs",), ("V1", "I", "V6"), "r", "s"),
    ),
    Rule(
        "left anterior fascicular block",
        "a QRS axis from -45° to -90°, a QRS duration below 120 ms, qR in aVL, and rS in II, III and aVF", _CONDUCTION,
        _anterior_fascicle, _and_waves(("axis", "qrs"), ("aVL", "II", "III", "aVF"), "q", "r", "s"),
    ),
    Rule("a normal QRS axis", "a QRS axis from -30° to 90°", _CONDUCTION, _between("axis", -30, 90), _values("axis")),
    Rule("left axis deviation", "a QRS axis from -90° to below -30°", _CONDUCTION, _between("axis", -90, -31),
         _values("axis")),
    Rule("right axis deviation", "a QRS axis above 90°", _CONDUCTION, _between("axis", 91, 180), _values("axis")),
    Rule(
        "a prolonged QTc interval", "a QTc above 450 ms in men, above 460 ms in women", _REPOLARIZATION,
        lambda found, sex, _: value_of(found, "qtc_bazett") > (460 if sex == "female" else 450), _values("qtc_bazett"),
    ),
    Rule(
        "left ventricular hypertrophy by the Sokolow-Lyon index",
        "S in V1 and the larger R of V5 and V6 together 3.5 mV or more", _HYPERTROPHY,
        _between("sokolow_lyon", 3.5, 99), _values("sokolow_lyon"),
    ),
    Rule(
        "left ventricular hypertrophy by the Cornell voltage",
        "R in aVL and S in V3 together above 2.8 mV in men, above 2.0 mV in women", _HYPERTROPHY,
        lambda found, sex, _: value_of(found, "cornell") > (2.0 if sex == "female" else 2.8), _values("cornell"),
    ),
    Rule(
        "low voltage in the limb leads", "complexes below 0.5 mV from peak to peak in all limb leads", _VOLTAGE,
        lambda found, *_: _small(found, LIMBS, 0.5), partial(_sizes, leads=LIMBS),
    ),
    Rule(
        "low voltage in the chest leads", "complexes below 1.0 mV from peak to peak in all chest leads", _VOLTAGE,
        lambda found, *_: _small(found, CHEST, 1.0), partial(_sizes, leads=CHEST),
    ),
    Rule(
        "ST elevation",
        "ST at J raised by 0.1 mV or more in two contiguous leads; in V2 and V3 by 0.2 mV in men, 0.25 mV in men below "
        "40 years, 0.15 mV in women", _INFARCTION, _elevated, lambda found: _levels(found, "j"),
    ),
    Rule(
        "ST depression", "ST lowered by 0.05 mV or more at J and 80 ms behind in two contiguous leads", _INFARCTION,
        _depressed, lambda found: _levels(found, "j", "st80"),
    ),
    Rule(
        "T wave inversion", "T waves below -0.1 mV in two contiguous leads with a dominant R wave", _INFARCTION,
        _inverted, lambda found: _levels(found, "t"),
    ),
)  # fmt: skip
