"""The engine: prompts through a few rows give what each gives alone, and few shapes are compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation import answered, engine_for, request, requests
from tiny_llms import TINY, VOCABULARY, tiny_llm

from elm_jax.inference import decoding
from elm_jax.inference.engine import AHEAD
from elm_jax.inference.generate import generate
from elm_jax.inference.requests import Request
from elm_jax.inference.sampling import Sampling, penalised

ENDS = (3, 7)


@functools.cache
def asked() -> list[Request]:
    return requests(11, VOCABULARY, shared=6)


@functools.cache
def alone(family: str) -> dict[int, list[int]]:
    """What `generate` makes of each prompt, in one batch with left padding."""
    width = max(len(r.ids) for r in asked())
    mask = np.arange(width) >= width - np.array([len(r.ids) for r in asked()])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([r.ids for r in asked()])
    out = np.asarray(generate(tiny_llm(family), tokens, None, mask, max_new_tokens=9, eos_ids=ENDS))
    return {r.number: [int(t) for t in row if t >= 0][: r.new] for r, row in zip(asked(), out, strict=True)}


@pytest.mark.parametrize(
    "family, rows",
    [("gemma2", 4), pytest.param("llama", 1, marks=pytest.mark.slow)]
    + [pytest.param(family, 8, marks=pytest.mark.slow) for family in TINY],
)
def test_rows_that_are_refilled_answer_as_prompts_alone(family: str, rows: int) -> None:
    """Gemma 2 has windows that are shorter than the prompts and their beginnings."""
    expected = alone(family)
    assert len({len(answer) for answer in expected.values()}) > 3, "the answers end together"
    engine = engine_for(tiny_llm(family), ENDS)
    assert answered(engine, asked(), rows) == expected
    assert any(name.startswith("cache prefixes") for name in engine.calls), "nothing was shared"


def test_beginnings_with_an_ecgs_views_in_another_order_are_others() -> None:
    ids, ecg = np.ones(4, np.int32), {"ecg": np.zeros(3), "image": np.zeros(3)}
    orders = (np.array([[0, 1]]), np.array([[1, 0]]), np.array([[-1, 1]]))
    assert len({Request(0, ids, (ecg,), places, (3,), 1).beginnings for places in orders}) == 3


@pytest.mark.slow
def test_neither_order_nor_sharing_nor_chunks_change_answers() -> None:
    engine = engine_for(tiny_llm("gemma2"), ENDS)
    expected = answered(engine, asked(), 4)
    assert expected == alone("gemma2")
    assert answered(engine, asked()[::-1], 4, chunk=2) == expected
    unshared = [request(r.number, r.ids, r.new) for r in asked()]
    assert answered(engine_for(tiny_llm("gemma2"), ENDS), unshared, 4) == expected


def test_draws_depend_on_the_seed_and_the_prompts_number_alone() -> None:
    engine = engine_for(tiny_llm("gemma2"), ENDS)
    sampling = Sampling.of(temperature=1.0, top_p=0.9, key=jax.random.key(5))
    drawn = answered(engine, asked(), 4, sampling)
    assert answered(engine, asked()[::-1], 2, sampling) == drawn
    assert answered(engine, asked(), 4, sampling._replace(key=jax.random.key(6))) != drawn


def test_prompts_are_read_as_rows_become_free() -> None:
    read: list[int] = []

    def prompts() -> Iterator[Request]:
        for each in requests(40, VOCABULARY):
            read.append(each.number)
            yield each

    ended: list[int] = []
    for event in engine_for(tiny_llm("gemma2")).run(prompts(), 4):
        ended += [event.number] * (event.seconds is not None)
        assert len(read) <= len(ended) + 4 + AHEAD * 4
    assert sorted(ended) == list(range(40))


@pytest.mark.slow
def test_programs_are_few_and_counted() -> None:
    """Widths 8, 16, 24 times 1 to 4 rows in a prefill, and one for the tokens; a second run compiles nothing."""
    engine = engine_for(tiny_llm("gemma2"), ENDS)
    answered(engine, requests(40, VOCABULARY), 4)
    names = set(engine.calls)
    assert len(names) <= 13 and sum(name.startswith("decode") for name in names) == 1
    compiled: list[Any] = [decoding.prefill_and_sample, decoding.decode]
    before = [program._cache_size() for program in compiled]
    answered(engine, requests(40, VOCABULARY), 4)
    assert set(engine.calls) == names
    assert before == [program._cache_size() for program in compiled]
    answered(engine, requests(40, VOCABULARY)[::-1], 4)
    assert len(engine.calls) <= 13


@pytest.mark.slow
def test_a_beginning_whose_own_beginning_was_pushed_out_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    system, *ecgs = (rng.integers(1, VOCABULARY, size) for size in (4, 5, 5))
    prompts = [request(n, [*system, *ecgs[n // 2], *rng.integers(1, VOCABULARY, 3)], 3, 4, 9) for n in range(4)]
    expected = answered(engine_for(tiny_llm("llama")), [request(r.number, r.ids, r.new) for r in prompts], 2)
    engine = engine_for(tiny_llm("llama"))
    assert answered(engine, prompts[:3], 2) == {n: expected[n] for n in (0, 1, 2)}
    known = engine.prefills._known
    assert len(known) == 2, "both beginnings are in the pool"
    del known[prompts[0].beginnings[0][1]]
    assert answered(engine, prompts, 2) == expected


def test_answers_to_a_prompt_are_those_of_as_many_prompts() -> None:
    """More prompts than there are groups, of which answers end at their own times; a prompt is computed once."""
    engine, sampling = engine_for(tiny_llm("gemma2"), ENDS), Sampling.of(0.8, 0.9, key=jax.random.key(5))
    expected = answered(engine, asked(), 4, sampling)
    together = [replace(one, draws=(one.number, 100, one.number)) for one in asked()]
    found: dict[tuple[int, int], list[int]] = {}
    logs: dict[tuple[int, int], list[float]] = {}
    for event in engine_for(tiny_llm("gemma2"), ENDS).run(together, 7, sampling):
        found.setdefault(event[:2], []).extend(event.tokens)
        logs.setdefault(event[:2], []).extend(event.log_probs)
    assert len(found) == 3 * len(together)
    for one in together:
        assert found[one.number, 0] == found[one.number, 2] == expected[one.number]
        ids = np.concatenate([one.ids, found[one.number, 1]])
        logits = np.asarray(tiny_llm("gemma2")(ids[None])[0], np.float64)[len(one.ids) - 1 : -1] / 0.8
        exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        exact = exact[np.arange(len(exact)), ids[len(one.ids) :]]
        np.testing.assert_allclose(logs[one.number, 1], exact, atol=1e-5)


@pytest.mark.slow
def test_layers_with_arrays_of_their_own_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("gemma2")
    decode: Any = decoding.decode
    with monkeypatch.context() as elsewhere:  # on CPUs layers are unrolled whatever the model says
        elsewhere.setattr(decoding, "platform", lambda: "gpu")
        decode.clear_cache()
        expected = answered(engine_for(llm, ENDS), asked(), 4)
        decode.clear_cache()
    assert answered(engine_for(llm, ENDS), asked(), 4) == expected
    assert answered(engine_for(llm.unstacked(), ENDS), asked(), 4) == expected
    unrolled = nnx.merge(*nnx.split(llm))
    unrolled.scan = False
    engine = engine_for(unrolled, ENDS)
    assert answered(engine, asked(), 4) == expected
    kernels = [x for x in jax.tree.leaves(engine.model.state) if x.ndim == 3]
    assert not kernels, "layers are still stacked"


def test_a_prompt_that_is_longer_than_those_before_gets_room() -> None:
    short, long = request(0, [5, 4, 9], 9), request(9, np.arange(1, 64).repeat(2), 4)
    prompts = [request(n, short.ids, 9) for n in range(8)] + [long]
    found = answered(engine_for(tiny_llm("gemma2")), iter(prompts), 1)
    assert found[9] == answered(engine_for(tiny_llm("gemma2")), [long], 1)[9] and len(found[9]) == 4


def test_scores_are_sums_of_log_probabilities() -> None:
    llm = tiny_llm("gemma2")
    engine, prompt = engine_for(llm), np.arange(1, 24)
    ids = [np.concatenate([prompt, ending]) for ending in ([5], [9, 4], [9, 4, 7])]
    found = engine.score([request(n, x, 0, 20, len(prompt) - 1) for n, x in enumerate(ids)], [len(prompt)] * 3)
    for x, score in zip(ids, found, strict=True):
        logits = np.asarray(llm(x[None])[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(logs[place - 1, x[place]] for place in range(len(prompt), len(x)))
        assert abs(score - expected) < 1e-4


def test_the_repetition_penalty_is_hugging_faces() -> None:
    logits, seen = jnp.array([[2.0, -2.0, 1.0, -1.0]]), jnp.array([[True, True, False, False]])
    assert penalised(logits, seen, jnp.float32(4.0)).tolist() == [[0.5, -8.0, 1.0, -1.0]]
