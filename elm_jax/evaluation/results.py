"""From the answers of all conditions to the contents of metrics.json, and a small table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.config import Config
from elm_jax.evaluation.controls import REAL, RETRIEVED
from elm_jax.evaluation.retrieved import brought, retrieval_notes
from elm_jax.scoring.classification import classification, pretrain_breakdown, top_wrong
from elm_jax.scoring.dependence import pairing, signal_dependence
from elm_jax.scoring.ecg_qa import QuestionOnly, average_of_types, macro_f1
from elm_jax.scoring.ecgbench import ecgbench
from elm_jax.scoring.grounding import by_kind
from elm_jax.scoring.metrics import FIELDS, Scorer, Table, question_id
from elm_jax.scoring.reasoning import reasoning_benchmark
from elm_jax.scoring.statistics import SIGNIFICANT, p_text, student_t
from elm_jax.scoring.summary import scores_of

MOST_CLASSES = 100
LESS_THAN_ONE = 0.95  # METEOR gives a long answer that is equal a little less than 1, too
SHOWN_CLASSES = 20  # of a confusion matrix on a page
Lines = Sequence[Mapping[str, Any]]


def results_of(
    conditions: Mapping[str, Lines], scorer: Scorer, facts: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """What metrics.json holds. No times are in it: the same answers give the same bytes.

    conditions: predictions under `real` and each control. facts: what stands beside the scores as it is, `asked_with`
    among it. known: of training, "asked" (name, question, answer) of each question and "leaked", how many test
    questions of other folds are about its patients.
    """
    real = conditions[REAL]
    tables = {name: scorer.table(lines) for name, lines in conditions.items()}
    table = tables.pop(REAL)
    result = scores_of(table)
    result["unfinished_answers"] = sum(not line.get("ended", True) for line in real)
    result["cut_ecgs"] = sum("ecg_tokens_cut" in line for line in real)
    result["controls"] = {name: control.scores() for name, control in tables.items()}
    result |= facts
    result |= _runs(real, scorer, result)
    blind = _blind(table, real, known.get("asked", ()))
    if "question_only" in blind:
        result["baselines"]["question_only"] = blind["question_only"].values()
    result["baselines_by"] = _baselines_by(table, blind)
    ecgs = {name: control for name, control in tables.items() if name not in RETRIEVED}
    dependence = _dependence(conditions, table, ecgs)
    if "retrieval" in result:
        result["retrieval"] = {**result["retrieval"], "brings": brought(result["metrics"], result["controls"])}
    if dependence is not None:
        result["signal_dependence"] = dependence
    if "leaked" in known:
        result["questions_about_training_patients"] = known["leaked"]
    result |= _kinds(table) | _ecg_qa(table, blind, result) | ecgbench(real) | _grounding(table)
    return result | reasoning_benchmark(conditions, REAL)


def _grounding(table: Table) -> dict[str, Any]:
    """What answers say that is measured, kind by kind, and where they contradict it."""
    held = table.part([i for i, pair in enumerate(table.pairs) if pair.measured is not None])
    return {"grounding": by_kind({p.id: p.grounded for p in held.pairs}, held.patients)} if held.pairs else {}


def _dependence(conditions: Mapping[str, Lines], table: Table, controls: Mapping[str, Table]) -> dict[str, Any] | None:
    scorer = pairing(table.scorer)
    if scorer is not table.scorer:
        table, controls = scorer.table(conditions[REAL]), {name: scorer.table(conditions[name]) for name in controls}
    return signal_dependence(table, controls)


def _blind(table: Table, real: Lines, asked: Iterable[tuple[str, str, str]]) -> dict[str, Table]:
    """The same questions answered by who sees no ECG: by the majority, and by the questions' words."""
    found = {"majority": table.majority} if table.pairs else {}
    # Of training what the protocol sees of it, as of the truths here.
    seen = ((name, question, table.scorer.seen(answer)) for name, question, answer in asked)
    learnt = QuestionOnly(one for one in seen if one[2])
    if learnt:
        questions = {question_id(line): (str(line.get("name", "")), str(line.get("question", ""))) for line in real}
        found["question_only"] = table.answered([learnt.answer(*questions[pair.id]) for pair in table.pairs])
    return found


