"""The tasks of PULSE's ECGBench, by the rules of its evaluate_ecgbench.py. Liu et al. 2024, arXiv 2410.19008.

A record's `name` is its subset. Labels are found as substrings of what is written, upper and lower case told apart; the
AUC is that of these hard decisions. All averages are over the labels that occur in the truths.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.scoring.answers import split_response
from elm_jax.scoring.statistics import Patients, ci95

LABELS: dict[str, tuple[str, ...]] = {
    "ptb-test": ("NORM", "MI", "STTC", "CD", "HYP"),
    "cpsc-test": ("NORM", "AF", "I-AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE"),
    "code15-test": ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF", "NORM", "ABNORMAL"),
}
LETTERS: dict[str, str] = {"csn-test-no-cot": "ABCDEFGH", "g12-test-no-cot": "ABCDEFGH", "mmmu-ecg": "ABCD"}
OPTIONS = "ecgqa-test"

_LETTER, _DOTTED = re.compile("[A-H]"), re.compile(r"[A-H](?=\.)")
_CORRECT, _ANSWER, _LISTED = "The correct option is ", "Answer:", "Options:"
_ORDER = "Only answer based on the given Options without any explanation."  # stands behind the options


def ecgbench(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"ecgbench": {subset: {metric: {"value", "ci95", "n"}}}}; nothing where no record is of ECGBench.

    Of label tasks "macro_f1", "macro_auc" and "hamming_loss", else "accuracy".
    """
    subsets: dict[str, list[Mapping[str, Any]]] = {}
    for line in predictions:
        if line.get("name") in (*LABELS, *LETTERS, OPTIONS):
            subsets.setdefault(line["name"], []).append(line)
    return {"ecgbench": {name: _subset(name, lines) for name, lines in sorted(subsets.items())}} if subsets else {}


def said_labels(name: str, answer: str) -> list[bool]:
    """Which labels of a subset an answer holds. "ABNORMAL" also holds "NORM".

    But in code15-test, which has both, they exclude each other, and only what follows the last "Answer:" is searched.
    """
    if "ABNORMAL" not in LABELS[name]:
        return [label in answer for label in LABELS[name]]
    answer = answer.rpartition(_ANSWER)[2]
    return [label in answer and (label != "NORM" or "ABNORMAL" not in answer) for label in LABELS[name]]


def true_labels(name: str, truth: str) -> list[bool]:
    """Which labels of a subset are true; in code15-test "NORM" and "ABNORMAL" only where they are the whole truth."""
    alone = ("NORM", "ABNORMAL") if "ABNORMAL" in LABELS[name] else ()
    return [label == truth if label in alone else label in truth for label in LABELS[name]]


def chosen_letter(text: str, letters: str, key: str = "") -> str:
    """The option that an answer chooses (`named_letter`).

    PULSE draws a letter where it names none; here it is drawn from `key`, so that it is the same again.
    """
    return named_letter(text) or random.Random(key).choice(letters)


def named_letter(text: str) -> str | None:
    """The letter A to H that a text names; None where there is none. The first rule that applies decides:

    a bare letter; one before a dot (so "ECG." names G); what stands behind the last "The correct option is ", if it is
    a letter; any capital behind the last "Answer:". Of several letters it is the first of the alphabet.
    """
    text = text.strip()
    if _LETTER.fullmatch(text):
        return text
    if dotted := _DOTTED.findall(text):
        return min(dotted)
    if _CORRECT in text:
        match = _LETTER.match(text.rpartition(_CORRECT)[2])
        return match[0] if match else None
    _, found, rest = text.rpartition(_ANSWER)
    return min(_LETTER.findall(rest), default=None) if found else None


def same_options(answer: str, truth: str, options: Sequence[str]) -> bool:
    """Whether the answer holds the options that the truth holds, and no other; upper and lower case are the same.

    PULSE compares the options that the answer holds with a list of true ones. Where one of these contains another
    option ("not sure": "no"), a right answer never scores there; here it does.
    """
    said, true = ([option.lower() in text.lower() for option in options] for text in (answer, truth))
    return any(true) and said == true


