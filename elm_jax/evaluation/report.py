"""`report.html`: an evaluation on one page that needs nothing else: no network, no other file.

Scores beside controls and blind answers, what the score owes to the signal, what was taken for what, and examples
with their ECGs. Its text is `templates/report.html`; here is what it is filled with.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.data.dataset import Dataset
from elm_jax.errors import printable
from elm_jax.evaluation.controls import RETRIEVED
from elm_jax.evaluation.examples import chosen_examples
from elm_jax.evaluation.results import SHOWN_CLASSES, least_p_note, notes, perfect_note, unshuffled_note
from elm_jax.pictures import svg
from elm_jax.pictures.ecg_paper import small_png
from elm_jax.pictures.page import filled
from elm_jax.pictures.svg import Bar
from elm_jax.scoring.metrics import is_right
from elm_jax.scoring.statistics import p_text

SHOWN, LISTED = 24, 500  # examples with their ECG, and predictions in the list
_LEVELS = 40  # rows of a table by kind

Results = Mapping[str, Any]
Predictions = Sequence[Mapping[str, Any]]


def write_report(out: Path, results: Results, predictions: Predictions, dataset: Dataset) -> None:
    """Write `report.html` and the plots in it, `plots/*.svg`."""
    plots = plots_of(results)
    shutil.rmtree(out / "plots", ignore_errors=True)  # under another protocol there may have been others
    (out / "plots").mkdir()
    for name, plot in plots.items():
        text = plot.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        (out / "plots" / f"{name}.svg").write_text(text, encoding="utf-8")
    text = report(f"{out.parent.parent.name}: {out.name}", results, plots, predictions, _cards(predictions, dataset))
    temporary = out / "report.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out / "report.html")


def report(
    title: str, results: Results, plots: Mapping[str, str], predictions: Predictions, examples: Iterable[Results]
) -> str:
    """The page. examples: {"question", "answer", "truth", "mark", "kind", "id", "seconds", "prompt", "pictures"}."""
    return filled(
        "report.html", title=title, results=results, plots=plots, examples=list(examples), rows=_rows(predictions),
        predictions_count=len(predictions), most_levels=_LEVELS, shown_classes=SHOWN_CLASSES, notes=notes,
        perfect_note=perfect_note, least_p_note=least_p_note, unshuffled_note=unshuffled_note, p_text=p_text,
        brings_rows=_brings_rows, retrieved_rows=_retrieved_rows,
    )  # fmt: skip


def plots_of(results: Results) -> dict[str, str]:
    """Name -> SVG."""
    plots = {"scores": svg.bars("scores with 95 % intervals", [_bar(n, s) for n, s in results["metrics"].items()])}
    dependence = results.get("signal_dependence")
    if dependence:
        rows = [_bar(f"less {name}", d, svg.ORANGE) for name, d in dependence["by_control"].items()]
        rows += [_bar(f"{name}, less {dependence['control']}", d) for name, d in dependence["by_name"].items()]
        rows = rows[:_LEVELS]
        low = min(0.0, *(row.interval[0] if row.interval else row.value for row in rows))
        plots["dependence"] = svg.bars("exact matches owed to the signal", rows, -1.0 if low < -0.05 else low, 1.0)
    for kind, wrong in results["top_wrong"].items():
        if wrong:
            rows = [(item["answer"] or "(empty)", item["count"]) for item in wrong]
            plots[f"wrong_{_file(kind)}"] = svg.counts(f"wrong answers: {kind}", rows, svg.RED)
    for kind, found in results["classification"].items():
        if found["other"]:
            rows = [(answer or "(empty)", count) for answer, count in list(found["other"].items())[:10]]
            plots[f"other_{_file(kind)}"] = svg.counts(f"answers that are no class: {kind}", rows, svg.GREY)
    for kind, found in results.get("statements", {}).items():
        for side in ("missed", "extra"):
            if found[f"top_{side}"]:
                rows = [(str(name), int(count)) for name, count in found[f"top_{side}"]]
                plots[f"{side}_{_file(kind)}"] = svg.counts(f"{side} statements: {kind}", rows, svg.ORANGE)
    return plots


def _cards(predictions: Predictions, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The examples with their ECGs as pictures."""
    for line, example in chosen_examples(dataset, predictions, SHOWN):
        pictures = [_picture(ecg, dataset.signal.sampling_rate) for ecg in example.ecgs]
        texts = {"question": example.question, "answer": example.answer, "truth": example.truth}
        facts = {name: line[name] for name in ("id", "seconds", "prompt")} | {"kind": str(line.get("name", ""))}
        yield {**texts, **facts, "mark": "right" if example.correct else "wrong", "pictures": pictures}


def _picture(ecg: np.ndarray, rate: float) -> str:
    """The ECG on paper as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(small_png(ecg, rate)).decode()}"


def _rows(predictions: Predictions) -> list[list[str]]:
    """The list of answers: id, kind, question, answer, truth, mark, seconds."""
    rows = []
    for line in predictions[:LISTED]:
        right = is_right(str(line.get("name", "")), line["answer"], line["truth"])
        texts = [line["id"], line.get("name", ""), line.get("question", ""), line["answer"], line["truth"]]
        texts = [printable(str(text), "\n\t") for text in texts]
        rows.append([*texts, "right" if right else "wrong", f"{line['seconds']:.3f}"])
    return rows


def _brings_rows(brings: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Metric, and what it has more than under each control of what is retrieved."""
    return [
        [metric, *(f"{less[name]:+.3f}" if name in less else "" for name in RETRIEVED)]
        for metric, less in brings.items()
    ]


def _retrieved_rows(shown: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """ECG, what was retrieved for it, whose that is, how far away, and its report."""
    names = "ecg", "retrieved", "whose"
    return [
        [*(printable(one[name]) for name in names), f"{one['distance']:.4g}", printable(one["report"])] for one in shown
    ]


def _bar(name: str, score: Mapping[str, Any], colour: str = svg.BLUE) -> Bar:
    low_high = score.get("ci95")
    return Bar(name, score["value"], tuple(low_high) if low_high else None, colour)


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name) or "all"
