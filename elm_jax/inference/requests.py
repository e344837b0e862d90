"""What the engine is asked: prompts with the places where a shared beginning may end.

T tokens of a prompt, N signal tokens per ECG.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from elm_jax.data.batch import Shown


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be gone on with.

    number: its own. draws: what is drawn for each of its answers depends on these, beside the seed; less than 2**31,
    and as many for each request of a run. ids: (T,) int32, T > 0. signals: its ECGs, whose embeddings stand at `places`
    (n_ecgs, N), -1 of those that there are not. edges: ascending; tokens [0, edge) are a beginning that other prompts
    may have, too. new: the most tokens that may be drawn.
    """

    number: int
    ids: np.ndarray
    signals: Sequence[Shown]
    places: np.ndarray
    edges: tuple[int, ...]
    new: int
    draws: tuple[int, ...] = (0,)

    @functools.cached_property
    def beginnings(self) -> tuple[tuple[int, bytes], ...]:
        """(tokens, what tells such a beginning from others) for each edge that leaves something after it."""
        edges = [edge for edge in dict.fromkeys(self.edges) if 0 < edge < len(self.ids)]
        return tuple((edge, self._digest(edge)) for edge in edges)

    def ecgs(self, begin: int, end: int) -> range:
        """The ECGs that stand in tokens [begin, end)."""
        if not self.signals:
            return range(0)
        last = self.places.max(axis=1)
        first = np.where(self.places < 0, last[:, None], self.places).min(axis=1)
        return range(int((first < begin).sum()), int((last < end).sum()))

    def _digest(self, edge: int) -> bytes:
        digest = hashlib.blake2b(np.ascontiguousarray(self.ids[:edge], np.int32).tobytes(), digest_size=16)
        for ecg in self.ecgs(0, edge):
            digest.update(np.ascontiguousarray(self.places[ecg], np.int32).tobytes())
            for leaf in jax.tree.leaves(self.signals[ecg]):
                digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.digest()


class Piece(NamedTuple):
    """Tokens [begin, end) of a request."""

    request: Request
    begin: int
    end: int

    @property
    def ids(self) -> np.ndarray:
        return self.request.ids[self.begin : self.end]


class Event(NamedTuple):
    """Tokens that were drawn for an answer to a prompt, and their log probabilities as `sampling.draw` has them;
    `seconds` since the prompt's turn came, where these are its last."""

    number: int
    answer: int
    tokens: list[int]
    log_probs: list[float]
    seconds: float | None
