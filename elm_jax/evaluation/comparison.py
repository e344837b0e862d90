"""Several runs on the same questions: their scores side by side, and which differences are more than chance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import UserError, nearest
from elm_jax.evaluation.results import perfect_note
from elm_jax.evaluation.store import CONTROLS, answers_in, predictions_in
from elm_jax.folders import read_json, read_run_config
from elm_jax.pictures.page import filled
from elm_jax.pictures.svg import Bar, bars
from elm_jax.scoring.dependence import METRIC, PREFERRED, by_question, pairing, tested
from elm_jax.scoring.metrics import Scorer, Table, question_id
from elm_jax.scoring.statistics import SIGNIFICANT, ci95, p_text

Lines = Sequence[Mapping[str, Any]]
_STAR = f"* significant: p below {SIGNIFICANT:g} after Holm's correction for all that is compared"


def compare(
    folders: Sequence[Path], evaluation: str | None = None, protocol: str = "ours",
    wordnet: str | None = None, bert_model: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare the run folders' evaluations called `evaluation` (None: the one that all have).

    {"evaluation", "protocol", "n", "patients", "least_p", "least_p_holm", "control", "perfect",
    "runs": {run: {"metrics", "signal_dependence": {"value", "ci95", "p", "n"}}},
    "differences": [{"a", "b", "metrics": {metric: {"value", "ci95", "p", "p_holm"}}, "signal_dependence"}]}:
    a's score less b's, paired by question, on the questions that all answered. The interval is a bootstrap over
    patients. p is of one test for every metric: the two runs' answers swapped patient by patient
    (`Patients.swap_p`). p_holm is corrected for all metrics and signal dependences of all pairs (Holm 1979); it
    cannot be below least_p_holm, which the numbers of patients and of comparisons set.

    The signal dependence is of all these questions under the first control that all runs answered, named in "control";
    it is None where there is none. Under a protocol that leaves out empty answers it counts them as wrong.

    wordnet, bert_model: as `eval.wordnet` and `eval.bert_model`; None: what a run's configuration names, if there.

    Raises:
        UserError: fewer than two runs, no common evaluation, no common question, or no such WordNet or model.
    """
    if len(folders) < 2:
        raise UserError("compare", f"{len(folders)} run", "at least two", "name more run folders")
    name = evaluation or _common_evaluation(folders)
    names, outs = _names(folders), [folder / "eval" / name for folder in folders]
    lines = _on_common_questions([predictions_in(out) for out in outs], name)
    end_token = str(read_json(outs[0] / "metrics.json").get("end_token", ""))
    scorer = _scorer(folders, protocol, wordnet, bert_model, end_token)
    control, owed, asked = _owed(outs, lines, pairing(scorer))
    if not scorer.protocol.empty_answers:
        kept = [{pair.id for pair in scorer.pairs(run)} for run in lines]
        both = set.intersection(*kept)
        lines = [[line for line in run if question_id(line) in both] for run in lines]
    tables = [scorer.table(run) for run in lines]
    runs = {
        run: {"metrics": scores.scores(), "signal_dependence": tested(o, asked) | {"n": len(o)} if control else None}
        for run, scores, o in zip(names, tables, owed, strict=True)
    }
    pairs = [
        {"a": names[i], "b": names[j], "metrics": _differences(tables[i], tables[j]),
         "signal_dependence": tested(owed[i] - owed[j], asked) if control else None}
        for i, j in combinations(range(len(folders)), 2)
    ]  # fmt: skip
    compared = [d for pair in pairs for d in (*pair["metrics"].values(), pair["signal_dependence"]) if d]
    _correct(compared)
    patients = tables[0].patients
    least_p = min(patients.least_p, asked.patients.least_p)  # a protocol may leave out answers that the latter has
    return {
        "evaluation": name, "protocol": protocol, "n": len(tables[0].pairs), "patients": patients.count,
        "least_p": least_p, "least_p_holm": min(1.0, len(compared) * least_p), "control": control,
        "unavailable": scorer.unavailable, "perfect": tables[0].perfect(), "runs": runs, "differences": pairs,
    }  # fmt: skip


