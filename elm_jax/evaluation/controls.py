"""What is put in the place of an ECG: the conditions under which questions are asked.

`zeros` and `noise` replace every ECG, `text_only` leaves it out, `shuffled` gives each question another recording that
questions of its kind were asked about. `retrieved_shuffled` and `retrieved_noise` leave the ECG as it is: the first
retrieves for that other recording, the second has dashes in the place of what is retrieved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import numpy as np

from elm_jax.data.dataset import Dataset
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.data.sources import Record
from elm_jax.data.tables import Lazy
from elm_jax.errors import UserError
from elm_jax.inference.model import Prompt

REAL = "real"
RETRIEVED = ("retrieved_shuffled", "retrieved_noise")


@dataclass(frozen=True)
class Question:
    """One answer to be generated: which record, which of its answers, what is true, and how long the prompt is.

    tokens: of the prompt, whatever its ECGs are (`Dataset.room`); ECGs with prompts of like length are asked together.
    """

    record: int
    turn: int
    truth: str
    tokens: int = 0


Loaded = tuple[dict[Question, Prompt], dict[int, UserError]]  # prompts with ECGs, and records that cannot be read
Recording = tuple[str, int]  # a path, and the key of the noise where it names none


@dataclass(frozen=True)
class _Swapped(Lazy[Record]):
    """Records with the ECGs of the `other` that some have, or with none; or that only retrieve for these."""

    records: Sequence[Record]
    other: Mapping[int, int]
    without: bool
    retrieved: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def make(self, index: int) -> Record:
        record, other = self.records[index], self.records[self.other.get(index, index)]
        if other is not record:  # nothing that is retrieved is about either of their patients
            record = replace(record, patient=f"{record.patient}+{other.patient}")
        if self.retrieved:
            return replace(record, sought=other.ecg_paths)
        return replace(record, ecg_paths=() if self.without else other.ecg_paths, ecgs_of=other.id)


class Source:
    """Prompts with ECGs under one condition: `real` or a control; `records`: whose recordings are shuffled."""

    def __init__(
        self, dataset: Dataset, condition: str, seed: int = 0, records: Iterable[int] | None = None
    ) -> None:
        self.condition = condition
        other = shuffled_records(dataset, seed, records) if condition.endswith("shuffled") else {}
        self.other = other if condition == "shuffled" else {}
        # Before any view of an ECG is made, so that none can show the true one: where it is read, or in the record.
        signal = replace(dataset.signal, perturb=condition) if condition in ("zeros", "noise") else dataset.signal
        if condition == "retrieved_noise":
            signal = replace(signal, retrieval=replace(cast(Any, signal.retrieval), dashes=True))
        swapped = _Swapped(dataset.records, other, condition == "text_only", condition == "retrieved_shuffled")
        self.dataset, self._asked = Dataset(swapped, dataset.tokenizer, dataset.text, signal), dataset

    def about(self, record: int) -> tuple[Recording, ...]:
        """The recordings that stand in the prompts of a record, or would, had they ECGs."""
        record = self.other.get(record, record)
        paths = self._asked.records[record].ecg_paths
        return tuple(_recording(path, self._asked.key(record, place)) for place, path in enumerate(paths))

    def load(self, questions: Sequence[Question]) -> Loaded:
        """Prompts with their ECGs. A recording is read once; adjacent questions of a record are rendered at once."""
        read: dict[Recording, Any] = {}
        prompts: dict[Question, Prompt] = {}
        unread: dict[int, UserError] = {}
        for record, asked in groupby(questions, lambda question: question.record):
            all_turns = self.dataset.prompts(record)
            rendered = {question: all_turns[question.turn][0] for question in asked}
            most = max(len(prompt.signal_positions) for prompt in rendered.values())
            try:
                ecgs = [self._signal(path, key, read) for path, key in self.about(record)[:most]]
            except UserError as error:
                unread[record] = error
                continue
            prompts |= {q: Prompt(prompt, ecgs[: len(prompt.signal_positions)]) for q, prompt in rendered.items()}
        return prompts, unread

    def _signal(self, path: str, key: int, read: dict[Recording, Any]) -> Any:
        if (path, key) not in read:
            read[path, key] = self.dataset.signal.show(path, key)
        return read[path, key]


def kept_ecgs(dataset: Dataset, other: Mapping[int, int], questions: Iterable[Question]) -> dict[str, int]:
    """{"answers": n, "own_ecg": ..., "same_patient": ...}: how many questions a shuffle asks about an ECG of theirs.

    other: what `shuffled_records` gave. same_patient: about another ECG of a patient of theirs.
    """
    records, found = dataset.records, {"answers": 0, "own_ecg": 0, "same_patient": 0}
    for question in questions:
        mine, given = records[question.record], records[other[question.record]]
        found["answers"] += 1
        if _ecgs(mine) == _ecgs(given):
            found["own_ecg"] += 1
        elif set(mine.patient.split("+")) & set(given.patient.split("+")):
            found["same_patient"] += 1
    return found


def shuffled_records(dataset: Dataset, seed: int = 0, among: Iterable[int] | None = None) -> dict[int, int]:
    """Record -> the record about whose recordings it is asked instead: one of another patient.

    Only the records `among` (None: all) take part.

    Recordings move within records of one `name` and number of ECGs, so that answers of each kind stay as frequent as
    they were. Where these are all of one patient, the recordings of all records with as many ECGs are moved, and the
    records of this kind are given what they get by that.
    """
    by_count: dict[int, dict[str, list[int]]] = {}
    for i in range(len(dataset.records)) if among is None else among:
        record = dataset.records[i]
        by_count.setdefault(len(record.ecg_paths), {}).setdefault(record.name, []).append(i)
    rng = np.random.default_rng(seed)
    given: dict[int, int] = {}
    for kinds in by_count.values():
        moved = [_moved(dataset.records, kind, rng) for kind in kinds.values() if _patients(dataset, kind) > 1]
        if len(moved) < len(kinds):
            given |= _moved(dataset.records, [i for kind in kinds.values() for i in kind], rng)
        for kind in moved:
            given |= kind
    return given


def _patients(dataset: Dataset, records: Iterable[int]) -> int:
    return len({dataset.records[i].patient for i in records})


def _moved(records: Sequence[Record], chosen: Iterable[int], rng: np.random.Generator) -> dict[int, int]:
    """Each of the chosen records -> the first of those about the recording that it is given.

    Patients are put in random order and all recordings move on by as many places as the patient with the most has. So
    each recording is given away once, and a question keeps its patient only where one patient has half of the
    recordings. Where all are of one patient, each question is given the next recording.
    """
    patients: dict[str, dict[Any, list[int]]] = {}
    for i in chosen:
        patients.setdefault(records[i].patient, {}).setdefault(_ecgs(records[i]), []).append(i)
    people = [list(patients.values())[i] for i in rng.permutation(len(patients))]
    places = [asked for recordings in people for asked in recordings.values()]
    step = max(len(recordings) for recordings in people) if len(people) > 1 else 1
    return {i: places[(n + step) % len(places)][0] for n, asked in enumerate(places) for i in asked}


def _ecgs(record: Record) -> Any:
    """What tells a record's ECGs from those of others: the noise of each is its own."""
    blank = any(path in (NOISE, FLATLINE) for path in record.ecg_paths)
    return record.ecg_paths, record.id if blank else ""


def _recording(path: str, key: int) -> Recording:
    return path, key if path in (NOISE, FLATLINE) else 0