def _baselines_by(table: Table, blind: Mapping[str, Table]) -> dict[str, Any]:
    """{field: {level: {baseline: {metric: score}}}}: what stands beside `by`."""
    return {
        field: {
            level: {name: other.part(places).values() for name, other in blind.items()}
            for level, places in levels.items()
        }
        for field in FIELDS
        if (levels := table.groups(field))
    }


def _runs(real: Lines, scorer: Scorer, result: dict[str, Any]) -> dict[str, Any]:
    """Scores run by run, where there are several, and over them by Student's t."""
    runs: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for line in real:
        runs.setdefault((line.get("fold"), line.get("seed")), []).append(line)
    if len(runs) < 2:
        return {}
    tables = [scorer.table(lines) for lines in runs.values()]
    named = [
        {"fold": fold, "seed": seed, "n": len(table.pairs), "metrics": table.values()}
        for (fold, seed), table in zip(runs, tables, strict=True)
    ]
    scores = [run["metrics"] for run in named if run["n"]]  # a run of which the protocol keeps no pair has no score
    shared = [name for name in (scores[0] if scores else ()) if all(name in run for run in scores)]
    over = {name: student_t([run[name] for run in scores]) for name in shared}
    if scorer.protocol.intervals == "student_t" and len(scores) > 1:
        result["metrics"] = {name: {"value": found["mean"], "ci95": found["ci95"]} for name, found in over.items()}
    return {"runs": named, "over_runs": over}


def _ecg_qa(table: Table, blind: Mapping[str, Table], result: dict[str, Any]) -> dict[str, Any]:
    """ECG-QA's mean over the three types about one ECG, beside that of blind answers, and macro F1 over templates."""
    found: dict[str, Any] = {}
    for field in ("question_type", "name"):
        types = {kind: table.part(places).values() for kind, places in table.groups(field).items()}
        average = average_of_types(types, "answer_set_match")
        if average is not None:
            levels = result["baselines_by"][field]
            beside = {name: {kind: levels[kind][name] for kind in levels} for name in blind}
            found["average_of_single_types"] = average
            found["baselines"] = {name: average_of_types(by, "answer_set_match") for name, by in beside.items()}
            break
    templates = table.groups("template_id")
    for level, places in templates.items():
        chosen = [table.pairs[i] for i in places]
        score = macro_f1([pair.truth for pair in chosen], [pair.answer for pair in chosen])
        result["by"]["template_id"][level]["macro_f1"] = {"value": score, "n": len(places)}
    if templates:
        scores = [score["macro_f1"] for score in result["by"]["template_id"].values()]
        values, sizes = [score["value"] for score in scores], [score["n"] for score in scores]
        found["template_macro_f1"] = {
            "unweighted": float(np.mean(values)),
            "weighted": float(np.average(values, weights=sizes)),
        }
    return {"ecg_qa": found} if found else {}