def _scorer(folders: Sequence[Path], protocol: str, wordnet: str | None, bert_model: str | None, end: str) -> Scorer:
    """With what is named, which must be there; else with what the runs name, which this machine may lack."""
    is_named = wordnet is not None or bert_model is not None
    if not is_named:
        wordnet, bert_model = (
            next(filter(None, (_told(folder, key) for folder in folders)), None) for key in ("wordnet", "bert_model")
        )
    return Scorer(protocol, wordnet, bert_model, end, must=is_named)


def _told(folder: Path, key: str) -> str | None:
    """What a run's configuration says of `eval.<key>`."""
    path = folder / "config.json"
    section = read_run_config(folder).get("eval", {})
    value = section.get(key) if isinstance(section, dict) else section
    if value is not None and not isinstance(value, str):
        fix = "put the run's own config.json back"
        raise UserError(f"{path}, eval.{key}", repr(value)[:80], "text or nothing", fix)
    return value


def _differences(a: Table, b: Table) -> dict[str, dict[str, Any]]:
    """{metric: a's score less b's, with its interval and p}; both tables hold the same questions in one order."""
    found = {}
    for name in (name for name in a.rows if name in b.rows):
        metric, patients = a.scorer.metrics[name], a.patients
        mine, theirs = a.rows[name], b.rows[name]
        width = mine.shape[1]
        sums = patients.resampled(np.concatenate([mine, theirs], axis=1))
        resampled = metric.value(sums[:, :width]) - metric.value(sums[:, width:])
        value = float(metric.value(mine.sum(0)) - metric.value(theirs.sum(0)))
        p = patients.swap_p(mine, theirs, metric.value)
        found[name] = {"value": value, "ci95": ci95(resampled), "p": p}
    return found


def _owed(outs: Sequence[Path], lines: Sequence[Lines], scorer: Scorer) -> tuple[str | None, list[np.ndarray], Table]:
    """The control; of each run (n,) what each question owes to the signal: right or not, less that under the control;
    the table of the n questions. The control is the first under which all runs answered all of them, or None."""
    tables = [_right_or_not(scorer, run) for run in lines]
    for control in PREFERRED if tables[0].pairs else ():
        answered = [_right_or_not(scorer, answers_in(out / CONTROLS / f"{control}.jsonl")) for out in outs]
        known = [by_question(table, METRIC) for table in answered]
        if all(pair.id in scores for pair in tables[0].pairs for scores in known):
            owed = [
                table.rows[METRIC][:, 0] - np.array([np.mean(scores[pair.id]) for pair in table.pairs])
                for table, scores in zip(tables, known, strict=True)
            ]
            return control, owed, tables[0]
    return None, [np.zeros(0) for _ in outs], tables[0]


def _right_or_not(scorer: Scorer, lines: Lines) -> Table:
    pairs = scorer.pairs(lines)
    return Table(scorer, pairs, {METRIC: scorer.rows(METRIC, pairs)} if pairs else {})


def _correct(differences: Iterable[dict[str, Any]]) -> None:
    """Add p_holm to every difference."""
    every = sorted(differences, key=lambda d: d["p"])
    least = 0.0
    for rank, difference in enumerate(every):
        least = max(least, min(1.0, (len(every) - rank) * difference["p"]))
        difference["p_holm"] = least


def _on_common_questions(runs: Sequence[Lines], name: str) -> list[list[Mapping[str, Any]]]:
    """The lines of each run about the questions that all answered, in one order.

    Raises:
        UserError: there are none, or a question has several true answers.
    """
    if len({any("seed" in line for line in run) for run in runs}) > 1:
        raise UserError(
            f"eval/{name}", "greedy answers, which are one run for all seeds, beside drawn ones of several seeds",
            "answers of one kind", "evaluate all runs with eval.temperature=0, or draw without eval.seeds",
        )  # fmt: skip
    by_id = [{question_id(line): line for line in run} for run in runs]
    common = [key for key in by_id[0] if all(key in other for other in by_id)]
    for key in common:
        if len({lines[key]["truth"] for lines in by_id}) > 1:
            fix = "compare evaluations of the same data"
            raise UserError(f"eval/{name}", f"other true answers to {key}", "the same questions", fix)
    if not common:
        raise UserError(f"eval/{name}", "no question that all runs answered", "the same test questions",
                        "evaluate the runs on the same data")  # fmt: skip
    return [[lines[key] for key in common] for lines in by_id]


