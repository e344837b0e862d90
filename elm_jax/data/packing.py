"""Packing: samples with what they share are laid into as few rows as hold them. No jax here."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

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

    @property
    def cuts(self) -> dict[str, float]:
        """How many conversations `data.max_len` cuts, their share of all, and what it takes of them."""
        number = int(self.cut.sum())
        return {"conversations": number, "share": number / max(len(self), 1), "answers": int(self.lost_answers.sum()),
                "with_ecgs_cut": int(self.cut_ecgs.sum())}  # fmt: skip


@dataclass(frozen=True)
class PlannedGroup:
    """Samples behind one shared prefix of `prefix` tokens (0: one sample, nothing shared)."""

    prefix: int
    samples: tuple[int, ...]


PlannedRow = tuple[PlannedGroup, ...]


@dataclass(frozen=True)
class Rows:
    """Planned rows as arrays, a few bytes a sample: where the groups of each row begin, where the samples of each
    group begin, and where the last ones end; (R + 1,), (G + 1,) int32."""

    rows: np.ndarray
    groups: np.ndarray
    prefixes: np.ndarray  # (G,) int32
    samples: np.ndarray  # (N,) int32

    @classmethod
    def of(cls, planned: Iterable[PlannedRow]) -> Rows:
        rows, groups, prefixes, samples = array("i", [0]), array("i", [0]), array("i"), array("i")
        for row in planned:
            for group in row:
                prefixes.append(group.prefix)
                samples.extend(group.samples)
                groups.append(len(samples))
            rows.append(len(prefixes))
        return cls(*(np.frombuffer(part, np.int32) for part in (rows, groups, prefixes, samples)))

    @classmethod
    def alone(cls, samples: np.ndarray) -> Rows:
        """A row for each sample."""
        places = np.arange(len(samples) + 1, dtype=np.int32)
        return cls(places, places, np.zeros(len(samples), np.int32), samples.astype(np.int32))

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, chosen: slice) -> list[PlannedRow]:
        return [self._row(number) for number in range(len(self))[chosen]]

    def _row(self, number: int) -> PlannedRow:
        first, last = self.rows[number : number + 2].tolist()
        prefixes, ends = self.prefixes[first:last].tolist(), self.groups[first : last + 1].tolist()
        samples = self.samples[ends[0] : ends[-1]].tolist()
        spans = ((a - ends[0], b - ends[0]) for a, b in itertools.pairwise(ends))
        return tuple(PlannedGroup(p, tuple(samples[a:b])) for p, (a, b) in zip(prefixes, spans, strict=True))

    def in_order(self, order: np.ndarray) -> Rows:
        """The rows (R,) in another order."""
        groups, rows = _gathered(self.rows, order)
        samples, ends = _gathered(self.groups, groups)
        return Rows(rows, ends, self.prefixes[groups], self.samples[samples])

    def sums(self, of_samples: np.ndarray, of_prefixes: np.ndarray | None = None) -> np.ndarray:
        """(R,): for each row the sum of what its samples have, (N,), and its prefixes, (G,)."""
        total = np.append(0, np.cumsum(of_samples, dtype=np.int64))[self.groups]
        if of_prefixes is not None:
            total += np.append(0, np.cumsum(of_prefixes, dtype=np.int64))
        return np.diff(total[self.rows])


def _gathered(starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of what lies in spans that begin at `starts`, taken in this order, and where these spans then begin
    and the last one ends."""
    sizes = np.diff(starts)[order]
    ends = np.append(0, np.cumsum(sizes)).astype(np.int32)
    return np.repeat(starts[order] - ends[:-1], sizes) + np.arange(ends[-1], dtype=np.int32), ends


@dataclass(slots=True)
class Bundle:
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

    def split(self, room: int) -> tuple[Bundle, Bundle]:
        """The first samples that fit in `room` tokens beside the prefix, and the others."""
        parts = Bundle(self.key, self.prefix), Bundle(self.key, self.prefix)
        for sample, size in zip(self.samples, self.sizes, strict=True):
            parts[bool(parts[1].samples) or parts[0].own + size > room].add(sample, size)
        return parts


