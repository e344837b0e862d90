"""Which beginnings of prompts are in the pool of prefixes, and which should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from elm_jax.inference.requests import Request


class Known(NamedTuple):
    """A beginning in the pool: its row, and its length in tokens."""

    row: int
    length: int


class Prefixes:
    """The pool's directory: `capacity` beginnings at most; those that nothing waits for make room first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._known: dict[bytes, Known] = {}  # the least recently used first

    def find(self, request: Request, below: int | None = None) -> Known | None:
        """The longest beginning of the request (with less than `below` tokens) in the pool; it counts as used."""
        for end, key in reversed(request.beginnings):
            if key in self._known and (below is None or end < below):
                self._known[key] = self._known.pop(key)
                return self._known[key]
        return None

    def likely(self, request: Request, wanted: Counter[bytes]) -> int:
        """How many tokens of the request are known, or will be, since several requests want them."""
        return max((end for end, key in request.beginnings if key in self._known or wanted[key] > 1), default=0)

    def missing(self, chosen: Sequence[Request], wanted: Counter[bytes]) -> Iterator[list[tuple[Request, int]]]:
        """(request, end): beginnings that more than one of the `wanted` has, and that are not in the pool.

        Shorter ones come first, so that longer ones can begin with them: the caller adds what it gets before it asks
        for more. What does not fit beside the others of these requests is left out.
        """
        pinned = {key for request in chosen for _, key in request.beginnings}
        for level in range(max((len(r.beginnings) for r in chosen), default=0)):
            room = self.capacity - sum(key in pinned for key in self._known)
            found: dict[bytes, tuple[Request, int]] = {}
            for request in chosen:
                for end, key in request.beginnings[level : level + 1]:
                    if key not in self._known and wanted[key] > 1 and len(found) < room:
                        found.setdefault(key, (request, end))
            self._make_room(len(found), pinned, wanted)
            if found:
                yield list(found.values())

    def add(self, request: Request, end: int) -> Known:
        """Give the beginning [0, end) of the request a row."""
        used = {known.row for known in self._known.values()}
        row = next(row for row in range(self.capacity) if row not in used)
        key = next(key for edge, key in request.beginnings if edge == end)
        self._known[key] = Known(row, end)
        return self._known[key]

    def _make_room(self, count: int, pinned: set[bytes], wanted: Counter[bytes]) -> None:
        loose = sorted((key for key in self._known if key not in pinned), key=lambda key: wanted[key] > 0)
        for key in loose[: max(0, len(self._known) + count - self.capacity)]:
            del self._known[key]