def _common_evaluation(folders: Sequence[Path]) -> str:
    found = [{path.parent.name for path in folder.glob("eval/*/predictions.jsonl")} for folder in folders]
    common = sorted(set.intersection(*found))
    if len(common) != 1:
        have = "; ".join(f"{f}: {', '.join(sorted(n)) or 'none'}" for f, n in zip(folders, found, strict=True))
        fix = f"give --eval {common[0]}" if common else "evaluate all runs on the same data"
        raise UserError("compare", have, "one evaluation that all runs have", fix)
    return common[0]


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names of the runs, all different."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def text_of(result: Mapping[str, Any]) -> str:
    """The comparison as two tables."""
    runs, metrics = result["runs"], list(next(iter(result["runs"].values()))["metrics"])
    width = max(map(len, (*metrics, "signal dependence")))
    lines = [f"{result['evaluation']}: {_asked(result)}", " " * width + "".join(f"{_cut(name):>26}" for name in runs)]
    for metric in metrics:
        cells = (f"{_with_interval(run['metrics'].get(metric)):>26}" for run in runs.values())
        lines.append(f"{metric:<{width}}" + "".join(cells))
    told = "".join(f"{_with_interval(run['signal_dependence']):>26}" for run in runs.values())
    lines += [f"{'signal dependence':<{width}}{told}", ""]
    lines += [f"no {metric}: {reason}" for metric, reason in result["unavailable"].items()]
    lines += filter(None, [perfect_note(result), _no_star(result)])
    for pair in result["differences"]:
        lines.append(f"{pair['a']} less {pair['b']}")
        for metric, d in (*pair["metrics"].items(), ("signal dependence", pair["signal_dependence"])):
            if d:
                p, mark = f"p {p_text(d['p']):<8} corrected {p_text(d['p_holm']):<8}", _star(d)
                lines.append(f"  {metric:<{width}} {_with_interval(d):>26}   {p}{mark}".rstrip())
    return "\n".join(lines)


def _asked(result: Mapping[str, Any]) -> str:
    """What all runs answered, and by which protocol it is scored."""
    text = f"{result['n']} questions about {result['patients']} patients that all runs answered"
    less = f"; signal dependence: exact match less {result['control']}" if result["control"] else ""
    return f"{text}; protocol {result['protocol']}{less}"


def _no_star(result: Mapping[str, Any]) -> str:
    """Why no difference can be marked, in a sentence; nothing where one can."""
    if result["least_p_holm"] < SIGNIFICANT:
        return ""
    least, corrected = p_text(result["least_p"]), p_text(result["least_p_holm"])
    few = f"of {result['patients']} patients the least p is {least}, corrected for all that is compared {corrected}"
    return f"no difference can be significant: {few}"


def _star(difference: Mapping[str, Any]) -> str:
    return "*" if difference["p_holm"] < SIGNIFICANT else ""


def html_of(result: Mapping[str, Any]) -> str:
    """The comparison as one page."""
    plots = {
        metric: bars(metric, [
            Bar(name, score["value"], tuple(score["ci95"]))
            for name, run in result["runs"].items() if (score := run["metrics"].get(metric))
        ])
        for metric in next(iter(result["runs"].values()))["metrics"]
    }  # fmt: skip
    said = list(filter(None, [_asked(result), perfect_note(result), _no_star(result), _STAR]))
    return filled("compare.html", result=result, plots=plots, said=said, p_text=p_text, star=_star)


def _with_interval(score: Mapping[str, Any] | None) -> str:
    if not score:
        return ""
    return f"{score['value']:.3f} [{score['ci95'][0]:.3f}, {score['ci95'][1]:.3f}]"


def _cut(name: str) -> str:
    return name if len(name) < 25 else f"{name[:11]}…{name[-12:]}"


def check_evaluation(folders: Sequence[Path], name: str | None) -> None:
    """Raise UserError unless every folder has the evaluation `name`."""
    for folder in folders:
        known = sorted(path.parent.name for path in folder.glob("eval/*/metrics.json"))
        if name is not None and name not in known:
            fix = nearest(name, known) or "evaluate the run on it"
            raise UserError("--eval", f"{name}, which {folder} lacks", ", ".join(known) or "an evaluation", fix)
