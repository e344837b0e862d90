"""From the answers of all conditions to the contents of metrics.json, and a small table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.evaluation.classification import classification, pretrain_breakdown, top_wrong
from elm_jax.evaluation.controls import REAL
from elm_jax.evaluation.dependence import signal_dependence
from elm_jax.evaluation.ecg_qa import QuestionOnly, average_of_types
from elm_jax.evaluation.ecgbench import ecgbench
from elm_jax.evaluation.metrics import Scorer, Table, aggregate
from elm_jax.evaluation.statistics import student_t

MOST_CLASSES = 20
Lines = Sequence[Mapping[str, Any]]


def results_of(
    conditions: Mapping[str, Lines], scorer: Scorer, facts: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """What metrics.json holds. No times are in it: the same answers give the same bytes.

    conditions: predictions under `real` and each control. known: of training, "asked" (name, question, answer) of each
    question and "leaked", how many test questions of other folds are about its patients.
    """
    real = conditions[REAL]
    result = aggregate(real, scorer)
    table = scorer.table(real)
    controls = {name: lines for name, lines in conditions.items() if name != REAL}
    result["controls"] = {name: scorer.table(lines).scores() for name, lines in controls.items()}
    result |= facts
    result |= _runs(real, scorer, result)
    blind = QuestionOnly(known.get("asked", ()))
    if blind:
        answers = {line["id"]: blind.answer(str(line.get("name", "")), str(line.get("question", ""))) for line in real}
        result["baselines"]["question_only"] = table.answered(
            [answers[pair.id.partition("/")[0]] for pair in table.pairs]
        ).values()
    # Pairs must be the same under all conditions, so answers that a protocol leaves out count here.
    paired = scorer if scorer.protocol.empty_answers else Scorer("ours")
    dependence = signal_dependence(real, controls, paired)
    if dependence is not None:
        result["signal_dependence"] = dependence
    if "leaked" in known:
        result["questions_about_training_patients"] = known["leaked"]
    return result | _kinds(table, result) | ecgbench(real)


def _runs(real: Lines, scorer: Scorer, result: dict[str, Any]) -> dict[str, Any]:
    """Scores run by run, where there are several, and over them by Student's t."""
    runs: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for line in real:
        runs.setdefault((line.get("fold"), line.get("seed")), []).append(line)
    if len(runs) < 2:
        return {}
    scores = [scorer.table(lines).values() for lines in runs.values()]
    over = {name: student_t([run[name] for run in scores]) for name in scores[0] if all(name in run for run in scores)}
    if scorer.protocol.intervals == "student_t":
        result["metrics"] = {name: {"value": found["mean"], "ci95": found["ci95"]} for name, found in over.items()}
    named = [
        {"fold": fold, "seed": seed, "n": len(runs[fold, seed]), "metrics": values}
        for (fold, seed), values in zip(runs, scores, strict=True)
    ]
    return {"runs": named, "over_runs": over}


def _kinds(table: Table, result: Mapping[str, Any]) -> dict[str, Any]:
    """What was answered in place of what: by kind of question, as classes where there are few, as statements where
    truths are lists of these; and ECG-QA's average over types."""
    found: dict[str, Any] = {"top_wrong": {}, "classification": {}}
    for name, places in (table.groups("name") or {"": list(range(len(table.pairs)))}).items():
        truths, answers = [table.pairs[i].truth for i in places], [table.pairs[i].answer for i in places]
        found["top_wrong"][name] = top_wrong(truths, answers)
        if 1 < len(set(truths)) <= MOST_CLASSES and len(set(truths)) < len(truths):
            found["classification"][name] = classification(truths, answers)
        if any(";" in truth for truth in truths):
            found.setdefault("statements", {})[name] = pretrain_breakdown(truths, answers)
    average = average_of_types(result["by"].get("name", {}), "answer_set_match")
    return found if average is None else {**found, "ecg_qa": {"average_of_single_types": average}}


def summary(results: Mapping[str, Any]) -> str:
    """The scores as a small table: with the ECG, under each control, and of the best blind answers."""
    columns = {
        "score": results["metrics"],
        **results["controls"],
        **{
            name: {m: {"value": v} for m, v in scores.items()}
            for name, scores in results["baselines"].items()
        },
    }
    width = max(len(name) for name in results["metrics"])
    widths = {name: max(11, len(name) + 2) for name in columns}
    lines = [" " * width + "".join(f"{name:>{widths[name]}}" for name in columns)]
    for metric in results["metrics"]:
        cells = (
            f"{scores[metric]['value']:>{widths[name]}.3f}" if metric in scores else " " * widths[name]
            for name, scores in columns.items()
        )
        lines.append(f"{metric:<{width}}" + "".join(cells))
    for name, reason in results.get("unavailable", {}).items():
        lines.append(f"no {name}: {reason}")
    dependence = results.get("signal_dependence")
    if dependence:
        low, high = dependence["ci95"]
        lines.append(
            f"signal dependence (score less {dependence['control']}): {dependence['value']:.3f}"
            f" [{low:.3f}, {high:.3f}], p = {dependence['p']:.2g}"
        )
    return "\n".join(lines)
