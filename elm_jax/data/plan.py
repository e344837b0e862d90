"""The plan: which conversations share which row of which step, a pure function of (length index, seed, step).

A resume on any number of hosts therefore sees the same samples in the same rows, each once an epoch, and the
step number is the whole data state. No jax here.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elm_jax.data.batch import BLOCK, BatchShape, visible_blocks
from elm_jax.errors import UserError

ECG_ROWS = 2  # version of how rows that share ECGs are made: a run goes on as it began
PLANNED_EPOCHS = 2  # epochs whose rows are kept: steps at the end of one are read ahead into the next
LEAST_BLOCKS = 8  # of a row's attention: in shorter ones nothing is gained by leaving some out
SPLIT_ROWS = 8  # open rows from which on questions about one ECG are divided over rows to fill them
OPEN_ROWS = 32  # rows that packing keeps open at a time: more packs tighter and plans slower


@dataclass(frozen=True)
class LengthIndex:
    """What packing needs to know of each sample. Arrays of equal length, one entry a sample."""

    length: np.ndarray  # int32, tokens after truncation; 0 marks a sample that cannot be rendered
    targets: np.ndarray  # int32, supervised tokens
    ecgs: np.ndarray  # int32, signal slots that they take: none where ECGs are symbols
    prefix: np.ndarray  # int32, tokens that may be shared with samples of the same key; 0 = none
    key: np.ndarray  # uint64, equal for samples whose prefixes are the same, ECGs included
    prefix_ecgs: np.ndarray  # int32, signal slots inside the prefix
    shares_ecg: np.ndarray  # bool, whether the prefix holds the ECG
    dataset: np.ndarray  # int32, index into data.names
    cut: np.ndarray  # bool, whether data.max_len takes anything of what matters, up to the last supervised token
    lost_answers: np.ndarray  # int16, answers that it takes whole
    cut_ecgs: np.ndarray  # bool, whether it takes symbols of ECGs

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True)
class PlannedGroup:
    """Samples behind one shared prefix of `prefix` tokens (0: one sample, nothing shared)."""

    prefix: int
    samples: tuple[int, ...]


PlannedRow = tuple[PlannedGroup, ...]


@dataclass(frozen=True)
class _Usage:
    """What a row needs of each bounded axis."""

    tokens: int = 0
    signals: int = 0
    targets: int = 0


class Plan:
    """Rows of every step. Safe to use from several threads; a pickled copy has the epochs that were planned last.

    Args:
        index: the length index; samples of length 0 are left out.
        rows: rows per optimizer step, over all hosts and micro-batches.
        max_len: tokens of a row.
        pack: several conversations in a row; False puts each in a row of its own.
        weights: how often each dataset is seen in an epoch (1 = each sample once; None = all 1). A fraction
            takes turns: a dataset of weight 0.5 is seen whole every two epochs.
        shuffle: False keeps the samples' order (validation and test).
    """

    def __init__(
        self,
        index: LengthIndex,
        *,
        rows: int,
        max_len: int,
        pack: bool,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ) -> None:
        if not (index.length > 0).any():
            raise UserError(
                "data.names", "no usable sample", "at least one conversation", "check the dataset"
            )
        self.index, self.batch_rows, self.max_len, self.pack = index, rows, max_len, pack
        self.seed, self.weights, self.shuffle = seed, weights, shuffle
        self._epoch_ends: list[int] = []
        self._planned: dict[int, list[PlannedRow]] = {}
        self._least: _Usage | None = None  # of signals and targets in a shape
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def steps_before(self, epoch: int) -> int:
        """Number of steps in epochs 0 .. epoch - 1. How many rows an epoch packs into only its plan tells."""
        with self._lock:
            while len(self._epoch_ends) < epoch:
                rows = self._count_rows(len(self._epoch_ends))
                before = self._epoch_ends[-1] if self._epoch_ends else 0
                self._epoch_ends.append(before + -(-rows // self.batch_rows))
            return self._epoch_ends[epoch - 1] if epoch else 0

    def _count_rows(self, epoch: int) -> int:
        """Rows of an epoch. The first epochs planned stay, since a run begins with them, whatever else is counted."""
        if not self.pack:
            return len(self._order(epoch))
        if epoch in self._planned or len(self._planned) < PLANNED_EPOCHS:
            return len(self._rows_of_epoch(epoch))
        return len(self._plan_epoch(epoch))

    def epoch_of(self, step: int) -> int:
        """The epoch in which `step` (from 0) falls."""
        while not self._epoch_ends or self._epoch_ends[-1] <= step:
            self.steps_before(len(self._epoch_ends) + 1)
        return bisect.bisect_right(self._epoch_ends, step)

    def rows(self, step: int) -> list[PlannedRow]:
        """The rows of a step; the last step of an epoch is filled up with empty rows."""
        epoch = self.epoch_of(step)
        rows = self._rows_of_epoch(epoch)
        first = (step - self.steps_before(epoch)) * self.batch_rows
        chosen = rows[first : first + self.batch_rows]
        return chosen + [()] * (self.batch_rows - len(chosen))

    def shape(self, rows: Sequence[PlannedRow]) -> BatchShape:
        """The smallest bucket that holds all rows of a step; the same on every host.

        Signals and targets are not cut finer than half of what the fullest row of the first epoch needs, so that
        an epoch has a handful of shapes to compile at most.
        """
        usage = [self._usage(row) for row in rows]
        tokens = next(t for t in token_buckets(self.max_len, self.pack) if t >= max(u.tokens for u in usage))
        least = self._least_usage()
        signals = bucket(max(u.signals for u in usage), least.signals)
        targets = bucket(max(u.targets for u in usage), least.targets)
        return BatchShape(tokens, signals, targets, self._key_blocks(rows, tokens))

    def _key_blocks(self, rows: Sequence[PlannedRow], tokens: int) -> int:
        """How many blocks of keys a block of queries sees at most, in sixteenths of all; above one half 0: all."""
        blocks = tokens // BLOCK
        if not self.pack or tokens % BLOCK or blocks < LEAST_BLOCKS:
            return 0
        most = max(int(visible_blocks(self._spans(row), tokens).sum(1).max()) for row in rows)
        step = -(-blocks // 16)
        rounded = -(-most // step) * step
        return rounded if 2 * rounded <= blocks else 0

    def _spans(self, row: PlannedRow) -> list[tuple[int, list[int]]]:
        """Each group's prefix, and the tokens of its branches."""
        return [(g.prefix, (self.index.length[list(g.samples)] - g.prefix).tolist()) for g in row]

    def _least_usage(self) -> _Usage:
        with self._lock:
            if self._least is None:
                usage = [self._usage(row) for row in self._rows_of_epoch(0)]
                signals, targets = (max(getattr(u, name) for u in usage) for name in ("signals", "targets"))
                self._least = _Usage(signals=-(-bucket(signals) // 2), targets=-(-bucket(targets, 8) // 2))
            return self._least

    def _usage(self, row: PlannedRow) -> _Usage:
        tokens = signals = targets = 0
        for group in row:
            chosen = np.asarray(group.samples)
            shared = int(self.index.prefix_ecgs[chosen[0]]) if group.prefix else 0
            tokens += group.prefix + int((self.index.length[chosen] - group.prefix).sum())
            signals += shared + int((self.index.ecgs[chosen] - shared).sum())
            targets += int(self.index.targets[chosen].sum())
        return _Usage(tokens, signals, targets)

    def _rows_of_epoch(self, epoch: int) -> list[PlannedRow]:
        with self._lock:
            if epoch not in self._planned:
                while len(self._planned) >= PLANNED_EPOCHS:
                    del self._planned[next(iter(self._planned))]
                self._planned[epoch] = self._plan_epoch(epoch)
            return self._planned[epoch]

    def _plan_epoch(self, epoch: int) -> list[PlannedRow]:
        order = self._order(epoch)
        if not self.pack:
            return [(PlannedGroup(0, (int(i),)),) for i in order]
        rows = _pack(self._bundles(order), self.max_len)
        if self.shuffle:
            rows = [rows[i] for i in _rng(self.seed, epoch, 1).permutation(len(rows))]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, shuffled and mixed."""
        usable = np.flatnonzero(self.index.length > 0)
        if self.weights is not None:
            parts = [usable[self.index.dataset[usable] == d] for d in range(len(self.weights))]
            usable = np.concatenate(
                [
                    _take_turns(p, w, epoch, self.seed, d)
                    for d, (p, w) in enumerate(zip(parts, self.weights, strict=True))
                ]
            )
        return _rng(self.seed, epoch, 0).permutation(usable) if self.shuffle else usable

    def _bundles(self, order: np.ndarray) -> list[_Bundle]:
        """Samples in order of first appearance; those that share an ECG together, as far as a row holds them.

        Where only the system prompt is shared, rows join samples themselves (`_pack`).
        """
        latest: dict[int, _Bundle] = {}
        bundles: list[_Bundle] = []
        for i in order.tolist():
            prefix, key = int(self.index.prefix[i]), int(self.index.key[i])
            own = int(self.index.length[i]) - prefix
            assert prefix + own <= self.max_len, (
                "a sample is longer than a row: the index has another max_len"
            )
            bundle = latest.get(key) if prefix and self.index.shares_ecg[i] else None
            if bundle is None or prefix + bundle.own + own > self.max_len:
                bundle = latest[key] = _Bundle(key, prefix)
                bundles.append(bundle)
            bundle.add(i, own)
        return bundles


@dataclass
class _Bundle:
    """Samples behind one prefix: `own` tokens beside the prefix, `sizes` of each sample."""

    key: int
    prefix: int
    own: int = 0
    samples: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, sample: int, size: int) -> None:
        self.samples.append(sample)
        self.sizes.append(size)
        self.own += size

    def split(self, room: int) -> tuple[_Bundle, _Bundle]:
        """The first samples that fit in `room` tokens beside the prefix, and the others."""
        parts = _Bundle(self.key, self.prefix), _Bundle(self.key, self.prefix)
        for sample, size in zip(self.samples, self.sizes, strict=True):
            parts[bool(parts[1].samples) or parts[0].own + size > room].add(sample, size)
        return parts


class _OpenRow:
    """A row being packed: tokens left, and the groups that more samples may join, by key."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.groups: list[_Bundle] = []
        self.by_key: dict[int, _Bundle] = {}

    def cost(self, bundle: _Bundle) -> int:
        return bundle.own + (0 if bundle.key in self.by_key else bundle.prefix)

    def add(self, bundle: _Bundle) -> None:
        self.room -= self.cost(bundle)
        group = self.by_key.get(bundle.key) if bundle.prefix else None
        if group is None:
            group = _Bundle(bundle.key, bundle.prefix)
            self.groups.append(group)
            if bundle.prefix:
                self.by_key[bundle.key] = group
        group.samples.extend(bundle.samples)

    def close(self) -> PlannedRow:
        return tuple(PlannedGroup(g.prefix, tuple(g.samples)) for g in self.groups)


def _pack(bundles: list[_Bundle], max_len: int) -> list[PlannedRow]:
    """Best fit among a bounded number of open rows: the fullest row that still has room.

    Where none has, the emptiest takes what it can of questions that share a prefix, if these are two at least.
    """
    rows: list[PlannedRow] = []
    open_rows: list[_OpenRow] = []
    waiting = deque(bundles)
    while waiting:
        bundle = waiting.popleft()
        row = _best_fit(open_rows, bundle)
        if row is None:
            if len(bundle.samples) > 2 and len(open_rows) >= SPLIT_ROWS:
                emptiest = max(open_rows, key=lambda r: r.room)
                part, rest = bundle.split(emptiest.room - bundle.prefix)
                if len(part.samples) > 1:
                    emptiest.add(part)
                    waiting.appendleft(rest)
                    continue
            if len(open_rows) == OPEN_ROWS:
                fullest = min(range(OPEN_ROWS), key=lambda r: open_rows[r].room)
                rows.append(open_rows.pop(fullest).close())
            row = _OpenRow(max_len)
            open_rows.append(row)
        row.add(bundle)
    return rows + [row.close() for row in open_rows]


def _best_fit(open_rows: list[_OpenRow], bundle: _Bundle) -> _OpenRow | None:
    """The first of the rows in which the bundle leaves the least room. Packing spends most of its time here."""
    best, least = None, 0
    key, joined, alone = bundle.key, bundle.own, bundle.own + bundle.prefix
    for row in open_rows:
        left = row.room - (joined if key in row.by_key else alone)
        if left >= 0 and (best is None or left < least):
            best, least = row, left
    return best


def _take_turns(samples: np.ndarray, weight: float, epoch: int, seed: int, dataset: int) -> np.ndarray:
    """The part of a dataset that this epoch sees: round(weight·n) samples of an endless series of shuffles."""
    if not len(samples):
        return samples
    first, last = (round(weight * len(samples) * e) for e in (epoch, epoch + 1))
    passes = range(first // len(samples), -(-last // len(samples)))
    series = np.concatenate(
        [_rng(seed, p, 2 + dataset).permutation(samples) for p in passes] or [samples[:0]]
    )
    skip = first - (first // len(samples)) * len(samples)
    return series[skip : skip + last - first]


def _rng(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 32) | epoch]))


def bucket(size: int, least: int = 1) -> int:
    """The smallest of least·{1, 2, 4, 8, ...} that is >= size."""
    return least << (max(1, -(-size // least)) - 1).bit_length()


def token_buckets(max_len: int, pack: bool = True) -> list[int]:
    """Row lengths in use, in multiples of 8.

    Packed rows are full but for the last of an epoch: an eighth, a quarter, a half and the whole of max_len. Rows of
    one conversation have its length, in steps of 64 or of an eighth of the next power of two.
    """
    if pack:
        return [max(8, -(-max_len // (8 * d)) * 8) for d in (8, 4, 2, 1)]
    steps = [1 << max(6, n - 3) for n in range(6, max_len.bit_length() + 1)]
    found = {size for step in steps for size in range(step, 8 * step + 1, step) if size < max_len}
    return [*sorted(found), -(-max_len // 8) * 8]
