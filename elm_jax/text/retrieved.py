"""What is written of retrieved recordings: reports, numbers, or both, in our words or as the reference has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from elm_jax import compat as behaviours
from elm_jax.ecg.features import NAMES, PER_LEAD

CONTENTS = ("report", "feature", "combined")
VERSION = 1  # goes up when the same recordings are written of in other words
VERSIONS = ("rag_0_0_2", "rag_0_0_3", "rag_0_0_4", "rag_92bff32")  # of the reference, by their names in `compat`
SHOWN_LEAD = "II"
_WHAT = {"report": "diagnosis", "feature": "features", "combined": "features and diagnosis"}
_TAG = re.compile(r"<\s*(?:ecg|image)\s*>", re.IGNORECASE)  # which stand for an ECG in a user's words


class Retrieved(NamedTuple):
    """A recording that was found: its report, "" where nobody wrote one, and its features (C * 24,), lead by lead."""

    report: str
    features: np.ndarray


def version_of(compat: Iterable[str]) -> str:
    """The version of the reference in whose words retrieved recordings are written, "" for ours."""
    return next((version for version in VERSIONS if behaviours.enabled(version, compat)), "")


def block(
    found: Sequence[Retrieved], content: str, leads: Sequence[str], compat: Iterable[str] = (), dashes: bool = False
) -> str:
    """The text about recordings, the most similar first; `content` is one of CONTENTS, `leads` names those of features.

    By default a line for each, with the features of lead II (else of the first), under a line that says what they are;
    "" for no recordings. With a version's compat name the reference's text of that version (golden rag_prompt), which
    has the first lead's features, and in 0.0.2 both contents whatever is asked for. dashes: as a control, a dash in the
    place of each character of reports and numbers.
    """
    version = version_of(compat)
    if dashes:
        found = [one._replace(report=_dashed(one.report)) for one in found]
    if not version:
        return _ours(found, content, leads, dashes)
    content = "combined" if version == "rag_0_0_2" else content
    lines = [
        f"The following is the top {len(found)} retrieved ECGs and their corresponding {_WHAT[content]}. "
        "Utilize this information to further enhance your response.\n"
    ]
    for number, (report, features) in enumerate(found, 1):
        values = [_number(value, version) for value in features[:PER_LEAD]]
        values = [_dashed(value) for value in values] if dashes else values
        numbers = ["Feature Information:", *map(": ".join, zip(NAMES, values, strict=False)), ""]
        said = ["Diagnosis Information:", report, *(["", report] if version == "rag_0_0_2" else [""])]
        parts = [said] * (content != "feature") + [numbers] * (content != "report")
        lines += [f"Retrieved ECG {number}", *sum(parts[::-1] if version == "rag_92bff32" else parts, [])]
    return "\n".join(lines) + "\n"


def own_numbers(features: np.ndarray) -> str:
    """What 92bff32 writes of the asked ECG itself before the block in a question with both contents: all its numbers,
    without names, as numpy prints them."""
    return f"Feature Information:\n{features}\n\n"


def without_marks(text: str) -> str:
    """A text without what would stand for an ECG in a user's words."""
    return _TAG.sub(" ", text)


def _ours(found: Sequence[Retrieved], content: str, leads: Sequence[str], dashes: bool) -> str:
    if not found:
        return ""
    lead = leads.index(SHOWN_LEAD) if SHOWN_LEAD in leads else 0
    lines = ["Other recordings that are most like this ECG, the most similar first:"]
    for number, (report, features) in enumerate(found, 1):
        values = [f"{value:.3g}" for value in features[lead * PER_LEAD : (lead + 1) * PER_LEAD]]
        values = [_dashed(value) for value in values] if dashes else values
        numbers = ", ".join(map(" ".join, zip(NAMES, values, strict=True)))
        parts = [f"report: {' '.join(report.split()) or 'none'}"] * (content != "feature")
        parts += [f"lead {leads[lead]}: {numbers}"] * (content != "report")
        lines.append(f"{number}. {'; '.join(parts)}")
    return "\n".join(lines) + "\n"


def _number(value: float, version: str) -> str:
    if version == "rag_0_0_2":
        return str(float(value))
    return f"{float(value):.6f}" if version == "rag_92bff32" else str(round(float(value), 6))


def _dashed(text: str) -> str:
    return re.sub(r"\S", "-", text)
