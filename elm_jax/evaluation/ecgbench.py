"""The tasks of PULSE's ECGBench, scored as PULSE scores them. Liu et al. 2024, arXiv 2410.19008.

A record's `name` is its subset. Labels are found as substrings of what is written, upper and lower case told apart (so
that "ABNORMAL" also holds "NORM"); the AUC is that of these hard decisions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.evaluation.scores.answers import split_response
from elm_jax.evaluation.statistics import Patients, ci95

LABELS: dict[str, tuple[str, ...]] = {
    "ptb-test": ("NORM", "MI", "STTC", "CD", "HYP"),
    "cpsc-test": ("NORM", "AF", "I-AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE"),
    "code15-test": ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF", "NORM", "ABNORMAL"),
}
LETTERS: dict[str, str] = {"csn-test-no-cot": "ABCDEFGH", "g12-test-no-cot": "ABCDEFGH", "mmmu-ecg": "ABCD"}
OPTIONS = "ecgqa-test"

_CORRECT = re.compile(r"[Tt]he correct option is\s*:?\s*\(?([A-H])\b")
_ANSWER = re.compile(r"[Aa]nswer\s*(?:is)?\s*:\s*\(?([A-H])\b")
_LISTED = re.compile(r"[Oo]ptions\s*:\s*(.+)")


def ecgbench(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"ecgbench": {subset: {metric: {"value", "ci95", "n"}}}}; nothing where no record is of ECGBench.

    Of label tasks "macro_f1", "macro_auc" and "hamming_loss", else "accuracy".
    """
    subsets: dict[str, list[Mapping[str, Any]]] = {}
    for line in predictions:
        if line.get("name") in (*LABELS, *LETTERS, OPTIONS):
            subsets.setdefault(line["name"], []).append(line)
    return {"ecgbench": {name: _subset(name, lines) for name, lines in sorted(subsets.items())}} if subsets else {}


def found_labels(text: str, labels: Sequence[str]) -> list[bool]:
    """Which labels the text holds."""
    return [label in text for label in labels]


def chosen_letter(text: str, letters: str, key: str = "") -> str:
    """The option that an answer chooses (`named_letter`).

    PULSE draws a letter where it names none; here it is drawn from `key`, so that it is the same again.
    """
    return named_letter(text, letters) or random.Random(key).choice(letters)


def named_letter(text: str, letters: str) -> str | None:
    """The bare letter, "X.", that of "The correct option is X" or what follows "Answer:"; None where there is none."""
    text = text.strip()
    if re.match(rf"[{letters}](?:\.|$)", text):
        return text[0]
    match = _CORRECT.search(text) or _ANSWER.search(text)
    return match[1] if match and match[1] in letters else None


def same_characters(answer: str, truth: str, options: Sequence[str]) -> bool:
    """Whether the options that the answer names consist of the same characters as the truth: as loose as PULSE is."""
    named = "".join(option for option in options if option.lower() in answer.lower())
    return set(named) == set(truth)


def listed_options(prompt: str) -> list[str]:
    """The options that a question lists behind "Options:", separated by commas."""
    match = _LISTED.search(prompt)
    return [option.strip(" .") for option in match[1].split(",") if option.strip(" .")] if match else []


def _subset(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    patients = Patients([str(line.get("patient") or line["id"]) for line in lines])
    answers = [split_response(line["answer"])[1] for line in lines]
    truths = [split_response(line["truth"])[1] for line in lines]
    if name in LABELS:
        found, true = (np.array([found_labels(text, LABELS[name]) for text in texts]) for texts in (answers, truths))
        rows, metrics = label_counts(found, true), LABEL_METRICS
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
        return same_characters(answer, truth, options)
    letters, key = LETTERS[name], str(line["id"])
    return chosen_letter(answer, letters, key) == named_letter(truth, letters)  # a truth without one is never right


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
