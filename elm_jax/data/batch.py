"""The batch: what one optimizer step reads, and how rows of packed conversations become its arrays.

A row of T tokens holds *groups*; a group is a prefix and one or more *branches*, laid out group after
group, prefix first, branches one after the other. A token sees those before it in its own group that
belong to the prefix or to its own branch, and positions continue from the prefix, so each branch computes
what it would compute alone behind its prefix.

Dimension letters: A micro-batches, B rows, T tokens, S signal slots of a row, N signal tokens per ECG,
M supervised slots of a row, Q blocks of a row, n blocks of keys that a block of queries may see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Array = Any  # of NumPy on the host, of JAX on devices and in traced functions
Signal = np.ndarray | dict[str, Any]  # one ECG as a model sees it: an array, or several by name


Shown = dict[str, Any]  # one ECG as a model sees it: its signal in each view


class ArraySpec(NamedTuple):
    """The shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: Any = np.float32


BLOCK = 64  # tokens: attention is skipped a block of queries and keys at a time
Layout = ArraySpec | Mapping[str, Any]  # of a Signal: the same tree with ArraySpecs


def empty_signals(layout: Layout, *leading: int) -> Signal:
    """Zeros for `leading` signals of this layout."""
    if isinstance(layout, ArraySpec):
        return np.zeros((*leading, *layout.shape), layout.dtype)
    return {name: empty_signals(part, *leading) for name, part in layout.items()}


def arrays_in(signals: Signal) -> Iterator[np.ndarray]:
    """The arrays of signals."""
    if isinstance(signals, dict):
        for part in signals.values():
            yield from arrays_in(part)
    else:
        yield signals


def put_signal(signals: Signal, place: tuple[int, ...], signal: Signal) -> None:
    """Write one signal into its place among `signals`; of an ECG, the views that it has."""
    if isinstance(signals, dict):
        assert isinstance(signal, dict) and signals.keys() >= signal.keys()
        for name, part in signal.items():
            put_signal(signals[name], place, part)
    else:
        signals[place] = signal


def place_ecgs(
    signals: Signal, weights: np.ndarray, row: tuple[int, ...], first: int, ecgs: Sequence[Shown] | None,
    positions: np.ndarray, slots: np.ndarray, readers: int = 1,
) -> None:  # fmt: skip
    """Lay ECGs out in a row's signal slots, from number `first` on; the one place where this is done.

    Args:
        signals, weights: leaves (..., S, ...) and (..., S), of a batch; row: its place on the leading axes.
        ecgs: None, of a bad record: their slots stay unused.
        positions: (n, N) of their tokens, by embedding, -1 where an ECG has none for it; slots: (T,), which gets there
            the number of the token's embedding.
        readers: how many conversations read them.
    """
    width = positions.shape[1]
    for number, places in enumerate(positions, first):
        if ecgs is not None:
            put_signal(signals, (*row, number), ecgs[number - first])
            weights[(*row, number)] = readers
        there = places >= 0
        slots[places[there]] = np.arange(number * width, (number + 1) * width)[there]


class Batch(NamedTuple):
    """One step's arrays; a pytree. In training every array has a leading micro-batch axis A."""

    tokens: Array  # (B, T) int32
    positions: Array  # (B, T) int32, counted within the conversation
    group_ids: Array  # (B, T) int32, 0 = padding
    branch_ids: Array  # (B, T) int32, 0 = the group's prefix
    signals: Any  # by view, leaves (B, S, ...): an array or a dictionary of arrays
    signal_weights: Array  # (B, S) float32: conversations that read this signal; 0 = slot unused
    signal_slot: Array  # (B, T) int32: index into the row's S·N signal embeddings, -1 for text
    target_index: Array  # (B, M) int32: the position whose hidden state predicts the target
    target_ids: Array  # (B, M) int32
    target_weights: Array  # (B, M) float32, 0 = slot unused
    target_sample: Array  # (B, M) int32: the place in `sample_ids` of the sample that the target is of
    extras: Any  # leaves (B, M) float32 by name: what an objective has beside the targets; none for most
    sample_ids: Array  # (B, M) int32: the samples of the row, -1 = none (a row has at most M)
    key_blocks: Array  # (B, Q, n) int32: the blocks that each block of tokens may see, then -1; n = 0: all of them


