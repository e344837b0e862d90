"""Reports of ECGs: cleaned, a machine's measurements in words, and as the ids that text towers read.

Two cleanings are known, MERL's (arXiv 2403.06659) and ECG-Chat's (arXiv 2408.08849), each without its faults and, as
the compat name `published_report_cleaning`, with them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.errors import UserError

FEWEST_WORDS = 4  # of a report, for MERL
_MARKS = re.compile(r"[*=]+|-{2,}")  # what machines put around a statement
_EDGES = " .-"
_WORD = re.compile(r"[^\W_]")
# Statements about the recording or the machine, not about the heart.
_NOTICE = (
    r"data quality|unsuitable for analysis|analysis error|lead reversal|pediatric|pacer detection|measurement error|"
    r"without knowing patient's (?:sex|age)"
)
_NOTICES = re.compile(_NOTICE, re.IGNORECASE)
_NOTICES_AND_MORE = re.compile(f"{_NOTICE}|conduction defect", re.IGNORECASE)  # which is a finding
_PVC, _PAC = "ventricular premature complex", "atrial premature complex"
# As ECG-Chat has them, in its order.
_REPLACED = {
    "rbbb": "right bundle branch block",
    "lbbb": "light bundle branch block",
    "lvh": "left ventricle hypertrophy",
    "mi": "myocardial infarction",
    "lafb": "left anterior fascicular block",
    "pvc(s)": _PVC,
    "pvcs": _PVC,
    "pac(s)": _PAC,
    "pacs": _PAC,
}
_MEANT = {**_REPLACED, "lbbb": "left bundle branch block", "lvh": "left ventricular hypertrophy"}
_MEANT |= {"pvc": _PVC, "pac": _PAC, "ekg": "ecg"}
_ABBREVIATIONS = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(_MEANT, key=len, reverse=True)))})(?!\w)")
# In words: the parts with "/" between have one heading.
_WAVES = (
    ({"RR_Interval": "RR"}, ""),
    ({"PR_Interval": "PR"}, ""),
    ({"QRS_Complex": "QRS"}, ""),
    ({"QT_Interval": "QT", "QTc_Interval": "QTc"}, ""),
    ({"P_Wave_Peak": "P", "R_Wave_Peak": "R", "T_Wave_Peak": "T"}, " Wave"),
)


def clean_report(statements: Sequence[str], way: str, published: bool = False) -> str:
    """A report, made of the statements of a person or a machine, as `way` (of CLEANINGS) has it; "" for one that is
    left out.

    merl: lower case, "ecg" for "ekg", no marks of machines, a full stop behind each statement; fewer than FEWEST_WORDS
    words are left out. ecg_chat: lower case, no marks, abbreviations in full, statements with a blank between; those
    about the recording or the machine are left out. With `published` each does what its published code does, faults
    included.
    """
    ours, theirs = CLEANINGS[way]
    return (theirs if published else ours)(statements)


def _merl(statements: Sequence[str]) -> str:
    text = ". ".join(filter(None, (_plain(re.sub(r"\bekg\b", "ecg", s.lower())) for s in statements)))
    return f"{text}." if sum(bool(_WORD.search(word)) for word in text.split()) >= FEWEST_WORDS else ""


def _ecg_chat(statements: Sequence[str]) -> str:
    told = (s.lower() for s in statements if not _NOTICES.search(s))
    text = (_ABBREVIATIONS.sub(lambda match: _MEANT[match[0]], re.sub(r"- age undetermined", " ", s)) for s in told)
    return " ".join(filter(None, map(_plain, text)))


def _plain(statement: str) -> str:
    """A statement without marks, blanks in excess and what it ends with; "" for one without a word."""
    text = " ".join(_MARKS.sub(" ", statement).split()).strip(_EDGES)
    return text if _WORD.search(text) else ""


def merl_stripped(statements: Sequence[str]) -> str:
    """As MERL's data set class: marks go at the ends of the whole report alone, "Ekg" stays, an empty statement is a
    full stop."""
    joined = ". ".join(statements).replace("EKG", "ECG").replace("ekg", "ecg")
    return joined.strip("* ").strip("=-").strip("=").lower()


def _merl_published(statements: Sequence[str]) -> str:
    """As MERL's notebook, whose marks are words, too."""
    text = merl_stripped(statements)
    return re.sub(r"[\n\r\t]", " ", f"{text}.") if len(text.split()) >= FEWEST_WORDS else ""


def _ecg_chat_published(statements: Sequence[str]) -> str:
    """Abbreviations are replaced inside words, too ("limyocardial infarctionts"), and a finding is taken for a
    notice."""
    text = " ".join(s for s in statements if not _NOTICES_AND_MORE.search(s)).lower()
    text = re.sub(r"\*{3}|-{3}|={3}", "", text).replace(" - age undetermined", "")
    for short, meant in _REPLACED.items():
        text = text.replace(short, meant)
    return text


CLEANINGS: dict[str, tuple[Callable[[Sequence[str]], str], Callable[[Sequence[str]], str]]] = {
    "merl": (_merl, _merl_published),
    "ecg_chat": (_ecg_chat, _ecg_chat_published),
}


def wave_text(values: Mapping[str, Any]) -> str:
    """Measurements (ms, but of P, R and T whatever they are) as ECG-Chat puts them behind a report: " RR: 840 PR: …".

    Keys are those of its own table (RR_Interval, PR_Interval, QRS_Complex, QT_Interval, QTc_Interval, P_Wave_Peak,
    R_Wave_Peak, T_Wave_Peak). What `values` lacks is left out; ECG-Chat has all.
    """
    parts = []
    for names, unit in _WAVES:
        there = {short: values[key] for key, short in names.items() if key in values}
        if there:
            parts.append(f" {'/'.join(there)}{unit}: {'/'.join(map(str, there.values()))}")
    return "".join(parts)


def measured(rr: float | None, p_onset: float | None, qrs_onset: float | None, qrs_end: float | None,
             t_end: float | None) -> dict[str, int]:  # fmt: skip
    """For `wave_text` what a machine measured, ms: the interval between beats, and places within one beat.

    PR from onset to onset, QT from the onset of QRS, QTc by Bazett's formula (Heart 7 (1920) 353); what would need a
    value that is not known is left out.
    """
    found: dict[str, int] = {}

    def note(name: str, first: float | None, last: float | None) -> None:
        if first is not None and last is not None and last > first:
            found[name] = round(last - first)

    note("RR_Interval", 0, rr)
    note("PR_Interval", p_onset, qrs_onset)
    note("QRS_Complex", qrs_onset, qrs_end)
    note("QT_Interval", qrs_onset, t_end)
    if "QT_Interval" in found and "RR_Interval" in found:
        found["QTc_Interval"] = round(found["QT_Interval"] / math.sqrt(found["RR_Interval"] / 1000))
    return found


def padded_ids(tokenizer: Any, text: str, length: int) -> np.ndarray:
    """The ids (length,) int32 of a text with the tokens that the tokenizer puts around it, padded on the right.

    What is too long is cut at its end, and the last token, which ends a text, is kept.

    Raises:
        UserError: half of a surrogate pair is no text.
    """
    try:
        ids = tokenizer.encode(text, verbose=False)
    except (TypeError, ValueError, UnicodeError) as error:
        raise UserError("report", f"a text that cannot be read ({error})", "valid Unicode", "mend the record") from None
    if len(ids) > length:
        last = ids[-1:] if ids[-1] in tokenizer.all_special_ids else []
        ids = ids[: length - len(last)] + last
    found = np.full(length, tokenizer.pad_token_id, np.int32)
    found[: len(ids)] = ids
    return found
