"""The plan's steps, read: element k of the source is what this host reads for step k. No jax here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from elm_jax.data.batch import BLOCK, Batch, Conversation, Group, Shown, empty_batch, write_row
from elm_jax.data.dataset import Dataset
from elm_jax.data.packing import LengthIndex, PlannedGroup, PlannedRow
from elm_jax.data.plan import Plan
from elm_jax.data.readers import NOTHING, Reading
from elm_jax.data.samples import grouped
from elm_jax.errors import Absent, UserError


@dataclass(frozen=True)
class BadRecord:
    """A record whose signals could not be read: it keeps its place with weight 0."""

    id: str
    error: str


class Loaded(NamedTuple):
    """One host's part of a step, and what the log wants to know of it."""

    step: int
    batch: Batch  # arrays with the leading micro-batch axis A
    conversations: int  # of the whole step, as are the pairs
    attention_pairs: int  # query-key pairs that the masks allow
    bad: tuple[BadRecord, ...]  # in this host's part
    truncated: int = 0  # conversations of the whole step that data.max_len cuts


class StepSource:
    """Step number -> `Loaded`, in any order.

    Args:
        parts: which of the `plan.ways` equal parts of every micro-batch's rows this host reads, one after another.
        steps: length of the source.
    Attributes:
        updates: steps of the run that learn from each of its steps.
    """

    def __init__(self, dataset: Dataset, plan: Plan, *, steps: int, parts: Sequence[int] = (0,)) -> None:
        self.dataset, self.plan, self.steps, self.parts = dataset, plan, steps, parts
        self.updates = dataset.samples.updates

    def __len__(self) -> int:
        return self.steps

    def empty(self, rows: list[PlannedRow]) -> Batch:
        """The arrays of a step with these rows, and nothing in them."""
        shape = self.plan.shape(rows)
        # A shorter conversation or answer moves those behind it, and so the blocks that they see.
        if self.dataset.varies or self.dataset.signal.shown.shorten:
            shape = replace(shape, key_blocks=0)
        elif experience := self.dataset.samples.experience:
            shape = replace(shape, key_blocks=self._blocks_of_answers(rows, shape.tokens, experience.tokens))
        micro = self.plan.micro_batches
        mine = len(self.parts) * (len(rows) // micro // self.plan.ways)
        return empty_batch(shape, self.dataset.signal.layout, micro, mine, extras=self.dataset.samples.extras)

    def _blocks_of_answers(self, rows: list[PlannedRow], tokens: int, longest: int) -> int:
        """How many blocks of keys a block of answers sees at most, wherever these stand: the prompt's, and those that
        an answer of the `longest` may touch up to its end; 0 (all) where these are more than two thirds."""
        index, samples = self.plan.index, [i for row in rows for group in row for i in group.samples]
        prompt = int((index.length[samples] - index.targets[samples]).max())
        alone = all(len(row) <= 1 for row in rows)  # then it begins with a block
        most = -(-prompt // BLOCK) + (not alone) - (-(longest - 1) // BLOCK) + 1
        return most if tokens % BLOCK == 0 and 3 * most <= 2 * (tokens // BLOCK) else 0

    def __getitem__(self, step: int) -> Loaded:
        return self.read(step, Reading())

    def read(self, step: int, reading: Reading) -> Loaded:
        """The step; `reading` always says at which record it is."""
        conversations = _Conversations(self.dataset, self.plan.index, self.plan.epoch_of(step), reading)
        loaded = self.fill(step, conversations.groups, conversations.bad)
        reading.at(NOTHING)
        return loaded

    def fill(self, step: int, groups: Callable[[PlannedGroup], list[Group]], bad: Sequence[BadRecord]) -> Loaded:
        """The step with these groups in the places that are planned; `bad` is what was bad when all are there."""
        rows = self.plan.rows(step)
        batch = self.empty(rows)
        per_micro = len(rows) // self.plan.micro_batches
        size = per_micro // self.plan.ways
        mine = [part * size + row for part in self.parts for row in range(size)]  # of a micro-batch
        for m in range(self.plan.micro_batches):
            for r, row in enumerate(mine):
                planned = rows[m * per_micro + row]
                write_row(batch, (m, r), [group for part in planned for group in groups(part)])
        planned = [group for row in rows for group in row]
        samples = [sample for group in planned for sample in group.samples]
        truncated = int(self.plan.index.cut[samples].sum())
        pairs = sum(_attention_pairs(group, self.plan.index) for group in planned)
        return Loaded(step, batch, len(samples), pairs, tuple(bad), truncated)


class _Conversations:
    """Reads the conversations of a step; a recording that several of them ask about is read once."""

    def __init__(self, dataset: Dataset, index: LengthIndex, epoch: int, reading: Reading) -> None:
        self.dataset, self.index, self.epoch, self.reading = dataset, index, epoch, reading
        self.bad: list[BadRecord] = []

    def groups(self, group: PlannedGroup) -> list[Group]:
        shares_ecg = bool(group.prefix) and bool(self.index.shares_ecg[group.samples[0]])
        conversations: list[Conversation] = []
        signals: list[Shown] | None = None
        error = ""
        for n, sample in enumerate(group.samples):
            self.reading.at(sample)
            if n == 0 or not shares_ecg:
                signals, error = self._signals(sample)
            if signals is None:
                self.bad.append(BadRecord(self.dataset.records[sample].id, error))
            conversations += self.dataset.conversations(sample, signals, int(self.index.length[sample]))
        if not self.dataset.samples.plain:
            return grouped(conversations)
        absent = int((conversations[0].signal_positions < 0).sum()) if shares_ecg else 0  # from what is shared
        return [Group(group.prefix - absent, conversations)]

    def _signals(self, sample: int) -> tuple[list[Shown] | None, str]:
        """The sample's ECGs, or None and what is wrong with them."""
        try:
            return self.dataset.signals(sample, self.epoch), ""
        except Absent:  # the next start has it: a run that went on without it would learn something else
            raise
        except UserError as error:
            return None, str(error)


def _attention_pairs(group: PlannedGroup, index: LengthIndex) -> int:
    p = group.prefix
    own = [int(index.length[sample]) - p for sample in group.samples]
    return p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in own)


def unusable(dataset: Dataset, index: LengthIndex) -> list[BadRecord]:
    """The records that the plan leaves out, since no conversation can be made of them."""
    found = []
    for i in np.flatnonzero(index.length == 0).tolist():
        try:
            dataset.check(i)
        except UserError as error:
            found.append(BadRecord(dataset.records[i].id, str(error)))
    return found