def _kinds(table: Table) -> dict[str, Any]:
    """What was answered in place of what: by kind of question, as classes where there are few, as statements where
    truths are lists of these."""
    found: dict[str, Any] = {"top_wrong": {}, "classification": {}}
    for name, places in table.groups("name", "").items():
        truths, answers = [table.pairs[i].truth for i in places], [table.pairs[i].answer for i in places]
        found["top_wrong"][name] = top_wrong(truths, answers)
        classes, n = len(set(truths)), len(truths)
        if 1 < classes < n and classes <= min(MOST_CLASSES, max(SHOWN_CLASSES, n // 2)):
            found["classification"][name] = classification(truths, answers)
        if any(";" in truth for truth in truths):
            found.setdefault("statements", {})[name] = pretrain_breakdown(truths, answers)
    return found


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
    width = max(map(len, results["metrics"]), default=0)
    widths = {name: max(11, len(name) + 2) for name in columns}
    if not results["metrics"]:
        lines = ["nothing was scored: the protocol leaves out every answer"]
    else:
        lines = [" " * width + "".join(f"{name:>{widths[name]}}" for name in columns)]
    for metric in results["metrics"]:
        cells = (
            f"{scores[metric]['value']:>{widths[name]}.3f}" if metric in scores else " " * widths[name]
            for name, scores in columns.items()
        )
        lines.append(f"{metric:<{width}}" + "".join(cells))
    if judged := results.get("judged"):
        scores = ", ".join(f"{name} {one['value']:.3g}" for name, one in judged.get("criteria", {}).items())
        lines.append(f"judged by {judged['model']}: {scores or 'absent: ' + judged['absent']}")
    for name, reason in results.get("unavailable", {}).items():
        lines.append(f"no {name}: {reason}")
    dependence = results.get("signal_dependence")
    if dependence:
        low, high = dependence["ci95"]
        lines.append(
            f"signal dependence (score less {dependence['control']}): {dependence['value']:.3f}"
            f" [{low:.3f}, {high:.3f}], p {p_text(dependence['p'])}{least_p_note(dependence)}"
        )
    if "reasoning_benchmark" in results:
        found = results["reasoning_benchmark"]["all"]
        told = ("{} {value:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}]".format(name, **score) for name, score in found.items())
        lines.append(f"ECG-Reasoning-Benchmark: {', '.join(told) or 'no whole sample'}")
    lines += filter(None, [perfect_note(results), unshuffled_note(results), *notes(results)])
    return "\n".join(lines)


def asked_with(config: Config) -> dict[str, Any]:
    """What decides how answers come about, beside the model and the questions; it stands with the scores."""
    names = ("limit", "max_new_tokens", "temperature", "top_p", "repetition_penalty")
    asked = {name: getattr(config.eval, name) for name in names}
    return {**asked, "perturb": config.data.perturb, "compat": list(config.compat)}


def notes(results: Mapping[str, Any]) -> list[str]:
    """What one should know of the answers before one reads a score, in sentences; nothing where all is as expected."""
    found, perturb = [], results["asked_with"]["perturb"]
    if perturb is not None:
        found.append(f"data.perturb={perturb}: the model was not shown the ECGs, and no score is about them")
    found += retrieval_notes(results["retrieval"]) if "retrieval" in results else []
    if results["unfinished_answers"]:
        most = results["asked_with"]["max_new_tokens"]
        found.append(f"{results['unfinished_answers']} answers were cut off at {most} tokens (eval.max_new_tokens)")
    if results["cut_ecgs"]:
        found.append(f"{results['cut_ecgs']} questions had more symbols of ECGs than the model's context has room for")
    if unread := results.get("grounding_unread"):
        found.append(f"{unread} records are not held against their ECGs (grounding): the recordings cannot be read")
    if results["empty_answers_left_out"]:
        found.append(f"{results['empty_answers_left_out']} empty answers are left out, by the protocol")
    return found


def perfect_note(results: Mapping[str, Any]) -> str:
    """What answers equal to their truths would have of the metrics that give them less than 1, in a sentence."""
    less = [f"{name} {value:.2g}" for name, value in results["perfect"].items() if value < LESS_THAN_ONE]
    return f"answers equal to every truth would have {' and '.join(less)}, made for longer texts" if less else ""


def least_p_note(dependence: Mapping[str, Any]) -> str:
    """What a p that cannot be small for want of patients says of itself; nothing where it can."""
    least = dependence["least_p"]
    return f" (with so few patients it is at least {p_text(least)})" if least >= SIGNIFICANT else ""


def unshuffled_note(results: Mapping[str, Any]) -> str:
    """What the control `shuffled` could not shuffle, in a sentence; nothing where all questions got another's ECG."""
    found = results.get("shuffled_ecgs", {})
    if not found or not found["own_ecg"] + found["same_patient"]:
        return ""
    return (
        f"shuffled: of {found['answers']} answers {found['own_ecg']} are about the question's own ECG and"
        f" {found['same_patient']} about another one of the same patient, for want of others"
    )
