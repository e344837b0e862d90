"""Grain over the plan: element k of the source is what this host reads for step k. No jax here."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import grain.experimental
import grain.python as grain
import numpy as np
from absl import flags

from elm_jax import stopping
from elm_jax.data.batch import Batch, Conversation, Group, Shown, arrays_in, empty_batch, write_row
from elm_jax.data.dataset import Dataset
from elm_jax.data.plan import LengthIndex, Plan, PlannedGroup, PlannedRow
from elm_jax.data.samples import grouped
from elm_jax.errors import UserError

_SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it; what exceeds its room ends a process without a word
_IN_FLIGHT = 4  # steps of a worker: made, waiting, sent and read
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRecord:
    """A record whose signals could not be read: it keeps its place with weight 0."""

    id: str
    error: str


class Loaded(NamedTuple):
    """One host's part of a step, and what the log wants to know of it.

    A pytree, so that a worker process hands its arrays over in shared memory.
    """

    step: int
    batch: Batch  # arrays with the leading micro-batch axis A
    conversations: int  # of the whole step, as are the pairs
    attention_pairs: int  # query-key pairs that the masks allow
    bad: tuple[BadRecord, ...]  # in this host's part
    truncated: int = 0  # conversations of the whole step that data.max_len cuts


class StepSource:
    """A random-access source for Grain: step number -> `Loaded`.

    Args:
        parts: which of the `plan.ways` equal parts of every micro-batch's rows this host reads, one after another.
        steps: length of the source.
    """

    def __init__(self, dataset: Dataset, plan: Plan, *, steps: int, parts: Sequence[int] = (0,)) -> None:
        self.dataset, self.plan, self.steps, self.parts = dataset, plan, steps, parts

    def __len__(self) -> int:
        return self.steps

    def empty(self, rows: list[PlannedRow]) -> Batch:
        """The arrays of a step with these rows, and nothing in them."""
        shape = self.plan.shape(rows)
        if self.dataset.varies:  # a shorter conversation moves those behind it, and so the blocks that they see
            shape = replace(shape, key_blocks=0)
        micro = self.plan.micro_batches
        mine = len(self.parts) * (len(rows) // micro // self.plan.ways)
        return empty_batch(shape, self.dataset.signal.layout, micro, mine, extras=self.dataset.samples.extras)

    def __getitem__(self, step: int) -> Loaded:
        reader = _Reader(self.dataset, self.plan.index, self.plan.epoch_of(int(step)))
        return self.fill(int(step), reader.groups, reader.bad)

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


class _Reader:
    """Reads the conversations of a step; a recording that several of them ask about is read once."""

    def __init__(self, dataset: Dataset, index: LengthIndex, epoch: int) -> None:
        self.dataset, self.index, self.epoch = dataset, index, epoch
        self.bad: list[BadRecord] = []

    def groups(self, group: PlannedGroup) -> list[Group]:
        shares_ecg = bool(group.prefix) and bool(self.index.shares_ecg[group.samples[0]])
        conversations: list[Conversation] = []
        signals: list[Shown] | None = None
        error = ""
        for n, sample in enumerate(group.samples):
            if n == 0 or not shares_ecg:
                signals, error = self._signals(sample)
            if signals is None:
                self.bad.append(BadRecord(self.dataset.records[sample].id, error))
            conversations += self.dataset.conversations(sample, signals, int(self.index.length[sample]))
        return [Group(group.prefix, conversations)] if self.dataset.samples.plain else grouped(conversations)

    def _signals(self, sample: int) -> tuple[list[Shown] | None, str]:
        """The sample's ECGs, or None and what is wrong with them."""
        try:
            return self.dataset.signals(sample, self.epoch), ""
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


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Processes started in here never see the signals that stop a run, from their first moment on.

    Such a signal may be sent to all processes of the run, which still reads up to its last step. Grain ends its
    workers by an event, and kills those that do not end.
    """
    resource_tracker.ensure_running()  # it would start with the first worker, and then unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(worker: int, workers: int) -> None:
    """In a worker: do not go on without the process that reads, in whatever way it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def steps_from(source: StepSource, first: int, workers: int = 0) -> Iterator[Loaded]:
    """The steps from `first` on, in order, read ahead by a thread (or by `workers` processes)."""
    steps = grain.MapDataset.range(first, len(source)).map(source.__getitem__)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    dataset = steps.to_iter_dataset(options)
    if not workers or first >= len(source):
        yield from dataset
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["elm_jax"])  # Grain reads flags of its own in the processes that it starts
    if not _fits_shared_memory(source, first, workers):
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, through_pipes)
    iterator = iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _end_with_parent))
    try:
        with _stop_signals_blocked():
            loaded = next(iterator)  # all workers are started for it
        yield loaded
        yield from iterator
    finally:
        iterator.close()  # Python would wait at its end for workers that are left: they do not see its SIGTERM


def _fits_shared_memory(source: StepSource, first: int, workers: int) -> bool:
    """Whether the workers' batches fit into shared memory (containers often have 64 MiB); says so where not."""
    if not _SHARED_MEMORY.is_dir():
        return True
    batch = source.empty(source.plan.rows(first))
    arrays = [*batch, *arrays_in(batch.signals), *batch.extras.values()]
    needed = workers * _IN_FLIGHT * sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    room = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > room:
        _log.warning(
            "%s has %d MiB free, the batches of data.workers=%d may take %d: they are sent through pipes, which is "
            "slower (a container's room is set by --shm-size)", _SHARED_MEMORY, room >> 20, workers, needed >> 20,
        )  # fmt: skip
    return needed <= room
