"""Scores of generated answers, with confidence intervals, and what blind answers would have scored.

Protocol: a response may consist of thinking and answer; answers are compared. A pair without a truth is left
out, an empty answer counts. Every metric is a number from 0 to 1 per pair; a score is their mean. Intervals
come from a bootstrap over patients: questions about the same patient stand or fall together.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PROTOCOL = "elm-jax-1: answer part, empty truths left out, empty answers kept, bootstrap over patients"
RESAMPLES = 1000
HEART_RATE_TOLERANCE = 5
_CANDIDATES = 32
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def split_response(text: str) -> tuple[str, str]:
    """(thinking, answer), stripped: the answer is what answer tags hold, else what follows the thinking."""
    if "</think>" in text and "<think>" not in text:
        text = "<think>" + text
    thinking = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    rest = text[thinking.end() :] if thinking else text
    return (thinking[1].strip() if thinking else ""), (tagged[1] if tagged else rest).strip()


def exact_match(answer: str, truth: str) -> float:
    """1 if the two strings are equal."""
    return float(answer == truth)


def token_f1(answer: str, truth: str) -> float:
    """F1 of the words in common, lower-cased and without ASCII punctuation; two texts without words agree."""
    ours, theirs = Counter(_words(answer)), Counter(_words(truth))
    if not ours or not theirs:
        return float(not ours and not theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def same_words(answer: str, truth: str) -> float:
    """1 if the two agree but for case, ASCII punctuation and spaces."""
    return float(_words(answer) == _words(truth))


def within_5_bpm(answer: str, truth: str) -> float:
    """1 if the first whole number of the answer is within 5 of that of the truth."""
    ours, theirs = first_integer(answer), first_integer(truth)
    return float(ours is not None and theirs is not None and abs(ours - theirs) <= HEART_RATE_TOLERANCE)


def first_integer(text: str) -> int | None:
    """The first run of ASCII digits as a number, None if there is none."""
    match = re.search(r"[0-9]+", text)
    return int(match[0][:18]) if match else None


def _words(text: str) -> list[str]:
    return text.lower().translate(_NO_PUNCTUATION).split()


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "signal_type.accuracy": same_words,
    "heart_rate.within_5_bpm": within_5_bpm,
}
# Metrics that make sense for one kind of question only: the `name` of its records.
ASKED_BY = {"signal_type.accuracy": "signal_type", "heart_rate.within_5_bpm": "heart_rate"}


def is_right(name: str, answer: str, truth: str) -> bool:
    """Whether an answer to a question called `name` counts as right: by its own metric, else by its words."""
    metric = next((metric for metric, asked in ASKED_BY.items() if asked == name), None)
    score = METRICS[metric] if metric else same_words
    return bool(score(split_response(answer)[1], split_response(truth)[1]))


@dataclass(frozen=True)
class _Pair:
    id: str
    name: str
    patient: str
    answer: str
    truth: str


def _pairs(predictions: Iterable[Mapping[str, Any]]) -> list[_Pair]:
    return [
        _Pair(
            id=str(p["id"]),
            name=str(p.get("name", "")),
            patient=str(p.get("patient") or p["id"]),
            answer=split_response(p["answer"])[1],
            truth=split_response(p["truth"])[1],
        )
        for p in predictions
        if p["truth"]
    ]


def aggregate(predictions: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Scores of predictions, "protocol", "n", "metrics", "by", "baselines", as `metrics.json` has them.

    A prediction is {"id", "name", "answer", "truth"} and, for the intervals, "patient" (missing: its own).
    metrics: {metric: {"value", "ci95": [low, high]}}; by: {"name": {level: {metric: the same and "n"}}}.
    baselines: "constant" is {metric: what one answer to all its questions would score at best, chosen with
    the truths in hand}; "majority" is {metric: the score of each name's most frequent truth}.
    """
    pairs = _pairs(predictions)
    groups = {
        name: [pair for pair in pairs if pair.name == name] for name in sorted({pair.name for pair in pairs})
    }
    subjects = {
        metric: groups.get(ASKED_BY[metric], []) if metric in ASKED_BY else pairs for metric in METRICS
    }
    subjects = {metric: subject for metric, subject in subjects.items() if subject}
    levels = {
        name: {
            metric: _score(group, metric, seed) | {"n": len(group)}
            for metric in METRICS
            if ASKED_BY.get(metric, name) == name
        }
        for name, group in groups.items()
    }
    return {
        "protocol": PROTOCOL,
        "n": len(pairs),
        "metrics": {metric: _score(subject, metric, seed) for metric, subject in subjects.items()},
        "by": {"name": levels},
        "baselines": {
            "constant": {
                metric: best_constant([pair.truth for pair in subject], metric)[1]
                for metric, subject in subjects.items()
            },
            "majority": {metric: _majority(subject, metric) for metric, subject in subjects.items()},
        },
    }


