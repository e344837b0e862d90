"""What tests of generation share: an engine for a decoder alone, random prompts, and all that was answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.inference.engine import Engine
from elm_jax.inference.requests import Piece, Request
from elm_jax.inference.sampling import Sampling
from elm_jax.models.decoder import Decoder

NOWHERE = np.zeros((0, 0), np.int32)


def embedded(llm: Decoder, pieces: Sequence[Piece], rows: int, width: int) -> jax.Array:
    tokens = np.zeros((rows, width), np.int32)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece.ids)] = piece.ids
    return llm.embed(jnp.asarray(tokens))


def engine_for(llm: Decoder, ends: Sequence[int] = ()) -> Engine:
    """For prompts without ECGs."""
    return Engine(llm, partial(embedded, llm), ends)


def request(number: int, ids: Sequence[int] | np.ndarray, new: int, *edges: int) -> Request:
    return Request(number, np.asarray(ids, np.int32), (), NOWHERE, edges, new, draws=(number,))


def requests(count: int, vocabulary: int, shared: int = 0, new: int = 9) -> list[Request]:
    """Random prompts of 1 to 24 tokens; with `shared`, behind one of two beginnings of that length."""
    rng = np.random.default_rng(0)
    starts = rng.integers(1, vocabulary, (2, shared))
    owns = [rng.integers(1, vocabulary, rng.integers(1, 25)) for _ in range(count)]
    ids = [np.concatenate([starts[rng.integers(2)], own]) for own in owns]
    return [request(number, x, int(rng.integers(1, new + 1)), shared) for number, x in enumerate(ids)]


def answered(
    engine: Engine, asked: Iterable[Request], rows: int, sampling: Sampling | None = None, chunk: int = 32
) -> dict[int, list[int]]:
    """The tokens for each prompt; each must have ended once."""
    found: dict[int, list[int]] = {}
    ended: set[int] = set()
    for event in engine.run(asked, rows, sampling, chunk):
        assert event.number not in ended
        found.setdefault(event.number, []).extend(event.tokens)
        if event.seconds is not None:
            ended.add(event.number)
    assert ended == set(found)
    return found