def listed_options(prompt: str) -> list[str]:
    """The options that a question lists behind its last "Options:", separated by commas."""
    _, found, rest = prompt.rpartition(_LISTED)
    options = [option.strip(" .\n") for option in rest.partition(_ORDER)[0].split(",")] if found else []
    return [option for option in options if option]


def _subset(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    patients = Patients([str(line.get("patient") or line["id"]) for line in lines])
    answers = [split_response(line["answer"])[1] for line in lines]
    truths = [split_response(line["truth"])[1] for line in lines]
    if name in LABELS:
        found = np.array([said_labels(name, text) for text in answers])
        true = np.array([true_labels(name, text) for text in truths])
        occur = true.any(0)
        if not occur.any():
            return {metric: {"value": None, "ci95": None, "n": len(lines)} for metric in LABEL_METRICS}
        rows, metrics = label_counts(found[:, occur], true[:, occur]), LABEL_METRICS
    else:
        right = [_right(name, *one) for one in zip(lines, answers, truths, strict=True)]
        rows = np.stack([right, np.ones(len(right))], axis=1).astype(float)
        metrics = {"accuracy": lambda sums: sums[..., 0] / sums[..., 1]}
    resampled, sums = patients.resampled(rows), rows.sum(0)
    return {
        metric: {**_score(float(value(sums)), ci95(value(resampled))), "n": len(lines)}
        for metric, value in metrics.items()
    }


def _score(value: float, interval: list[float]) -> dict[str, Any]:
    """None for what is undefined: JSON has no NaN."""
    defined = np.isfinite([value, *interval]).all()
    return {"value": value, "ci95": interval} if defined else {"value": None, "ci95": None}


def _right(name: str, line: Mapping[str, Any], answer: str, truth: str) -> bool:
    if name == OPTIONS:
        options = listed_options(str(line.get("question") or line["prompt"]))
        return same_options(answer, truth, options)
    # The truth is its first character: one that begins with no letter is never right.
    return chosen_letter(answer, LETTERS[name], str(line["id"])) == truth[:1]


def label_counts(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Hits, false alarms, misses and rest of each pair and label: (n, K) and (n, K) -> (n, 4 K)."""
    kinds = (found & true, found & ~true, ~found & true, ~found & ~true)
    return np.concatenate(kinds, axis=1).astype(float)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """(..., 4 K) -> (...): the mean over labels of F1; one that is neither true nor found scores 0."""
    hits, alarms, misses, _ = np.split(sums, 4, axis=-1)
    return (2 * hits / np.maximum(2 * hits + alarms + misses, 1)).mean(-1)


def micro_f1(sums: np.ndarray) -> np.ndarray:
    """(..., 4 K) -> (...): F1 of all labels taken together."""
    hits, alarms, misses, _ = (part.sum(-1) for part in np.split(sums, 4, axis=-1))
    return 2 * hits / np.maximum(2 * hits + alarms + misses, 1)


def hard_auc(sums: np.ndarray) -> np.ndarray:
    """(..., 4 K) -> (...): the mean over labels of the area under the curve of yes and no.

    A label that all have, or none, has no such area and is left out.
    """
    hits, alarms, misses, rest = np.split(sums, 4, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        areas = (hits / (hits + misses) + rest / (rest + alarms)) / 2
    defined = np.isfinite(areas)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, areas, 0).sum(-1) / defined.sum(-1)


def hamming_loss(sums: np.ndarray) -> np.ndarray:
    """(..., 4 K) -> (...): the share of wrong decisions."""
    _, alarms, misses, _ = (part.sum(-1) for part in np.split(sums, 4, axis=-1))
    return (alarms + misses) / sums.sum(-1)


LABEL_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "macro_f1": macro_f1, "macro_auc": hard_auc, "hamming_loss": hamming_loss,
}  # fmt: skip
