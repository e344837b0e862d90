"""Prompts as the programs take them: behind the beginnings that they share, which are computed once.

R rows of a prefill, T tokens of it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from elm_jax.inference.cache import Cache
from elm_jax.inference.decoding import Model, Prompts, cache_prefixes, enlarge_cache, make_cache
from elm_jax.inference.generate import bucket
from elm_jax.inference.requests import Piece, Request

NARROW, ROOM = 8, 64  # widths are multiples of the one, the places of the pool of the other

Embed = Callable[[Sequence[Piece], int, int], jax.Array]
log = logging.getLogger(__name__)


class Prefill(NamedTuple):
    """What programs take. pool: None where no prompt has a known beginning; source: (R,) rows of it."""

    prompts: Prompts
    pool: Cache | None
    source: np.ndarray
    pieces: list[Piece]  # what the prompts' tokens are


class Known(NamedTuple):
    """A beginning in the pool: its row, and its length in tokens."""

    row: int
    length: int


class Prefills:
    """Makes prefills for one model, behind a pool of `capacity` beginnings at most; those that nothing waits for make
    room first.

    `most_pairs` of a query and a key are in one of them, unless one prompt has more: bounds its memory.
    `embed`: (pieces, rows, width) -> (rows, width, D), the inputs of the pieces' tokens, padded on the right.
    `note` is told each call: the program's name and its shapes.
    """

    def __init__(self, model: Model, embed: Embed, most_pairs: int, note: Callable[..., None]) -> None:
        self.model, self.embed, self.most_pairs, self.note = model, embed, most_pairs, note
        self.forget()

    def reserve(self, capacity: int) -> None:
        """Have room for so many beginnings; what is known is lost where there is less."""
        if capacity > self.capacity:
            self.forget(capacity)

    def forget(self, capacity: int = 0) -> None:
        """Know no beginnings, as at first: what comes next does not depend on what was before."""
        self.capacity = capacity
        self._known: dict[bytes, Known] = {}  # the least recently used first
        self._pool: Cache | None = None

    @property
    def places(self) -> int:
        """Tokens that a beginning in the pool may have."""
        return 0 if self._pool is None else self._pool.places

    def make(self, chosen: Sequence[Request], wanted: Counter[bytes], sizes: Sequence[int]) -> Prefill:
        """These prompts. `wanted`: how many prompts have a beginning; what two have is shared."""
        for missing in self._missing(chosen, wanted):
            size = min(fitting(len(missing), sizes), self.bounded(max(end for _, end in missing), sizes))
            for first in range(0, len(missing), size):
                self._cache(missing[first : first + size], size)
        known = [self._find(request) for request in chosen]
        pieces = [Piece(r, k.length if k else 0, len(r.ids)) for r, k in zip(chosen, known, strict=True)]
        count = fitting(len(chosen), sizes)
        source = padded([k.row if k else 0 for k in known], count)
        return Prefill(self._prompts(pieces, count), self._pool if any(known) else None, source, pieces)

    def bounded(self, tokens: int, sizes: Sequence[int]) -> int:
        """The most rows that prompts of so many tokens may have."""
        wide = width(tokens)
        return max((n for n in sizes if n * wide * (wide + self.places) <= self.most_pairs), default=min(sizes))

    def likely(self, request: Request, wanted: Counter[bytes]) -> int:
        """How many tokens of the request are known, or will be, since several requests want them."""
        return max((end for end, key in request.beginnings if key in self._known or wanted[key] > 1), default=0)

    def _find(self, request: Request, below: int | None = None) -> Known | None:
        """The longest beginning of the request (with less than `below` tokens) in the pool; it counts as used."""
        for end, key in reversed(request.beginnings):
            if key in self._known and (below is None or end < below):
                self._known[key] = self._known.pop(key)
                return self._known[key]
        return None

    def _missing(self, chosen: Sequence[Request], wanted: Counter[bytes]) -> Iterator[list[tuple[Request, int]]]:
        """(request, end): beginnings that more than one of the `wanted` has, and that are not in the pool.

        Shorter ones come first, so that longer ones can begin with them: the caller adds what it gets before it asks
        for more. What does not fit beside the others of these requests is left out, and so is a beginning of requests
        that all go on alike: the longer one is had at once.
        """
        pinned = {key for request in chosen for _, key in request.beginnings}
        for level in range(max((len(r.beginnings) for r in chosen), default=0)):
            room = self.capacity - sum(key in pinned for key in self._known)
            found: dict[bytes, tuple[Request, int]] = {}
            for request in chosen:
                longer = max((wanted[key] for _, key in request.beginnings[level + 1 :]), default=1)
                for end, key in request.beginnings[level : level + 1]:
                    if key not in self._known and wanted[key] > max(longer, 1) and len(found) < room:
                        found.setdefault(key, (request, end))
            loose = sorted((key for key in self._known if key not in pinned), key=lambda key: wanted[key] > 0)
            for key in loose[: max(0, len(self._known) + len(found) - self.capacity)]:
                del self._known[key]
            if found:
                yield list(found.values())

    def _cache(self, missing: Sequence[tuple[Request, int]], count: int) -> None:
        """Put beginnings [0, end) of requests into the pool, behind what is known of them."""
        known = [self._find(request, below=end) for request, end in missing]
        pieces = [Piece(r, k.length if k else 0, end) for (r, end), k in zip(missing, known, strict=True)]
        source, prompts = padded([k.row if k else 0 for k in known], count), self._prompts(pieces, count)
        pool = self._with_room(bucket(max(p.begin for p in pieces) + prompts.x.shape[1], ROOM), prompts.x.dtype)
        try:
            slot = padded([self._add(request, end) for request, end in missing], count, self.capacity)
            self.note("cache prefixes behind others" if any(known) else "cache prefixes", prompts, pool)
            self._pool = cache_prefixes(self.model, pool, prompts, source, slot, any(known))
        except BaseException:  # nothing may be known that is not there
            self.forget(self.capacity)
            raise

    def _add(self, request: Request, end: int) -> int:
        """The row that the beginning [0, end) of the request is given."""
        used = {known.row for known in self._known.values()}
        row = next(row for row in range(self.capacity) if row not in used)
        self._known[next(key for edge, key in request.beginnings if edge == end)] = Known(row, end)
        return row

    def _with_room(self, places: int, dtype: Any) -> Cache:
        if self._pool is None:
            return make_cache(self.model, self.capacity, places, dtype, None)
        return enlarge_cache(self.model, self._pool, places, None) if places > self.places else self._pool

    def _prompts(self, pieces: Sequence[Piece], count: int) -> Prompts:
        x = self.embed(pieces, count, width(max(len(piece.ids) for piece in pieces)))
        lengths, before = [len(piece.ids) for piece in pieces], [piece.begin for piece in pieces]
        return Prompts(x, padded(lengths, count), padded(before, count))


def width(tokens: int) -> int:
    """T of a prefill whose longest prompt has so many tokens: a sixteenth of a power of two more at most."""
    step = max(NARROW, (1 << (tokens - 1).bit_length()) // 16)
    return -(-tokens // step) * step


def fitting(count: int, sizes: Sequence[int]) -> int:
    """R of a prefill of `count` prompts, or of the first of them: the smallest that half fills with all, or less."""
    enough = [size for size in sizes if count <= size <= 2 * count]
    return min(enough, default=None) or max((size for size in sizes if size <= count), default=min(sizes))


def padded(values: Sequence[int], count: int, filling: int = 0) -> np.ndarray:
    """(count,) int32."""
    return np.array([*values, *[filling] * (count - len(values))], np.int32)
