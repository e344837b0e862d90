"""What measurements mean by the limits in common use: slow, prolonged, left axis deviation, ST elevation in a lead.

Limits are those of the AHA/ACCF/HRS recommendations for the standardization and interpretation of the
electrocardiogram (Kligfield, Surawicz, Rautaharju, Hancock et al., Circulation 115 and 119, 2007 and 2009). What is
judged is the number as it is written, so that two that read alike are called alike.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

from elm_jax.ecg.beats.amplitudes import Lead, larger_r
from elm_jax.ecg.beats.measurements import LATE, MERGED, Measurements

CHEST = ("V1", "V2", "V3", "V4", "V5", "V6")
RATES, PR, QRS, AXES = (60, 100), (120, 200), (110, 120), (-30, 90)  # 1/min, ms, ms, degrees: what is usual
QTC = 340, 450, 460  # ms: short below, long above for men, and for women
DEPRESSED, T_DOWN = -0.05, -0.1  # mV
SOKOLOW, CORNELL = 3.5, 2.8  # mV: high above
OFTEN = 0.25  # of the beats: early ones that make a rhythm irregular
_ELEVATED, _HIGHER = (0.1, 0.2), ("V2", "V3")  # mV; leads of the second limit
NEIGHBOURS = (("aVL", "I", "II", "aVF", "III"), CHEST)  # each beside the next
_Q_DEEP, _Q_PART = 0.1, 0.25  # mV; part of the R wave
_SMALL_LIMBS, _SMALL_CHEST = 0.5, 1.0  # mV from peak to peak: low voltage
_DOWN_AS_USUAL = ("aVR", "V1", "III")  # leads in which a negative T wave is usual

Sizes = dict[str, float]  # lead -> mV


def pace(rate: float) -> str:
    """slow, normal or fast."""
    return "slow" if round(rate) < RATES[0] else "fast" if round(rate) > RATES[1] else "normal"


def of_pr(pr: float) -> str:
    """short, normal or long."""
    return "short" if round(pr) < PR[0] else "long" if round(pr) > PR[1] else "normal"


def of_qrs(qrs: float) -> str:
    """narrow, between or wide."""
    return "narrow" if round(qrs) < QRS[0] else "between" if round(qrs) <= QRS[1] else "wide"


def of_axis(degrees: float) -> str:
    """normal, left, right or far."""
    axis = round(degrees)
    if AXES[0] <= axis <= AXES[1]:
        return "normal"
    return "left" if -90 <= axis < AXES[0] else "right" if axis > 0 else "far"


def of_qtc(found: Measurements) -> tuple[str, str] | None:
    """short, normal, long for men or long, for nobody says whose ECG it is; and the name of the value that is judged:
    QTc by Bazett's formula, or where it is far off by Fridericia's. None without one."""
    rate = found.values["rate"].value
    by = "qtc_bazett" if rate is None or pace(rate) == "normal" else "qtc_fridericia"
    value = found.values[by].value
    if value is None:
        return None
    length, (short, men, women) = round(value), QTC
    longer = "normal" if length <= men else "long" if length > women else "long for men"
    return "short" if length < short else longer, by


def usable(found: Measurements) -> dict[str, Lead]:
    """The leads that nothing is wrong with."""
    return {name: lead for name, lead in found.leads.items() if not lead.reason}


def early_often(found: Measurements) -> bool:
    """Whether early beats make the rhythm irregular."""
    rhythm = found.rhythm
    often = rhythm.early + rhythm.ectopic_early >= OFTEN * len(found.beats)
    return bool(often and found.beats) and rhythm.regularity != "fibrillation"


def st_unjudged(found: Measurements) -> str:
    """Why ST deviations are not judged; "" where they are."""
    why = found.values["qt"].reason
    return why if why in (MERGED, LATE) else "" if _pairs(usable(found)) else "no two neighbouring leads"


def elevated(found: Measurements) -> Sizes:
    """ST at J, where it is raised in two neighbouring leads."""
    return _beside(found, lambda name, a: _if(a["j"], round(a["j"], 2) >= limit_of_elevation(name)))


def depressed(found: Measurements) -> Sizes:
    """ST 80 ms behind J, where there and at J it is lowered in two neighbouring leads."""
    return _beside(found, lambda _, a: _if(a["st80"], round(max(a["j"], a["st80"]), 2) <= DEPRESSED))


def limit_of_elevation(lead: str) -> float:
    """mV at J from which on ST is raised."""
    return _ELEVATED[lead in _HIGHER]


def inverted(found: Measurements) -> Sizes:
    """T waves that are negative where that is not usual."""
    return _where(found, lambda name, a: _if(a["t"], round(a["t"], 2) <= T_DOWN and name not in _DOWN_AS_USUAL))


def deep_q(found: Measurements) -> Sizes:
    """Q waves that are large, and large beside R."""
    return _where(
        found,
        lambda name, a: _if(a["q"], -round(a["q"], 2) > max(_Q_DEEP, _Q_PART * larger_r(a)) and name != "aVR"),
    )


def low_voltage(found: Measurements, chest: bool) -> bool:
    """Whether all six limb leads, or chest leads, are small from peak to peak."""
    sizes = [_size(lead) for name, lead in usable(found).items() if (name in CHEST) == chest]
    return len(sizes) == len(CHEST) and max(sizes) < (_SMALL_CHEST if chest else _SMALL_LIMBS)


def _pairs(leads: Mapping[str, Lead]) -> list[tuple[str, str]]:
    return [pair for row in NEIGHBOURS for pair in pairwise(row) if set(pair) <= set(leads)]


def _where(found: Measurements, of: Callable[[str, dict[str, float]], float]) -> Sizes:
    """The usable leads of which `of` their name and amplitudes is something, with that."""
    sizes = {name: of(name, lead.amplitudes) for name, lead in usable(found).items()}
    return {name: size for name, size in sizes.items() if size}


def _beside(found: Measurements, of: Callable[[str, dict[str, float]], float]) -> Sizes:
    """As `_where`, of leads that have a neighbour that is so too."""
    there = _where(found, of)
    both = {one for pair in _pairs(usable(found)) if set(pair) <= set(there) for one in pair}
    return {name: size for name, size in there.items() if name in both}


def _if(value: float, counts: bool) -> float:
    return value if counts else 0.0


def _size(lead: Lead) -> float:
    a = lead.amplitudes
    return larger_r(a) - min(a["q"], a["s"])
