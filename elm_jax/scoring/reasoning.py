"""ECG-Reasoning-Benchmark (arXiv 2603.14326): a diagnosis step by step, each step asked after the true ones before it.

A sample asks first for the diagnosis, then goes through loops: a criterion is selected, its finding identified, the
finding grounded (in leads, waves, measurements; any number of questions), and it is decided: yes, no, or further
findings are needed. A prediction's `name` is its step, one of STEPS; FINAL is the decision of the last loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.scoring.answers import split_response
from elm_jax.scoring.statistics import Patients, ci95

INITIAL, CRITERION, FINDING = "initial_diagnostic_question", "criterion_selection", "finding_identification"
GROUNDING = ("lead_grounding", "wave_grounding", "measurement_grounding")
DECISION, FINAL = "diagnostic_decision", "final_decision"
STEPS = (INITIAL, CRITERION, FINDING, *GROUNDING, DECISION, FINAL)

_YES_NO = re.compile(r"(yes|no)\b|.*\b(yes|no)$", re.DOTALL)
_LEAD = r"(?:iii|ii|i|avr|avl|avf|v[1-6])\b"
_LEADS = re.compile(rf"\bleads?\s+{_LEAD}(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+)(?:leads?\s+)?{_LEAD})*")
_BETWEEN = re.compile(r"[,;/\n]|\band\b")
_NUMBER = r"-?\d+(?:\.\d+)?\s*[^\d\s\[\]-]*"
_RANGE = re.compile(rf"{_NUMBER}\s*-\s*{_NUMBER}")
# What may stand around a criterion that is right: "the criterion is the presence of …", "… should be evaluated".
_BEFORE, _BEHIND = r"(?:the |.*(?:\b(?:is|are|include|includes)(?: the)?|:) )?", r"(?: (?:should|must)\b.*)?"


def _folded(text: str) -> str:
    """Lower-cased, one blank between words, without bold, the dash of a list, and a stop at the end."""
    return " ".join(text.lower().replace("*", "").split()).strip("- .")


def _said(text: str) -> str:
    """"yes" or "no", where an answer begins or ends with it, else what it says."""
    text = _folded(text)
    found = _YES_NO.fullmatch(text) or _YES_NO.match(text)
    return (found[1] or found[2]) if found else text


def _same_criterion(answer: str, truth: str) -> bool:
    """Equal, also where "presence of" alone is missing, or said in a sentence that names the criterion."""
    answer, truth = _folded(answer), _folded(truth)
    bare = answer == truth.replace("presence of ", "")
    return bare or bool(re.fullmatch(f"{_BEFORE}{re.escape(truth)}{_BEHIND}", answer))


def _leads(text: str) -> frozenset[str]:
    text = text.lower().replace("*", "")
    phrases = _LEADS.findall(text)
    parts = re.findall(rf"\b{_LEAD}", " ".join(phrases)) if phrases else _BETWEEN.split(text)
    return frozenset(re.sub(r"^leads?\s+", "", _folded(part)) for part in parts) - {""}


def _same_range(answer: str, truth: str) -> bool:
    """Equal, or the first range in the answer is that of the truth, "[200ms - 210ms]", brackets and blanks aside."""
    found, truth = _RANGE.search(answer.lower()), _folded(truth)
    return _folded(answer) == truth or bool(found and _closed(f"[{found[0]}]") == _closed(truth))


def _closed(text: str) -> str:
    return "".join(text.split())


_RIGHT: dict[str, Callable[[str, str], bool]] = {
    CRITERION: _same_criterion,
    "lead_grounding": lambda answer, truth: _leads(answer) == _leads(truth),
    "wave_grounding": lambda answer, truth: _folded(answer) == _folded(truth),
    "measurement_grounding": _same_range,
}


def step_right(step: str, answer: str, truth: str) -> float:
    """1 where an answer to a step says its truth, by the benchmark's rules for strings."""
    rule = _RIGHT.get(step, lambda answer, truth: _folded(truth) in (_folded(answer), _said(answer)))
    return float(bool(_folded(answer)) and rule(answer, truth))


Sums = dict[str, tuple[float, float]]  # of each score what is summed, and by what that is divided