class _OpenRow:
    """A row being packed: tokens left, and the groups that more samples may join, by key."""

    __slots__ = ("by_key", "groups", "room")

    def __init__(self, room: int) -> None:
        self.room = room
        self.groups: list[Bundle] = []
        self.by_key: dict[int, Bundle] = {}

    def add(self, bundle: Bundle) -> None:
        group = self.by_key.get(bundle.key) if bundle.prefix else None
        self.room -= bundle.own + (bundle.prefix if group is None else 0)
        if group is None:
            group = Bundle(bundle.key, bundle.prefix)
            self.groups.append(group)
            if bundle.prefix:
                self.by_key[bundle.key] = group
        group.samples.extend(bundle.samples)

    def close(self) -> PlannedRow:
        return tuple(PlannedGroup(g.prefix, tuple(g.samples)) for g in self.groups)


class _OpenRows:
    """Rows being packed, by number, which is their order; `rooms` are sorted: (tokens left, number)."""

    def __init__(self) -> None:
        self.rows: dict[int, _OpenRow] = {}
        self.rooms: list[tuple[int, int]] = []
        self.holding: dict[int, set[int]] = {}  # by key, the rows that have a group of it

    def add(self, number: int, bundle: Bundle) -> None:
        row = self.rows[number]
        del self.rooms[bisect_left(self.rooms, (row.room, number))]
        row.add(bundle)
        insort(self.rooms, (row.room, number))
        if bundle.prefix:
            self.holding.setdefault(bundle.key, set()).add(number)

    def begin(self, number: int, room: int) -> None:
        self.rows[number] = _OpenRow(room)
        insort(self.rooms, (room, number))

    def close_fullest(self) -> PlannedRow:
        _, number = self.rooms.pop(0)
        row = self.rows.pop(number)
        for key in row.by_key:
            self.holding[key].discard(number)
            if not self.holding[key]:
                del self.holding[key]
        return row.close()

    @property
    def emptiest(self) -> int:
        """The first of those that have the most room."""
        return self.rooms[bisect_left(self.rooms, (self.rooms[-1][0], -1))][1]

    def best_fit(self, bundle: Bundle) -> int | None:
        """The first of the rows in which the bundle leaves the least room. Packing spends most of its time here."""
        holding = self.holding.get(bundle.key, ()) if bundle.prefix else ()
        joins = len(holding) == len(self.rows)  # wherever it goes
        needed = bundle.own if joins else bundle.own + bundle.prefix
        first = bisect_left(self.rooms, (needed, -1))
        fits = ((room - needed, number) for room, number in itertools.islice(self.rooms, first, None))
        if joins or not holding:
            return next(fits, (0, None))[1]
        best = next((fit for fit in fits if fit[1] not in holding), None)
        joined = ((self.rows[number].room - bundle.own, number) for number in holding)
        least = min((fit for fit in joined if fit[0] >= 0), default=None)
        return min((fit for fit in (best, least) if fit is not None), default=(0, None))[1]


def pack(bundles: Iterable[Bundle], max_len: int) -> Iterator[PlannedRow]:
    """Best fit among a bounded number of open rows: the fullest row that still has room.

    Where none has, the emptiest takes what it can of questions that share a prefix, if these are two at least.
    """
    left, numbers, opened = iter(bundles), itertools.count(), _OpenRows()
    rest: Bundle | None = None
    while (bundle := rest or next(left, None)) is not None:
        rest = None
        number = opened.best_fit(bundle)
        if number is None:
            if len(bundle.samples) > 2 and len(opened.rows) >= SPLIT_ROWS:
                emptiest = opened.emptiest
                part, others = bundle.split(opened.rows[emptiest].room - bundle.prefix)
                if len(part.samples) > 1:
                    opened.add(emptiest, part)
                    rest = others
                    continue
            if len(opened.rows) == OPEN_ROWS:
                yield opened.close_fullest()
            number = next(numbers)
            opened.begin(number, max_len)
        opened.add(number, bundle)
    yield from (row.close() for row in opened.rows.values())
