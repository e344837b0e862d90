"""What is put in the place of an ECG: the conditions under which questions are asked.

`zeros` and `noise` replace every ECG, `text_only` leaves it out, `shuffled` gives each question another recording that
questions of its kind were asked about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elm_jax.data.dataset import Dataset
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.errors import UserError
from elm_jax.inference.model import Prompt

REAL = "real"


@dataclass(frozen=True)
class Question:
    """One answer to be generated: which record, which of its answers, and what is true."""

    record: int
    turn: int
    truth: str


Loaded = tuple[dict[Question, Prompt], dict[int, UserError]]  # prompts with ECGs, and records that cannot be read


class Source:
    """Prompts with ECGs under one condition: `real` or a control; `records`: whose recordings are shuffled."""

    def __init__(
        self, dataset: Dataset, condition: str, seed: int = 0, records: Iterable[int] | None = None
    ) -> None:
        self.condition = condition
        text, signal = dataset.text, dataset.signal
        if condition == "text_only":
            text = replace(text, signal_tokens=0)
        elif condition in ("zeros", "noise"):
            signal = replace(signal, perturb=condition)
        self.dataset = Dataset(dataset.records, dataset.tokenizer, text, signal)
        self.other = shuffled_recordings(dataset, seed, records) if condition == "shuffled" else None

    def prompt(self, question: Question) -> Any:
        return self.dataset.prompts(question.record)[question.turn][0]

    def load(self, questions: Sequence[Question]) -> Loaded:
        """Prompts with their ECGs; a recording that several questions are about is read once."""
        read: dict[tuple[str, int], Any] = {}
        prompts: dict[Question, Prompt] = {}
        unread: dict[int, UserError] = {}
        for question in questions:
            rendered = self.prompt(question)
            recordings = self._recordings(question.record)[: len(rendered.signal_positions)]
            try:
                prompts[question] = Prompt(rendered, [self._signal(path, key, read) for path, key in recordings])
            except UserError as error:
                unread[question.record] = error
        return prompts, unread

    def _signal(self, path: str, key: int, read: dict[tuple[str, int], Any]) -> Any:
        at = (path, key if path in (NOISE, FLATLINE) else 0)
        if at not in read:
            read[at] = self.dataset.signal.load(path, key)
        return read[at]

    def _recordings(self, record: int) -> list[tuple[str, int]]:
        if self.dataset.text.signal_tokens == 0:
            return []
        if self.other is not None:
            return self.other[record]
        paths = self.dataset.records[record].ecg_paths
        return [(path, self.dataset.key(record, place)) for place, path in enumerate(paths)]


def shuffled_recordings(
    dataset: Dataset, seed: int = 0, among: Iterable[int] | None = None
) -> dict[int, list[tuple[str, int]]]:
    """Record -> the recordings (path, noise key) that it is asked about instead: those of another patient.

    Only the records `among` (None: all) take part.

    Within records of one `name` and number of ECGs, patients are put in random order and all recordings move on by as
    many places as the patient with the most has. So each recording is given away once, answers of each kind stay as
    frequent as they were, and a question keeps its patient only where one patient has half of the recordings. Where
    all are of one patient, each question is given the next recording.
    """
    kinds: dict[tuple[str, int], dict[str, dict[Any, list[int]]]] = {}
    for i in range(len(dataset.records)) if among is None else among:
        record = dataset.records[i]
        blank = any(path in (NOISE, FLATLINE) for path in record.ecg_paths)
        recording = (record.ecg_paths, record.id if blank else "")
        patients = kinds.setdefault((record.name, len(record.ecg_paths)), {})
        patients.setdefault(record.patient, {}).setdefault(recording, []).append(i)
    rng = np.random.default_rng(seed)
    given: dict[int, list[tuple[str, int]]] = {}
    for patients in kinds.values():
        people = [list(patients.values())[i] for i in rng.permutation(len(patients))]
        places = [(recording, asked) for recordings in people for recording, asked in recordings.items()]
        step = max(len(recordings) for recordings in people) if len(people) > 1 else 1
        for place, (_, asked) in enumerate(places):
            (paths, _), source = places[(place + step) % len(places)]
            instead = [(path, dataset.key(source[0], n)) for n, path in enumerate(paths)]
            given |= dict.fromkeys(asked, instead)
    return given
