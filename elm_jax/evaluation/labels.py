"""PTB-XL's statements as yes-or-no questions, in the manner of ECG-LM: F1 and AUC without training on them as classes.

For each recording and each of the 71 SCP statements the model is asked whether the ECG shows it; P(yes) is what it
gives to "yes" of "yes" and "no". F1 counts P(yes) above one half, the AUC is of P(yes). A superclass or subclass has
the largest P(yes) of its statements. How ECG-LM averaged and what it asked was not published: macro and micro averages
and the question here are ours. n recordings, K labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax import stopping
from elm_jax.data.dataset import Dataset
from elm_jax.data.prepare.ptb_xl import FAMILIES, INDEX, PtbXl, Statement
from elm_jax.data.sources import Record, patient_of
from elm_jax.errors import UserError
from elm_jax.evaluation.answering import BadRecords
from elm_jax.evaluation.controls import Question, Source
from elm_jax.evaluation.store import AnswerFile
from elm_jax.inference.model import TrainedModel
from elm_jax.scoring.probing import judge
from elm_jax.scoring.statistics import Patients

OPTIONS = ("yes", "no")
QUESTION = "Does this ECG show {}? Answer yes or no."


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
        expected = f"recordings of {INDEX}"
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
    """P(yes) and truth of n recordings and all statements, (n, K) -> {family: the report of `probing.Judged`}.

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
            found[family] = judge(chance, chance > 0.5, truth, kept, Patients(patients, seed)).report
    return found
