"""PTB-XL's statements as yes-or-no questions, in the manner of ECG-LM: F1 and AUC without training on them as classes.

For each recording and each of the 71 SCP statements the model is asked whether the ECG shows it; P(yes) is what it
gives to "yes" of "yes" and "no". F1 counts P(yes) above one half, the AUC is of P(yes). A superclass or subclass has
the largest P(yes) of its statements. How ECG-LM averaged and what it asked was not published: macro and micro averages
and the question here are ours. n recordings, K labels.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax import stopping
from elm_jax.data.dataset import Dataset
from elm_jax.data.sources import Record, patient_of
from elm_jax.data.table_files import csv_rows
from elm_jax.errors import UserError, refused
from elm_jax.evaluation.answering import BadRecords
from elm_jax.evaluation.controls import Question, Source
from elm_jax.evaluation.store import AnswerFile
from elm_jax.inference.model import TrainedModel
from elm_jax.scoring.ecgbench import label_counts, macro_f1, micro_f1
from elm_jax.scoring.statistics import Patients, ci95

STATEMENTS, DATABASE = "scp_statements.csv", "ptbxl_database.csv"
FAMILIES = ("diagnostic", "form", "rhythm", "superclass", "subclass")
OPTIONS = ("yes", "no")
QUESTION = "Does this ECG show {}? Answer yes or no."


@dataclass(frozen=True)
class Statement:
    """An SCP statement of PTB-XL: its code, what it means, and which of FAMILIES it is in, by the label there."""

    code: str
    description: str
    families: Mapping[str, str]


@dataclass(frozen=True)
class PtbXl:
    """PTB-XL's tables: the statements, and the codes of each recording by its number, five digits as in its path."""

    statements: list[Statement]
    truths: dict[str, frozenset[str]]


def read_ptb_xl(folder: Path) -> PtbXl:
    """The tables in PTB-XL's folder. Raises UserError where they are not there or not PTB-XL's."""
    return PtbXl(read_statements(folder), read_truths(folder))


def read_statements(folder: Path) -> list[Statement]:
    """The statements in scp_statements.csv. Raises UserError where the file is not there or not PTB-XL's."""
    found = []
    with _of_ptb_xl(folder / STATEMENTS):
        for row in _rows(folder / STATEMENTS, ("description", "diagnostic", "form", "rhythm")):
            code = row.get("") or row.get("code") or ""
            families = {name: code for name in FAMILIES[:3] if row[name] and float(row[name]) == 1}
            if "diagnostic" in families:
                families |= {"superclass": row["diagnostic_class"], "subclass": row["diagnostic_subclass"]}
            found.append(Statement(code, row["description"], families))
    return found


def read_truths(folder: Path) -> dict[str, frozenset[str]]:
    """Record number, five digits as in its path -> the codes of its statements, whatever their likelihood."""
    rows = _rows(folder / DATABASE, ("ecg_id", "scp_codes"))
    with _of_ptb_xl(folder / DATABASE):
        return {f"{int(row['ecg_id']):05d}": frozenset(ast.literal_eval(row["scp_codes"])) for row in rows}


