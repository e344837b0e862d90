"""Packing: samples with what they share are laid into as few rows as hold them. No jax here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SPLIT_ROWS = 8  # open rows from which on questions about one ECG are divided over rows to fill them
OPEN_ROWS = 32  # rows that packing keeps open at a time: more packs tighter and plans slower


@dataclass(frozen=True)
class PlannedGroup:
    """Samples behind one shared prefix of `prefix` tokens (0: one sample, nothing shared)."""

    prefix: int
    samples: tuple[int, ...]


PlannedRow = tuple[PlannedGroup, ...]


@dataclass
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

    def __init__(self, room: int) -> None:
        self.room = room
        self.groups: list[Bundle] = []
        self.by_key: dict[int, Bundle] = {}

    def cost(self, bundle: Bundle) -> int:
        return bundle.own + (0 if bundle.key in self.by_key else bundle.prefix)

    def add(self, bundle: Bundle) -> None:
        self.room -= self.cost(bundle)
        group = self.by_key.get(bundle.key) if bundle.prefix else None
        if group is None:
            group = Bundle(bundle.key, bundle.prefix)
            self.groups.append(group)
            if bundle.prefix:
                self.by_key[bundle.key] = group
        group.samples.extend(bundle.samples)

    def close(self) -> PlannedRow:
        return tuple(PlannedGroup(g.prefix, tuple(g.samples)) for g in self.groups)


def pack(bundles: list[Bundle], max_len: int) -> list[PlannedRow]:
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


def _best_fit(open_rows: list[_OpenRow], bundle: Bundle) -> _OpenRow | None:
    """The first of the rows in which the bundle leaves the least room. Packing spends most of its time here."""
    best, least = None, 0
    key, joined, alone = bundle.key, bundle.own, bundle.own + bundle.prefix
    for row in open_rows:
        left = row.room - (joined if key in row.by_key else alone)
        if left >= 0 and (best is None or left < least):
            best, least = row, left
    return best