def sample_sums(steps: Sequence[tuple[str, float]]) -> Sums:
    """Of one sample's steps in order, (step, whether it is right), as far as they go into a score.

    completion: whether all steps of all loops are right, the first question aside; depth: for each loop with grounding
    how many of its steps in a row are right, 0 to 4, where grounding counts for the part of its questions that are
    right before the first error; given_reasoning: whether the last decision is right; else of each kind of step the
    share that is right after the true steps.
    """
    found: Sums = {}

    def add(name: str, right: float) -> None:
        total, count = found.get(name, (0.0, 0.0))
        found[name] = total + right, count + 1

    loops: list[list[tuple[str, float]]] = []
    for step, right in steps:
        add({FINAL: DECISION}.get(step, step), right)
        if step == CRITERION or (step != INITIAL and not loops):
            loops.append([])
        if step != INITIAL:
            loops[-1].append((step, right))
    add("completion", float(all(right for loop in loops for _, right in loop)))
    for loop in loops:
        if any(step in GROUNDING for step, _ in loop):
            add("depth", _depth(loop))
    add("given_reasoning", loops[-1][-1][1])
    return found


def _depth(loop: Sequence[tuple[str, float]]) -> float:
    grounded = [right for step, right in loop if step in GROUNDING]
    depth = 0.0
    for step, right in loop:
        if not right:
            return depth
        depth += 1 / len(grounded) if step in GROUNDING else 1
    return depth


SCORES = (INITIAL, "completion", "depth", CRITERION, FINDING, *GROUNDING, DECISION, "given_reasoning")


def reasoning_benchmark(conditions: Mapping[str, Sequence[Mapping[str, Any]]], real: str) -> dict[str, Any]:
    """{"reasoning_benchmark": {"all", "by_diagnosis": {diagnosis}, "controls": {condition}, "incomplete"}}.

    Each but the last is {score of SCORES: {"value", "ci95", "n"}}, intervals by a bootstrap over patients; n: what the
    mean is of (samples, loops, or questions). incomplete: samples of which not all steps were asked (`eval.limit`),
    which are in none. Nothing where no prediction is of the benchmark.
    """
    samples = {name: _samples(lines) for name, lines in conditions.items()}
    if not samples[real]:
        return {}
    whole = {name: [lines for lines in found if lines[-1]["name"] == FINAL] for name, found in samples.items()}
    diagnoses: dict[str, list[Any]] = {}
    for lines in whole[real]:
        diagnoses.setdefault(str(lines[0].get("attribute", "")), []).append(lines)
    return {
        "reasoning_benchmark": {
            "all": _scores(whole[real]),
            "by_diagnosis": {name: _scores(diagnoses[name]) for name in sorted(diagnoses)},
            "controls": {name: _scores(found) for name, found in whole.items() if name != real},
            "incomplete": len(samples[real]) - len(whole[real]),
        }
    }


def _samples(lines: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The predictions of each sample and run in the order of its steps, from the first question on."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("name") in STEPS:
            sample = line["id"].rpartition("#")[0]
            found.setdefault((sample, *(line.get(mark) for mark in ("fold", "seed", "draw"))), []).append(line)
    ordered = (sorted(one, key=lambda line: int(line["id"].rpartition("#")[2])) for one in found.values())
    return [one for one in ordered if one[0]["name"] == INITIAL]


def _scores(samples: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    sums = [sample_sums([(line["name"], _right(line)) for line in lines]) for lines in samples]
    names = [name for name in SCORES if any(name in one for one in sums)]
    if not names:
        return {}
    rows = np.array([[part for name in names for part in one.get(name, (0.0, 0.0))] for one in sums])
    resampled = Patients([str(lines[0].get("patient") or lines[0]["id"]) for lines in samples]).resampled(rows)
    found = {}
    for place, name in enumerate(names):
        right, count = rows.sum(0)[2 * place : 2 * place + 2]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = resampled[:, 2 * place] / resampled[:, 2 * place + 1]
        found[name] = {"value": float(right / count), "ci95": ci95(shares), "n": int(count)}
    return found


def _right(line: Mapping[str, Any]) -> float:
    return step_right(line["name"], *(split_response(line[key])[1] for key in ("answer", "truth")))