def ask_labels(
    model: TrainedModel, dataset: Dataset, records: Iterable[int], labels: PtbXl, file: AnswerFile, bad: BadRecords,
    progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Ask for every statement of every recording of PTB-XL that `records` have; `label_scores` of the answers.

    `file` keeps P(yes), one line a recording; recordings that are in it are not asked again. One that cannot be asked
    about goes to `bad` and is in no score.

    Raises:
        UserError: no record is about a recording of PTB-XL, or too many cannot be read.
    """
    statements, recordings = labels.statements, _recordings(dataset, records, labels)
    if not recordings:
        expected = f"recordings of {DATABASE}"
        raise UserError("eval.labels", "none in this split", expected, "evaluate a table of PTB-XL's recordings")
    known = {line["id"]: line["p"] for line in file.lines if list(map(type, line["p"])) == [float] * len(statements)}
    rest = [number for number in sorted(recordings) if number not in known]
    for number in stopping.each(tqdm(rest, "labels", unit="recordings", disable=not progress), "recording's labels"):
        model.engine.prefills.forget()  # so that a recording's answers do not depend on those before it
        try:
            known[number] = _asked(model, dataset, dataset.records[recordings[number]], statements)
        except UserError as error:
            bad.note(recordings[number], error)
        else:
            file.append({"id": number, "p": known[number]})
    numbers = [number for number in sorted(recordings) if number in known]
    if not numbers:
        return {}
    true = np.array([[s.code in labels.truths[number] for s in statements] for number in numbers])
    patients = [dataset.records[recordings[number]].patient for number in numbers]
    return label_scores(np.array([known[number] for number in numbers]), true, statements, patients)


def _recordings(dataset: Dataset, records: Iterable[int], labels: PtbXl) -> dict[str, int]:
    """Number of a recording of PTB-XL -> the first of the records about it alone."""
    found: dict[str, int] = {}
    for record in records:
        paths = dataset.records[record].ecg_paths
        number = patient_of(paths[0], "") if len(paths) == 1 else ""  # of PTB-XL's paths, the number of the record
        if number in labels.truths:
            found.setdefault(number, record)
    return found


def _asked(model: TrainedModel, dataset: Dataset, record: Record, statements: Sequence[Statement]) -> list[float]:
    """P(yes) of each statement about one recording."""
    records = [
        replace(record, text=["zero-shot", QUESTION.format(s.description), ["yes"]], id=f"{record.id}:{s.code}")
        for s in statements
    ]
    source = Source(Dataset(records, dataset.tokenizer, dataset.text, dataset.signal), "real")
    prompts, unread = source.load([Question(i, 0, "yes") for i in range(len(records))])
    for error in unread.values():
        raise error
    new = model.config.eval.max_new_tokens
    given, size = [model.written(prompt, new) for prompt in prompts.values()], model.config.eval.batch_size
    parts = [model.option_probabilities(given[i : i + size], OPTIONS) for i in range(0, len(given), size)]
    both = np.concatenate([np.asarray(part, np.float64) for part in parts])
    return [float(p) for p in both[:, 0] / np.maximum(both.sum(1), np.finfo(float).tiny)]


def label_scores(
    p: np.ndarray, true: np.ndarray, statements: Sequence[Statement], patients: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """P(yes) and truth of n recordings and all statements, (n, K) -> {family: {"macro_f1", "micro_f1", "macro_auc",
    "n", "labels"}}, each score with its bootstrap interval over patients; labels: {label: {"f1", "auc", "n"}}.

    A label that no recording has, or every one, counts in no average.
    """
    found = {}
    for family in FAMILIES:
        columns: dict[str, list[int]] = {}
        for i, statement in enumerate(statements):
            if family in statement.families:
                columns.setdefault(statement.families[family], []).append(i)
        chances = {label: p[:, places].max(1) for label, places in columns.items()}
        truths = {label: true[:, places].any(1) for label, places in columns.items()}
        kept = [label for label, truth in truths.items() if truth.any() and not truth.all()]
        if kept:
            chance, truth = (np.stack([values[label] for label in kept], axis=1) for values in (chances, truths))
            found[family] = _family(kept, chance, truth, Patients(patients, seed))
    return found


def _family(labels: Sequence[str], p: np.ndarray, true: np.ndarray, patients: Patients) -> dict[str, Any]:
    rows = label_counts(p > 0.5, true)
    sums, resampled = rows.sum(0), patients.resampled(rows)
    areas = [_Auc(p[:, k], true[:, k]) for k in range(len(labels))]
    ones = np.ones(len(p))
    drawn = np.array([[area(weights) for area in areas] for weights in patients.weights()])
    with np.errstate(invalid="ignore"):
        mean_areas = np.nansum(drawn, axis=1) / np.isfinite(drawn).sum(1)
    each = 2 * (true & (p > 0.5)).sum(0) / np.maximum(true.sum(0) + (p > 0.5).sum(0), 1)
    alone = [area(ones) for area in areas]
    return {
        "macro_f1": {"value": float(macro_f1(sums)), "ci95": ci95(macro_f1(resampled))},
        "micro_f1": {"value": float(micro_f1(sums)), "ci95": ci95(micro_f1(resampled))},
        "macro_auc": {"value": float(np.mean(alone)), "ci95": ci95(mean_areas)},
        "n": len(p),
        "labels": {
            label: {"f1": float(each[k]), "auc": alone[k], "n": int(true[:, k].sum())}
            for k, label in enumerate(labels)
        },
    }


class _Auc:
    """The area under one label's curve, for recordings of any weights: ties count half."""

    def __init__(self, p: np.ndarray, true: np.ndarray) -> None:
        self._order = np.argsort(p, kind="stable")
        ranked = p[self._order]
        self._true = true[self._order]
        self._group = np.concatenate([[0], np.cumsum(ranked[1:] > ranked[:-1])])

    def __call__(self, weights: np.ndarray) -> float:
        weights = weights[self._order]
        yes, no = (np.bincount(self._group, weights * part) for part in (self._true, ~self._true))
        total = yes.sum() * no.sum()
        below = np.cumsum(no) - no
        return float((yes * (below + no / 2)).sum() / total) if total else float("nan")


def _of_ptb_xl(path: Path) -> contextlib.AbstractContextManager[None]:
    """Whatever is wrong with a cell of PTB-XL's tables is the file's fault: `literal_eval` raises many kinds."""
    found = "a cell that is not as PTB-XL has it"
    return refused(path, found, f"{path.name} of PTB-XL", "download it again", Exception)


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    rows = [row for _, row in csv_rows(path, needed, "eval.labels", f"{path.name} of PTB-XL", "give PTB-XL's folder")]
    if not rows:
        raise UserError("eval.labels", f"{path} without rows", f"{path.name} of PTB-XL", "download it again")
    return rows