def signal_dependence(
    real: Iterable[Mapping[str, Any]], control: Iterable[Mapping[str, Any]], seed: int = 0
) -> dict[str, Any]:
    """How many exact matches hang on the signal: {"value", "ci95", "p"} of real minus control, paired by id.

    `control` holds the predictions for the same questions under a control, once or several times each.
    `p` is two-sided, from flipping the sign of each patient's difference at random; it is at least
    1 / (RESAMPLES + 1).
    """
    pairs, others = _pairs(real), _pairs(control)
    scores: dict[str, list[float]] = {}
    for other, value in zip(others, _values(others, "exact_match"), strict=True):
        scores.setdefault(other.id, []).append(float(value))
    missing = [pair.id for pair in pairs if pair.id not in scores]
    assert pairs and not missing, f"the control lacks predictions: {missing[:3]}"
    values = _values(pairs, "exact_match") - np.array([np.mean(scores[pair.id]) for pair in pairs])
    sums, counts = _by_patient(values, pairs)
    rng = np.random.default_rng(seed)
    flipped = [abs(rng.choice((-1.0, 1.0), len(sums)) @ sums) for _ in range(RESAMPLES)]
    extreme = sum(total >= abs(sums.sum()) - 1e-9 for total in flipped)
    return {
        "value": float(values.mean()),
        "ci95": _ci95(sums, counts, seed),
        "p": (1 + extreme) / (1 + RESAMPLES),
    }


def best_constant(truths: Sequence[str], metric: str) -> tuple[str, float]:
    """The single answer that scores best against `truths`, and its score.

    Tried are the most frequent truths, and for a heart rate every number between the truths.
    """
    counts = Counter(truths)
    candidates = [truth for truth, _ in counts.most_common(_CANDIDATES)]
    if metric == "heart_rate.within_5_bpm":
        rates = [rate for rate in map(first_integer, counts) if rate is not None and rate < 1000]
        candidates += [str(rate) for rate in range(min(rates, default=0), max(rates, default=0) + 1)]
    score = METRICS[metric]
    scores = [
        sum(n * score(answer, truth) for truth, n in counts.items()) / len(truths) for answer in candidates
    ]
    best = int(np.argmax(scores))
    return candidates[best], scores[best]


def _majority(pairs: Sequence[_Pair], metric: str) -> float:
    truths: dict[str, list[str]] = {}
    for pair in pairs:
        truths.setdefault(pair.name, []).append(pair.truth)
    answers = {name: Counter(of_name).most_common(1)[0][0] for name, of_name in truths.items()}
    return float(np.mean([METRICS[metric](answers[pair.name], pair.truth) for pair in pairs]))


def _score(pairs: Sequence[_Pair], metric: str, seed: int) -> dict[str, Any]:
    values = _values(pairs, metric)
    return {"value": float(values.mean()), "ci95": _ci95(*_by_patient(values, pairs), seed)}


def _values(pairs: Sequence[_Pair], metric: str) -> np.ndarray:
    score = METRICS[metric]
    return np.array([score(pair.answer, pair.truth) for pair in pairs])


def _by_patient(values: np.ndarray, pairs: Sequence[_Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each patient."""
    _, patient = np.unique([pair.patient for pair in pairs], return_inverse=True)
    return np.bincount(patient, values), np.bincount(patient).astype(float)


def _ci95(sums: np.ndarray, counts: np.ndarray, seed: int) -> list[float]:
    """Percentile bootstrap of the mean: patients drawn with replacement, RESAMPLES times.

    Patients with the same sum and count are interchangeable, so only how many of each are drawn is drawn.
    """
    kinds, patients = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(kinds))  # bounds the memory
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = rng.multinomial(len(sums), patients / len(sums), min(rows, RESAMPLES - start))
        means.append(drawn @ kinds[:, 0] / (drawn @ kinds[:, 1]))
    return [float(bound) for bound in np.percentile(np.concatenate(means), (2.5, 97.5))]
