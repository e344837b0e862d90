"""`report.html`: an evaluation on one page that needs nothing else: no network, no other file.

Scores beside controls and blind answers, what the score owes to the signal, what was taken for what, and examples
with their ECGs.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elm_jax.data.dataset import Dataset
from elm_jax.errors import printable
from elm_jax.evaluation.examples import chosen_examples
from elm_jax.evaluation.results import SHOWN_CLASSES, few_text, kept_text, notes, short_text
from elm_jax.pictures import svg
from elm_jax.pictures.ecg_paper import draw_ecg
from elm_jax.pictures.page import breakable, page, table
from elm_jax.pictures.svg import Bar
from elm_jax.scoring.metrics import is_right
from elm_jax.scoring.statistics import told_p

SHOWN, LISTED = 24, 500  # examples with their ECG, and predictions in the list
_COLOURS = 32  # of an ECG's picture: paper, grid and ink
_RIGHT, _WRONG = "47,93,155", "217,122,30"  # blue and orange, which no colour blindness takes for one
_LEVELS = 40  # rows of a table by kind

Results = Mapping[str, Any]


def write_report(out: Path, results: Results, predictions: Sequence[Mapping[str, Any]], dataset: Dataset) -> None:
    """Write `report.html` and the plots in it, `plots/*.svg`."""
    plots = _plots(results)
    shutil.rmtree(out / "plots", ignore_errors=True)  # under another protocol there may have been others
    (out / "plots").mkdir()
    for name, plot in plots.items():
        text = plot.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        (out / "plots" / f"{name}.svg").write_text(text, encoding="utf-8")
    sections = [
        ("Scores", _scores(results) + plots["scores"]),
        ("Does the model read the ECG?", _dependence(results) + plots.get("dependence", "")),
        ("By kind of question", _by(results)),
        ("What was taken for what", _confusions(results) + _wrong(plots) + _statements(results, plots)),
        ("Examples", _examples(predictions, dataset)),
        ("Answers", _listed(predictions)),
    ]
    title = f"{out.parent.parent.name}: {out.name}"
    text = page(title, _facts(results), [(name, body) for name, body in sections if body])
    temporary = out / "report.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out / "report.html")


def _facts(results: Results) -> str:
    parts = [
        f"{results['n']} questions about {results['patients']} patients", f"split {results['split']}",
        f"checkpoint of step {results['step']}",
        f"protocol <b>{escape(results['protocol'])}</b>: {escape(results['protocol_meaning'])}",
        _drawn(results["asked_with"]), f"{results['empty_answers']} empty answers",
        f"{results['bad']} records left out",
    ]  # fmt: skip
    if "greedy_for_seeds" in results:
        parts.append(f"greedy answers, one run for the seeds {', '.join(map(str, results['greedy_for_seeds']))}")
    if results.get("questions_about_training_patients"):
        parts.append(f"<b>{results['questions_about_training_patients']} questions about patients of the training</b>")
    if results.get("labels_bad"):
        parts.append(f"{results['labels_bad']} more recordings left out of the labels")
    told = [f"<b>{escape(note)}</b>" for note in notes(results)]
    return "".join(f"<p>{text}</p>" for text in (" · ".join(parts), *told))


def _drawn(how: Results) -> str:
    """How answers came about."""
    parts = [f"at most {how['max_new_tokens']} tokens an answer"]
    if how["temperature"]:
        parts.append(f"drawn at temperature {how['temperature']:g}, top_p {how['top_p']:g}")
    else:
        parts.append("greedy")
    if how["repetition_penalty"] != 1:
        parts.append(f"repetition penalty {how['repetition_penalty']:g}")
    if how["limit"] is not None:
        parts.append(f"the first {how['limit']} questions")
    if how["compat"]:
        parts.append(f"compat {', '.join(how['compat'])}")
    return escape(", ".join(parts))


def _scores(results: Results) -> str:
    columns = {"score": results["metrics"], **results["controls"]}
    blind = results["baselines"]
    head = ["metric", *columns, *(f"best {name} answer" for name in blind)]
    rows = [
        [name, *(_cell(s.get(name)) for s in columns.values()), *(_number(s.get(name)) for s in blind.values())]
        for name in results["metrics"]
    ]
    over = results.get("over_runs", {})
    runs = [
        [name, _number(v["mean"]), _number(v["std"]), _interval(v["ci95"])] for name, v in over.items()
    ]
    said = [short_text(results), *(f"no {name}: {why}" for name, why in results["unavailable"].items())]
    below = "".join(f"<p>{escape(text)}</p>" for text in said if text)
    more = f"<h3>Over {len(results.get('runs', ()))} runs (Student's t)</h3>" if runs else ""
    return table(head, rows) + below + more + (table(["metric", "mean", "deviation", "95 %"], runs) if runs else "")


def _plots(results: Results) -> dict[str, str]:
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


def _dependence(results: Results) -> str:
    found = results.get("signal_dependence")
    if not found:
        return ""
    rows = [
        [name, _signed(d["value"]), _interval(d["ci95"]), *(escape(told_p(d.get(p))) for p in ("p", "mcnemar_p"))]
        for name, d in found["by_control"].items()
    ]
    low, high = found["ci95"]
    said = "reads the signal" if low > 0 and found["p"] < 0.01 else "does not show that it reads the signal"
    text = (
        f"<p>Of its exact matches the model owes <b>{found['value']:.3f}</b> [{low:.3f}, {high:.3f}] to the ECG"
        f" (score less control <i>{escape(found['control'])}</i>, paired by question, p"
        f" {escape(told_p(found['p']) + few_text(found))}): it {said}.</p>"
    )
    text += f"<p><b>{escape(kept)}</b></p>" if (kept := kept_text(results)) else ""
    return text + table(["control", "difference", "95 %", "p (signs flipped by patient)", "p (McNemar)"], rows)


def _by(results: Results) -> str:
    parts = []
    for name, levels in results["by"].items():
        metrics = list(dict.fromkeys(metric for scores in levels.values() for metric in scores))
        beside = results.get("baselines_by", {}).get(name, {})
        blind = next(iter(beside.values()), {})
        compared = [metric for metric in ("exact_match", "answer_set_match") if metric in metrics]
        rows = [
            [level, str(next(iter(scores.values()))["n"]) if scores else "0",
             *(_cell(scores.get(m)) for m in metrics),
             *(_number(beside[level][b].get(m)) for m in compared for b in blind)]
            for level, scores in list(levels.items())[:_LEVELS]
        ]  # fmt: skip
        more = f"<p>and {len(levels) - _LEVELS} more, in metrics.json</p>" if len(levels) > _LEVELS else ""
        head = [name, "n", *metrics, *(f"{m}, {b}" for m in compared for b in blind)]
        parts.append(f"<h3>{escape(name)}</h3>" + table(head, rows) + more)
    for name, scores in results.get("ecgbench", {}).items():
        parts.append(f"<h3>ECGBench: {escape(name)}</h3>" + _benchmark(scores))
    for family, scores in results.get("labels", {}).items():
        head = ["labels", "macro F1", "micro F1", "macro AUC"]
        cells = [_cell(scores[name]) for name in ("macro_f1", "micro_f1", "macro_auc")]
        row = [str(len(scores["labels"])), *cells]
        parts.append(f"<h3>PTB-XL, asked label by label: {escape(family)}</h3>" + table(head, [row]))
    return "".join([*parts, _ecg_qa(results.get("ecg_qa", {}))])


def _benchmark(scores: Mapping[str, Mapping[str, Any]]) -> str:
    n = str(next(iter(scores.values()))["n"])
    return table(["n", *scores], [[n, *map(_cell, scores.values())]])


def _ecg_qa(found: Results) -> str:
    text = ""
    if "average_of_single_types" in found:
        blind = "".join(f", of blind answers ({escape(n)}) {_number(v)}" for n, v in found["baselines"].items())
        text += f"<p>Mean over ECG-QA's three types about one ECG: {found['average_of_single_types']:.3f}{blind}</p>"
    if "template_macro_f1" in found:
        plain, weighted = (_number(found["template_macro_f1"][name]) for name in ("unweighted", "weighted"))
        text += f"<p>Macro F1, mean over templates: {plain}, weighted by questions: {weighted}</p>"
    return text


def _confusions(results: Results) -> str:
    parts = []
    for kind, found in results["classification"].items():
        rows, few = [], len(found["confusion"]) <= SHOWN_CLASSES
        for truth, counts in found["confusion"].items():
            total = sum(counts.values()) or 1
            cells = "".join(
                f'<td style="background:rgba({_RIGHT if answer == truth else _WRONG},{0.75 * n / total:.2f})">{n}'
                f"<small> {100 * n / total:.0f} %</small></td>" if n else "<td></td>"
                for answer, n in (counts if few else {truth: counts[truth]}).items()
            )
            rates = found["report"][truth]
            numbers = "".join(f"<td>{rates[name]:.3f}</td>" for name in ("precision", "recall", "f1"))
            rows.append(f"<tr><th>{escape(truth)}</th>{cells}{numbers}</tr>")
        columns = next(iter(found["confusion"].values())) if few else ["right"]
        names = "".join(f"<th>{breakable(name)}</th>" for name in (*columns, "precision", "recall", "F1"))
        body = f"<table class=counts><tr><th>truth \\ answer</th>{names}</tr>{''.join(rows)}</table>"
        parts.append(f"<h3>{escape(kind or 'all questions')}</h3>{body}")
    legend = (
        f'<p><span style="background:rgba({_RIGHT},.5)">&emsp;</span> right'
        f' <span style="background:rgba({_WRONG},.5)">&emsp;</span> taken for another; the more of a row, the'
        " stronger</p>"
    )
    return legend + "".join(parts) if parts else ""


def _wrong(plots: Mapping[str, str]) -> str:
    found = [plot for name, plot in plots.items() if name.startswith(("wrong_", "other_"))]
    return f"<h3>Most frequent wrong answers</h3>{''.join(found)}" if found else ""


def _statements(results: Results, plots: Mapping[str, str]) -> str:
    parts = []
    for kind, found in results.get("statements", {}).items():
        counts = {name: value for name, value in found.items() if not name.startswith("top_")}
        parts.append(f"<h3>Statements: {escape(kind)}</h3>" + table(list(counts), [[str(v) for v in counts.values()]]))
    return "".join([*parts, *(plot for name, plot in plots.items() if name.startswith(("missed_", "extra_")))])


def _examples(predictions: Sequence[Mapping[str, Any]], dataset: Dataset) -> str:
    found = chosen_examples(dataset, predictions, SHOWN)
    cards = []
    for number, (line, example) in enumerate(found):
        mark = "right" if example.correct else "wrong"
        kind = escape(str(line.get("name", "")))
        names = [f"example {number + 1}, ECG {i + 1} of {len(example.ecgs)}" for i in range(len(example.ecgs))]
        pictures = [
            f'<img alt="{name}" title="{name}" src="{_picture(ecg, dataset.signal.sampling_rate)}">'
            for name, ecg in zip(names, example.ecgs, strict=True)
        ]
        cards.append(
            f'<figure class="card" data-kind="{kind}" data-mark="{mark}"><figcaption><b>{escape(example.question)}</b>'
            f'<br><span class="{mark}">Answer: {escape(example.answer) or "(empty)"}</span> · Truth:'
            f" {escape(example.truth)} <small>{kind} · {escape(str(line['id']))} · {line['seconds']:.3f} s</small>"
            f"</figcaption>{''.join(pictures)}"
            f"<details><summary>prompt</summary><pre>{escape(str(line['prompt']))}</pre></details></figure>"
        )
    kinds = sorted({str(line.get("name", "")) for line, _ in found})
    options = "".join(f'<option value="{escape(kind)}">{escape(kind)}</option>' for kind in kinds)
    control = (
        f'<p><select id="kind"><option value="">every kind</option>{options}</select> <select id="mark">'
        '<option value="">right and wrong</option><option value="right">right</option>'
        '<option value="wrong">wrong</option></select>'
        ' <button id="back">◀</button> <span id="place"></span> <button id="next">▶</button></p>'
    )
    return control + "".join(cards) if cards else ""


def _picture(ecg: np.ndarray, rate: float) -> str:
    """The ECG on paper as a data URL."""
    drawn, small = io.BytesIO(), io.BytesIO()
    draw_ecg(ecg, rate, drawn)
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(small, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def _listed(predictions: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in predictions[:LISTED]:
        right = is_right(str(line.get("name", "")), line["answer"], line["truth"])
        texts = [line["id"], line.get("name", ""), line.get("question", ""), line["answer"], line["truth"]]
        texts = [printable(str(text), "\n\t") for text in texts]
        rows.append([*texts, "right" if right else "wrong", f"{line['seconds']:.3f}"])
    note = f"<p>The first {LISTED} of {len(predictions)}.</p>" if len(predictions) > LISTED else ""
    data = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'{note}<p><input id="search" placeholder="search" size="40"> <span id="hits"></span></p>'
        f'<script type="application/json" id="rows">{data}</script><table id="answers"></table>'
    )


def _bar(name: str, score: Mapping[str, Any], colour: str = svg.BLUE) -> Bar:
    low_high = score.get("ci95")
    return Bar(name, score["value"], tuple(low_high) if low_high else None, colour)


def _cell(score: Mapping[str, Any] | None) -> str:
    return "" if score is None else f"{_number(score['value'])} <small>{_interval(score.get('ci95'))}</small>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name) or "all"
