"""The plan: which conversations share which row of which step, a pure function of (length index, seed, step).

A resume on any number of hosts therefore sees the same samples in the same rows, each once an epoch, and the
step number is the whole data state. A step is a number of rows, or a number of conversations in as many rows as they
need; then only how many empty rows stand behind them depends on the mesh. No jax here.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from elm_jax.data.batch import BLOCK, BatchShape, visible_blocks
from elm_jax.data.packing import Bundle, LengthIndex, PlannedRow, Rows
from elm_jax.data.packing import pack as pack_rows
from elm_jax.errors import UserError
from elm_jax.folders import keep, kept

ECG_ROWS = 2  # version of how rows that share ECGs are made: a run goes on as it began
VERSION = 1  # of what is kept of a plan
KEPT_FROM = 50_000  # samples that take seconds to plan
PLANNED_EPOCHS = 2  # epochs whose rows are kept: steps at the end of one are read ahead into the next
TRIED_STEPS, TRIED_SAMPLES = 32, 20_000  # at most, on which the rows of a step of conversations are measured
WAYS = 8  # parts of a batch that the length of rows is chosen for; the same for every mesh
LEAST_BLOCKS = 8  # of a row's attention: in shorter ones nothing is gained by leaving some out
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Usage:
    """What a row needs of each bounded axis."""

    tokens: int = 0
    signals: int = 0
    targets: int = 0


@dataclass(frozen=True)
class _Measures:
    """What steps usually need, as far as the first epoch tells."""

    tokens: int  # of a row that is packed
    rows: int  # of a micro-batch, empty ones not counted
    signals: int  # of a row's shape, at least
    targets: int
    key_blocks: int


class Plan:
    """Rows of every step. Safe to use from several threads; a pickled copy has the epochs that were planned last.

    Args:
        index: the length index; samples of length 0 are left out.
        rows: rows per optimizer step, over all hosts and micro-batches; or
        conversations: conversations per optimizer step, the same number in each micro-batch.
        micro_batches: equal parts of a step that are accumulated, one after another in its rows.
        ways: what the rows of a micro-batch are to divide by.
        max_len: tokens of a row.
        pack: several conversations in a row; False puts each in a row of its own.
        weights: how often each dataset is seen in an epoch (1 = each sample once; None = all 1). A fraction
            takes turns: a dataset of weight 0.5 is seen whole every two epochs.
        shuffle: False keeps the samples' order (validation and test).
        cache: where the first epoch and the sizes of those counted are kept, if planning them takes seconds.
    """

    def __init__(
        self,
        index: LengthIndex,
        *,
        rows: int | None = None,
        conversations: int | None = None,
        micro_batches: int = 1,
        ways: int = 1,
        max_len: int,
        pack: bool,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        cache: Path | None = None,
    ) -> None:
        if not (index.length > 0).any():
            raise UserError(
                "data.names", "no usable sample", "at least one conversation", "check the dataset"
            )
        assert (rows is None) != (conversations is None), "a step counts rows or conversations"
        self._count = rows or conversations or 0  # of a step
        assert self._count % (micro_batches * (ways if rows else 1)) == 0, (rows, conversations, micro_batches, ways)
        self.index, self.conversations, self.max_len, self.pack = index, conversations, max_len, pack
        self.micro_batches, self.ways = micro_batches, ways
        self.seed, self.weights, self.shuffle = seed, weights, shuffle
        if weights is not None and not len(self._order(0)):
            raise UserError(
                "data.weights", f"{', '.join(f'{w:g}' for w in weights)}, by which the first epoch has nothing",
                "at least one conversation an epoch", "raise them",
            )  # fmt: skip
        self._epoch_ends: list[int] = []
        self._planned: dict[int, Any] = {}
        self._measures: _Measures | None = None
        self._lock = threading.RLock()
        is_slow = pack and len(index) >= KEPT_FROM and (conversations is None or index.shares_ecg.any())
        self._stem = cache / self._name if cache and is_slow else None
        if whole := self._stem and kept(self._stem, ".npz"):
            with contextlib.suppress(OSError), np.load(whole) as found:  # somebody else may have removed it
                self._epoch_ends = found["ends"].tolist()
                parts = {name: found[name] for name in found if name != "ends"}
                self._planned[0] = Rows(**parts) if conversations is None else parts["samples"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_stem": None}

    @property
    def _name(self) -> str:
        """Changes with all that decides the rows of epochs."""
        told = (VERSION, ECG_ROWS, self.conversations, self._count, self.max_len, self.seed, self.weights, self.shuffle)
        digest = xxhash.xxh3_128(repr(told).encode())
        for column in (self.index.length, self.index.prefix, self.index.key, self.index.shares_ecg, self.index.dataset):
            digest.update(np.ascontiguousarray(column).data)
        return f"plan-{digest.hexdigest()}"

    def _keep(self) -> None:
        """Keep the first epoch while it is there: a run needs it no more later, and does not fail by it."""
        if self._stem is None or 0 not in self._planned:
            return
        planned = self._planned[0]
        parts = vars(planned) if self.conversations is None else {"samples": planned}
        try:
            keep(self._stem, ".npz", lambda file: np.savez(file, ends=np.array(self._epoch_ends), **parts))
        except UserError as error:
            _log.warning("the next start plans the first epoch anew: %s", error)
            self._stem = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def steps_before(self, epoch: int) -> int:
        """Number of steps in epochs 0 .. epoch - 1. How many rows an epoch packs into only its plan tells."""
        with self._lock:
            known = len(self._epoch_ends)
            while len(self._epoch_ends) < epoch:
                parts = self._count_parts(len(self._epoch_ends))
                before = self._epoch_ends[-1] if self._epoch_ends else 0
                self._epoch_ends.append(before + -(-parts // self._count))
            if self.conversations is None and len(self._epoch_ends) > known:
                self._keep()
            return self._epoch_ends[epoch - 1] if epoch else 0

    def _count_parts(self, epoch: int) -> int:
        """Rows or conversations of an epoch. The first epochs planned stay, since a run begins with them, whatever
        else is counted."""
        if not self.pack or self.conversations:
            return len(self._order(epoch))
        if epoch in self._planned or len(self._planned) < PLANNED_EPOCHS:
            return len(self._parts_of_epoch(epoch))
        return len(self._plan_epoch(epoch))

    @property
    def usual_rows(self) -> int:
        """Rows of most steps."""
        if self.conversations is None:
            return self._count
        return self.micro_batches * -(-self._measured().rows // self.ways) * self.ways

    def averages(self) -> tuple[float, float]:
        """Conversations and supervised tokens of a step, on average over the first epoch."""
        order, steps = self._order(0), self.steps_before(1)
        return len(order) / steps, int(self.index.targets[order].sum()) / steps

    def epoch_of(self, step: int) -> int:
        """The epoch in which `step` (from 0) falls."""
        while not self._epoch_ends or self._epoch_ends[-1] <= step:
            self.steps_before(len(self._epoch_ends) + 1)
        return bisect.bisect_right(self._epoch_ends, step)

    def rows(self, step: int) -> list[PlannedRow]:
        """The rows of a step, micro-batch after micro-batch; each is filled up with empty rows."""
        epoch = self.epoch_of(step)
        first = (step - self.steps_before(epoch)) * self._count
        chosen = self._parts_of_epoch(epoch)[first : first + self._count]
        if self.conversations is None:
            return chosen + [()] * (self._count - len(chosen))
        parts = self._micro_batches(chosen.tolist(), self._measured().tokens)
        count = self._row_bucket(max(map(len, parts)))
        return [row for part in parts for row in part + [()] * (count - len(part))]

    def _row_bucket(self, needed: int) -> int:
        """Rows of a micro-batch that needs so many: in quarters of what is usual, so that these counts are few."""
        usual = self.usual_rows // self.micro_batches // self.ways
        steps = (-(-usual * quarters // 4) * self.ways for quarters in itertools.count(1 if self.pack else 4))
        return next(rows for rows in steps if rows >= needed)

    def _micro_batches(self, samples: list[int], tokens: int) -> list[list[PlannedRow]]:
        """Each micro-batch's conversations of a step in rows of so many tokens, or of what the longest one needs."""
        size = self._count // self.micro_batches
        parts = [samples[first : first + size] for first in range(0, self._count, size)]
        if not self.pack:
            return [Rows.alone(np.array(part))[:] for part in parts]
        longest = max(tokens, int(self.index.length[samples].max()))
        room = min(self.max_len, next(t for t in token_buckets(self.max_len) if t >= longest))
        return [list(pack_rows(self._bundles(part, room), room)) for part in parts]

    def shape(self, rows: Sequence[PlannedRow]) -> BatchShape:
        """The smallest bucket that holds all rows of a step; the same on every host.

        Signals and targets are not cut finer than half of what the fullest row of the first epoch needs, so that an
        epoch has a handful of shapes to compile at most; and where a step is a number of conversations, of which the
        number of rows and how full they are vary, not finer than what the fullest row of the first steps needs.
        """
        usage = [self._usage(row) for row in rows]
        tokens = self._tokens(max(u.tokens for u in usage))
        least = self._measured()
        signals = bucket(max(u.signals for u in usage), least.signals)
        targets = bucket(max(u.targets for u in usage), least.targets)
        return BatchShape(tokens, signals, targets, self._key_blocks(rows, tokens, least.key_blocks))

    def _tokens(self, used: int) -> int:
        return next(tokens for tokens in token_buckets(self.max_len, self.pack) if tokens >= used)

    def _key_blocks(self, rows: Sequence[PlannedRow], tokens: int, least: int) -> int:
        """How many blocks of keys a block of queries sees at most, in sixteenths of all; above one half 0: all."""
        blocks = tokens // BLOCK
        if not self.pack or tokens % BLOCK or blocks < LEAST_BLOCKS:
            return 0
        most = max(least, *(self._blocks_seen(row, tokens) for row in rows))
        step = -(-blocks // 16)
        rounded = -(-most // step) * step
        return rounded if 2 * rounded <= blocks else 0

    def _blocks_seen(self, row: PlannedRow, tokens: int) -> int:
        """How many blocks of keys a block of queries sees at most, in a row of so many tokens."""
        spans = [(g.prefix, (self.index.length[list(g.samples)] - g.prefix).tolist()) for g in row]
        return int(visible_blocks(spans, tokens).sum(1).max())

    def _measured(self) -> _Measures:
        with self._lock:
            if self._measures is None:
                self._measures = self._measure_rows() if self.conversations is None else self._measure_conversations()
            return self._measures

    def _measure_rows(self) -> _Measures:
        rows, index = self._parts_of_epoch(0), self.index
        firsts = rows.samples[rows.groups[:-1]]
        shared = np.where(rows.prefixes > 0, index.prefix_ecgs[firsts], 0)
        own = index.ecgs[rows.samples] - np.repeat(shared, np.diff(rows.groups))
        signals = bucket(int(rows.sums(own, shared).max()))
        targets = bucket(int(rows.sums(index.targets[rows.samples]).max()), 8)
        return _Measures(self.max_len, self._count // self.micro_batches, -(-signals // 2), -(-targets // 2), 0)

    def _measure_conversations(self) -> _Measures:
        tokens, steps = self._row_length()
        rows = [row for step in steps for part in step for row in part]
        usage = [self._usage(row) for row in rows]
        signals, targets = max(1, *(u.signals for u in usage)), bucket(max(u.targets for u in usage), 8)
        blocks = max(self._blocks_seen(row, -(-tokens // BLOCK) * BLOCK) for row in rows) if self.pack else 0
        return _Measures(tokens, max(len(part) for step in steps for part in step), signals, targets, blocks)

    def _row_length(self) -> tuple[int, list[list[list[PlannedRow]]]]:
        """Tokens of the rows in which the first steps of conversations take least room, and these steps' rows.

        Long rows share more; where they are fewer than the parts of a batch, shorter ones leave fewer rows empty.
        """
        steps = max(1, min(TRIED_STEPS, TRIED_SAMPLES // self._count))
        samples = self._parts_of_epoch(0)[: steps * self._count].tolist()
        chosen = [samples[first : first + self._count] for first in range(0, len(samples), self._count)]
        found = []
        for tokens in token_buckets(self.max_len) if self.pack else [self.max_len]:
            rows = [self._micro_batches(step, tokens) for step in chosen]
            found.append((sum(map(self._room, rows)), -tokens, rows))
        _, tokens, rows = min(found, key=lambda one: one[:2])
        return -tokens, rows

    def _room(self, parts: list[list[PlannedRow]]) -> int:
        """Tokens that the rows of a step hold on a mesh of WAYS, by micro-batch."""
        fullest = max(self._usage(row).tokens for part in parts for row in part)
        return -(-max(map(len, parts)) // WAYS) * WAYS * self._tokens(fullest)

    def _usage(self, row: PlannedRow) -> _Usage:
        tokens = signals = targets = 0
        for group in row:
            chosen = np.asarray(group.samples)
            shared = int(self.index.prefix_ecgs[chosen[0]]) if group.prefix else 0
            tokens += group.prefix + int((self.index.length[chosen] - group.prefix).sum())
            signals += shared + int((self.index.ecgs[chosen] - shared).sum())
            targets += int(self.index.targets[chosen].sum())
        return _Usage(tokens, signals, targets)

    def _parts_of_epoch(self, epoch: int) -> Any:
        """What the steps of an epoch are cut from: its Rows, or the samples where conversations are counted."""
        with self._lock:
            if epoch not in self._planned:
                while len(self._planned) >= PLANNED_EPOCHS:
                    del self._planned[next(iter(self._planned))]
                self._planned[epoch] = self._plan_epoch(epoch)
                if epoch == 0 and self.conversations is not None:  # of which nothing was planned to count them
                    self._keep()
            return self._planned[epoch]

    def _plan_epoch(self, epoch: int) -> Any:
        order = self._order(epoch)
        if self.conversations is not None:
            return self._together(order, epoch)
        if not self.pack:
            return Rows.alone(order)
        rows = Rows.of(pack_rows(self._bundles(order.tolist(), self.max_len), self.max_len))
        return rows.in_order(self._shuffle(epoch).permutation(len(rows))) if self.shuffle else rows

    def _together(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """The samples of an epoch with those that share an ECG one after another, so that a step has several."""
        if not self.index.shares_ecg.any():
            return order
        bundles = list(self._bundles(order.tolist(), self.max_len))
        places = self._shuffle(epoch).permutation(len(bundles)) if self.shuffle else range(len(bundles))
        return np.array([sample for place in places for sample in bundles[place].samples])

    def _shuffle(self, epoch: int) -> np.random.Generator:
        """What the rows of an epoch are shuffled by."""
        return _rng(self.seed, epoch, 1)

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

    def _bundles(self, order: list[int], room: int) -> Iterator[Bundle]:
        """Samples in order of first appearance; those that share an ECG together, as far as a row holds them.

        Where only the system prompt is shared, rows join samples themselves (`_pack`).
        """
        index, latest, bundles = self.index, dict[int, Bundle](), list[Bundle]()
        gathers = index.shares_ecg[order].any()  # else each is ready at once
        columns = (column[order].tolist() for column in (index.length, index.prefix, index.key, index.shares_ecg))
        for i, length, prefix, key, with_ecg in zip(order, *columns, strict=True):
            own = length - prefix
            assert length <= room, "a sample is longer than a row: the index has another max_len"
            bundle = latest.get(key) if prefix and with_ecg else None
            if bundle is None or prefix + bundle.own + own > room:
                bundle = latest[key] = Bundle(key, prefix)
                bundles.append(bundle)
            bundle.add(i, own)
            if not gathers:
                yield bundles.pop()
        yield from bundles


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
