"""Leads and units by what files call them, each in any spelling: the one place that knows these names."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from elm_jax.errors import UserError, nearest

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
AUGMENTED = ("aVR", "aVL", "aVF")
# Of SCP-ECG (EN 1064) and, behind "2:", of MDC in DICOM.
NUMBERED = dict(zip((1, 2, 61, 62, 63, 64, *range(3, 9)), LEADS, strict=True)) | {65: "-aVR"}
_FOLDED = {lead.casefold(): lead for lead in LEADS} | {f"d{n}": LEADS[n - 1] for n in (1, 2, 3)}
_FOLDED |= {f"d{'i' * n}": LEADS[n - 1] for n in (1, 2, 3)}  # as in Latin countries
_LEAD = re.compile(  # a hyphen right behind a word parts it from the name; any other one negates
    r"(?:(?:mdc|ecg|ekg|lead|ableitung|derivation)(?:\s+-\s+|-|[\s_:.]*))*"
    r"(?P<minus>-\s*|minus[\s_]+|inverted[\s_]+)?"
    r"(?P<lead>i{1,3}|di{1,3}|d[1-3]|a[\s_]?v[\s_]?[rlf]|v[\s_-]?0?[1-6])"
    r"(?P<neg>[\s_]?neg)?(?:\s*\((?:einthoven|goldberger|wilson)\))?"
)
_UNIT = re.compile(r"(?:mdc_dim_)?(m|milli|u|micro|n|nano)?[\s_]?(?:v|volts?)")
_MILLIVOLTS = {None: 1e3, "m": 1.0, "milli": 1.0, "u": 1e-3, "micro": 1e-3, "n": 1e-6, "nano": 1e-6}
# A micro sign as it comes out of NFKC and casefold; that of UTF-8 taken for Latin-1, both kinds; that of MS-DOS.
_MICRO = re.compile("âμ|î1\N{FRACTION SLASH}4|μ|æ")


@lru_cache(maxsize=4096)
def lead_of(name: str) -> tuple[str, bool] | None:
    """The canonical lead that a file calls `name`, and whether it is stored negated (`-aVR`); None for another signal.

    `aVR`, `AVR`, `Lead aVR`, `ECG aVR`, `MDC_ECG_LEAD_AVR`, `aV R`; `DII` and `D2`; `V01`.
    """
    text = unicodedata.normalize("NFKC", name.replace("\N{MINUS SIGN}", "-")).strip().casefold()
    match = _LEAD.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        return None
    lead = re.sub(r"[\s_-]|0(?=\d)", "", match["lead"])
    return _FOLDED[lead], bool(match["minus"]) != bool(match["neg"])


@lru_cache(maxsize=4096)
def millivolts(unit: str) -> float | None:
    """How many mV one `unit` is; None for what is no unit of volts. `mV`, `µV` with either micro sign in any encoding,
    `uV`, `microvolts`, `MDC_DIM_MICRO_VOLT`, `V`, `nV`, in any case."""
    text = unicodedata.normalize("NFKC", unit).strip().casefold()  # NFKC: µ, U+00B5, to μ
    match = _UNIT.fullmatch(_MICRO.sub("u", text, count=1)) if len(text) <= 100 else None
    return None if match is None else _MILLIVOLTS[match[1]]


@dataclass(frozen=True)
class Rows:
    """Where LEADS are in a file: `places` are the rows of the leads that it stores, in the canonical order.

    negated: places among these that it has negated; derived: leads that follow from I and II, in the canonical order;
    dropped: the names of other rows; absent: leads that are neither there nor derived.
    """

    places: tuple[int, ...]
    negated: tuple[int, ...] = ()
    derived: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


_IN_ORDER = Rows(tuple(range(len(LEADS))))


def find_leads(path: str, names: Sequence[str], some: bool = False) -> Rows:
    """Where LEADS are among rows of these `names`. Raises UserError where one is missing or there twice.

    The three augmented leads, and III with them, may be absent together: they follow from I and II. With `some` it is
    enough that one is there; those that are not are `absent`.
    """
    names = tuple(names)
    if names == LEADS:  # as nearly all prepared files have them
        return _IN_ORDER
    known = [lead_of(name) for name in names]
    places, negated, missing = [], [], []
    for lead in LEADS:
        called = next((which for which in ((lead, False), (lead, True)) if which in known), None)
        if called is None:
            missing.append(lead)
            continue
        if known.count(called) > 1:
            raise UserError(path, f"leads {', '.join(names)}", f"each lead once, {lead} too", "give one another name")
        negated += [len(places)] * called[1]
        places.append(known.index(called))
    derived, absent = tuple(missing), ()
    if derived not in ((), AUGMENTED, ("III", *AUGMENTED)):
        derived, absent = (), derived
    if absent and not (some and places):
        others = [name for name, lead in zip(names, known, strict=True) if lead is None]
        named = ", ".join(name or "one without a name" for name in names) or "none"
        where = "under its key leads" if path.endswith(".npy") else "in the header"
        fix = nearest(missing[0], others) or f"name the leads so {where}"
        expected = "one of the twelve standard leads" if some else "all twelve standard leads"
        raise UserError(path, f"no lead {', '.join(missing)} among {named}", expected, fix)
    dropped = tuple(name or "one without a name" for place, name in enumerate(names) if place not in places)
    return Rows(tuple(places), tuple(negated), derived, dropped, absent)


def derive(signal: np.ndarray, derived: Sequence[str]) -> np.ndarray:
    """All LEADS (12, L) from those but `derived`, in their order: III = II - I, and Goldberger's leads of I and II."""
    rows = dict(zip([lead for lead in LEADS if lead not in derived], signal, strict=True))
    one, two = rows["I"], rows["II"]
    computed = {"III": two - one, "aVR": -(one + two) / 2, "aVL": one - two / 2, "aVF": two - one / 2}
    return np.stack([rows[lead] if lead in rows else computed[lead] for lead in LEADS])
