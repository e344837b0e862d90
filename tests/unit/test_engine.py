"""The engine: prompts through a few rows give what each gives alone, and few shapes are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llms import TINY, VOCABULARY, tiny_llm

from elm_jax.inference.engine import GREEDY, Engine, Options
from elm_jax.inference.generate import generate
from elm_jax.inference.requests import Piece, Request
from elm_jax.models.decoder import Decoder

ENDS = (3, 7)


def embedded(llm: Decoder, pieces: Sequence[Piece], rows: int, width: int) -> jnp.ndarray:
    tokens = np.zeros((rows, width), np.int32)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece.ids)] = piece.ids
    return llm.embed(jnp.asarray(tokens))


def engine_of(family: str, ends: Sequence[int] = ENDS) -> Engine:
    llm = tiny_llm(family)
    return Engine(llm, partial(embedded, llm), ends)


def requests(count: int, seed: int = 0, shared: int = 0, new: int = 9) -> list[Request]:
    """Random prompts of 1 to 24 tokens; with `shared`, behind one of two beginnings of that length."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(1, VOCABULARY, (2, shared))
    made = []
    for number in range(count):
        own = rng.integers(1, VOCABULARY, rng.integers(1, 25))
        ids = np.concatenate([starts[rng.integers(2)], own]).astype(np.int32)
        made.append(Request(number, ids, (), np.zeros((0, 0), np.int32), (shared,), int(rng.integers(1, new + 1))))
    return made


def answered(engine: Engine, asked: Sequence[Request], rows: int, options: Options = GREEDY, **more: int) -> dict:
    found: dict[int, list[int]] = {}
    ended: set[int] = set()
    for event in engine.run(iter(asked), rows, options, **more):
        assert event.number not in ended
        found.setdefault(event.number, []).extend(event.tokens)
        if event.seconds is not None:
            ended.add(event.number)
    assert ended == {request.number for request in asked}
    return found


def alone(family: str, request: Request) -> list[int]:
    row = generate(tiny_llm(family), request.ids[None], max_new_tokens=9, eos_ids=ENDS)[0]
    return [int(token) for token in row if token >= 0][: request.new]


@pytest.mark.parametrize("family", TINY)
def test_rows_that_are_refilled_answer_as_prompts_alone(family: str) -> None:
    asked = requests(11, shared=6)
    expected = {request.number: alone(family, request) for request in asked}
    assert len({len(answer) for answer in expected.values()}) > 3, "the answers end together"
    for rows in (1, 3, 8):
        assert answered(engine_of(family), asked, rows) == expected
