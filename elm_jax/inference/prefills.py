"""Prompts as the programs take them: behind the beginnings that they share, which are computed once.

R rows of a prefill, T tokens of it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from elm_jax.inference import programs
from elm_jax.inference.decoding import Cache, Prompts
from elm_jax.inference.generate import bucket
from elm_jax.inference.prefixes import Prefixes
from elm_jax.inference.programs import Model
from elm_jax.inference.requests import Piece, Request

NARROW, ROOM = 8, 64  # widths are multiples of the one, the places of the pool of the other

Embed = Callable[[Sequence[Piece], int, int], jax.Array]
log = logging.getLogger(__name__)


class Prefill(NamedTuple):
    """What `begin` and `score` take. pool: None where no prompt has a known beginning; source: (R,) rows of it."""

    prompts: Prompts
    pool: Cache | None
    source: np.ndarray
    pieces: list[Piece]  # what the prompts' tokens are


class Prefills:
    """Makes prefills for one model; `sizes` are the numbers of rows that they have.

    `most_pairs` of a query and a key are in one of them, unless one prompt has more: bounds its memory.
    `embed`: (pieces, rows, width) -> (rows, width, D), the inputs of the pieces' tokens, padded on the right.
    `note` is told each call: the program's name and its shapes.
    """

    def __init__(self, model: Model, embed: Embed, most_pairs: int, note: Callable[..., None]) -> None:
        self.model, self.embed, self.most_pairs, self.note = model, embed, most_pairs, note
        self.directory = Prefixes(0)
        self._pool: Cache | None = None

    def reserve(self, capacity: int) -> None:
        """Have room for so many beginnings; what is known is lost where there is less."""
        if capacity > self.directory.capacity:
            self.directory, self._pool = Prefixes(capacity), None

    def forget(self) -> None:
        """Know no beginnings, as at first: what comes next does not depend on what was before."""
        self.directory, self._pool = Prefixes(0), None

    @property
    def places(self) -> int:
        """Tokens that a beginning in the pool may have."""
        return 0 if self._pool is None else self._pool.keys.shape[2]

    def make(self, chosen: Sequence[Request], wanted: Counter[bytes], sizes: Sequence[int]) -> Prefill:
        """These prompts. `wanted`: how many prompts have a beginning; what two have is shared."""
        for missing in self.directory.missing(chosen, wanted):
            size = min(fitting(len(missing), sizes), self.bounded(max(end for _, end in missing), sizes))
            for first in range(0, len(missing), size):
                self._remember(missing[first : first + size], size)
        known = [self.directory.find(request) for request in chosen]
        pieces = [Piece(r, k.length if k else 0, len(r.ids)) for r, k in zip(chosen, known, strict=True)]
        count = fitting(len(chosen), sizes)
        source = padded([k.row if k else 0 for k in known], count)
        return Prefill(self._prompts(pieces, count), self._pool if any(known) else None, source, pieces)

    def bounded(self, tokens: int, sizes: Sequence[int]) -> int:
        """The most rows that prompts of so many tokens may have."""
        wide = width(tokens)
        return max((n for n in sizes if n * wide * (wide + self.places) <= self.most_pairs), default=min(sizes))

    def _remember(self, missing: Sequence[tuple[Request, int]], count: int) -> None:
        """Put beginnings [0, end) of requests into the pool, behind what is known of them."""
        known = [self.directory.find(request, below=end) for request, end in missing]
        pieces = [Piece(r, k.length if k else 0, end) for (r, end), k in zip(missing, known, strict=True)]
        source, prompts = padded([k.row if k else 0 for k in known], count), self._prompts(pieces, count)
        pool = self._with_room(bucket(max(p.begin for p in pieces) + prompts.x.shape[1], ROOM), prompts.x.dtype)
        try:
            rows = [self.directory.add(request, end).row for request, end in missing]
            slot = padded(rows, count, self.directory.capacity)
            self.note("remember behind another" if any(known) else "remember", prompts, pool)
            self._pool = programs.remember(self.model, pool, prompts, source, slot, any(known))
        except BaseException:  # the directory must not name what is not there
            self.directory, self._pool = Prefixes(self.directory.capacity), None
            raise

    def _with_room(self, places: int, dtype: Any) -> Cache:
        if self._pool is None:
            return programs.make_cache(self.model, self.directory.capacity, places, dtype, None)
        return programs.longer(self.model, self._pool, places, None) if places > self.places else self._pool

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