@dataclass(frozen=True)
class BatchShape:
    """The static sizes of a batch; few distinct ones, since each costs a compilation."""

    tokens: int
    signals: int
    targets: int
    key_blocks: int = 0  # n; 0: attention looks at all pairs of tokens


@dataclass(frozen=True)
class Conversation:
    """One sample, rendered, with its signals loaded. `signals is None` marks a bad record: weight 0."""

    sample: int
    ids: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool
    signal_positions: np.ndarray  # (n_ecgs, N) int32, by embedding; -1 where an ECG has none for it
    signals: list[Shown] | None  # n_ecgs of them
    extras: Mapping[str, Any] = field(default_factory=dict)  # a number, or one for each supervised token


@dataclass(frozen=True)
class Group:
    """Conversations that share their first `prefix` tokens (0: nothing is shared)."""

    prefix: int
    conversations: list[Conversation]


def collate(rows: list[list[Group]], shape: BatchShape, layout: Layout, extras: Iterable[str] = ()) -> Batch:
    """Lay rows of groups out as arrays (no micro-batch axis). A row that does not fit is our own fault."""
    batch = empty_batch(shape, layout, len(rows), extras=extras)
    for r, groups in enumerate(rows):
        write_row(batch, (r,), groups)
    return batch


def empty_batch(shape: BatchShape, layout: Layout, *leading: int, extras: Iterable[str] = ()) -> Batch:
    """A batch of padding with these leading axes: (B,), or (A, B) with micro-batches. `write_row` fills it."""
    return Batch(
        tokens=np.zeros((*leading, shape.tokens), np.int32),
        positions=np.zeros((*leading, shape.tokens), np.int32),
        group_ids=np.zeros((*leading, shape.tokens), np.int32),
        branch_ids=np.zeros((*leading, shape.tokens), np.int32),
        signals=empty_signals(layout, *leading, shape.signals),
        signal_weights=np.zeros((*leading, shape.signals), np.float32),
        signal_slot=np.full((*leading, shape.tokens), -1, np.int32),
        target_index=np.zeros((*leading, shape.targets), np.int32),
        target_ids=np.zeros((*leading, shape.targets), np.int32),
        target_weights=np.zeros((*leading, shape.targets), np.float32),
        target_sample=np.zeros((*leading, shape.targets), np.int32),
        extras={name: np.zeros((*leading, shape.targets), np.float32) for name in extras},
        sample_ids=np.full((*leading, shape.targets), -1, np.int32),
        key_blocks=np.full((*leading, shape.tokens // BLOCK, shape.key_blocks), -1, np.int32),
    )


def write_row(batch: Batch, row: tuple[int, ...], groups: list[Group]) -> None:
    """Lay groups out in an empty row of a batch, by its place on the leading axes."""
    _RowWriter(batch, row).write(groups)
    key_blocks = batch.key_blocks[row]
    if key_blocks.shape[1]:
        spans = [(g.prefix, [len(c.ids) - g.prefix for c in g.conversations]) for g in groups]
        for block, seen in enumerate(visible_blocks(spans, batch.tokens.shape[-1])):
            found = np.flatnonzero(seen)
            key_blocks[block, : len(found)] = found


def visible_blocks(groups: Iterable[tuple[int, Sequence[int]]], tokens: int) -> np.ndarray:
    """(Q, Q) bool: whether any token of a block of queries sees a block of keys, in a row of `tokens`.

    groups: the tokens of each group's prefix and of each of its branches, in the row's order.
    """
    seen = np.zeros((tokens // BLOCK, tokens // BLOCK), bool)
    end = 0

    def blocks(first: int, size: int) -> slice:
        return slice(first // BLOCK, -(-(first + size) // BLOCK))

    for prefix, branches in groups:
        shared = blocks(end, prefix) if prefix else slice(0)
        seen[shared, shared] = True
        end += prefix
        for size in branches:
            own = blocks(end, size)
            seen[own, shared] = seen[own, own] = True
            end += size
    return np.tril(seen)


class _RowWriter:
    """Fills one row from left to right."""

    def __init__(self, batch: Batch, row: tuple[int, ...]) -> None:
        self.batch, self.place = batch, row
        trees = {"signals": None, "extras": {name: a[row] for name, a in batch.extras.items()}}
        self.row = Batch(**{n: trees[n] if n in trees else a[row] for n, a in batch._asdict().items()})
        self.token = self.signal = self.target = self.sample = 0

    def write(self, groups: list[Group]) -> None:
        for number, group in enumerate(groups, start=1):
            start = self.token
            # Of a bad record nothing may be known; what is shared comes from a good one where there is any.
            first = next((c for c in group.conversations if c.signals is not None), group.conversations[0])
            shared_ecgs = ecgs_before(first, group.prefix)
            readers = sum(c.signals is not None for c in group.conversations)
            shared_slots = self._place_signals(first, 0, shared_ecgs, readers)
            self._place_tokens(first, 0, group.prefix, number, 0, shared_slots)
            for branch, conversation in enumerate(group.conversations, start=1):
                own = self._place_signals(
                    conversation,
                    shared_ecgs,
                    len(conversation.signal_positions),
                    int(conversation.signals is not None),
                )
                offset = self.token - group.prefix  # row position of the conversation's token 0, were it here
                length = len(conversation.ids)
                self._place_tokens(
                    conversation,
                    group.prefix,
                    length,
                    number,
                    branch if group.prefix else 0,
                    own,
                )
                self._place_targets(conversation, group.prefix, start, offset)
            # Without a prefix a group holds one conversation, whose tokens are the prefix itself.
            assert group.prefix or len(group.conversations) == 1

    def _place_signals(self, c: Conversation, first: int, last: int, readers: int) -> np.ndarray:
        """Put ECGs [first, last) in slots; the slot embedding of each of the conversation's tokens, -1 for text."""
        slots = np.full(len(c.ids), -1, np.int32)
        ecgs, positions = None if c.signals is None else c.signals[first:last], c.signal_positions[first:last]
        signals, weights = self.batch.signals, self.batch.signal_weights
        place_ecgs(signals, weights, self.place, self.signal, ecgs, positions, slots, readers)
        self.signal += last - first
        return slots

    def _place_tokens(
        self, c: Conversation, first: int, last: int, group: int, branch: int, slots: np.ndarray
    ) -> None:
        begin, end = self.token, self.token + last - first
        assert end <= len(self.row.tokens), "the plan put more tokens in a row than it holds"
        self.row.tokens[begin:end] = c.ids[first:last]
        self.row.positions[begin:end] = np.arange(first, last)
        self.row.group_ids[begin:end] = group
        self.row.branch_ids[begin:end] = branch
        self.row.signal_slot[begin:end] = slots[first:last]
        self.token = end

    def _place_targets(self, c: Conversation, prefix: int, start: int, offset: int) -> None:
        """The token at conversation position p is predicted by position p - 1, in the prefix or the branch."""
        targets = np.flatnonzero(c.supervised)
        assert not len(targets) or targets[0] >= max(prefix, 1), (
            "a supervised token lies in the shared prefix"
        )
        source = targets - 1
        slots = slice(self.target, self.target + len(targets))
        self.row.target_index[slots] = np.where(source < prefix, start + source, offset + source)
        self.row.target_ids[slots] = c.ids[targets]
        self.row.target_weights[slots] = float(c.signals is not None)
        self.row.target_sample[slots] = self.sample
        for name, values in c.extras.items():
            self.row.extras[name][slots] = values
        self.row.sample_ids[self.sample] = c.sample
        self.sample += 1
        self.target += len(targets)


def ecgs_before(c: Conversation, prefix: int) -> int:
    """How many of the conversation's ECGs lie wholly in its first `prefix` tokens."""
    if not c.signal_positions.size:
        return 0
    return int((c.signal_positions.max(axis=1) < prefix).sum())
