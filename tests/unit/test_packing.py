"""Packing changes nothing but the work: the same samples give the same loss and gradients in any layout."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import RandomConversations, batch_of, tiny_elm

from elm_jax.data.batch import Batch, Group
from elm_jax.models.attention import packed_mask
from elm_jax.training.state import split_names
from elm_jax.training.step import loss_and_gradients

ROWS = 11


@pytest.fixture(scope="module")
def layouts() -> dict[str, Batch]:
    """The same conversations, unevenly spread over recordings, laid out in four ways."""
    talk = RandomConversations()
    recordings = [talk.recording() for _ in range(3)] + [talk.recording(2)]
    asked = [
        [talk.ask(r, 3 + n, 1 + n % 3) for n in range(count)]
        for r, count in zip(recordings, (5, 1, 2, 2), strict=True)
    ]
    late = talk.ask(talk.recording(2), 3, 2, late_ecgs=1)
    everything = [c for questions in asked for c in questions] + [late]
    system, first_ecg = 5, 5 + 2
    halves = everything[:6], everything[6:]
    rows = {
        "single": [[Group(0, [c])] for c in everything],
        "packed": [[Group(0, [c]) for c in half] for half in halves],
        "system": [[Group(system, list(half))] for half in halves],
        "ecg": [
            [Group(first_ecg, asked[0]), Group(first_ecg, asked[1])],
            [Group(first_ecg, asked[2]), Group(first_ecg + 2, asked[3]), Group(0, [late])],
        ],
    }
    # One shape for all, so that each step compiles once; the empty rows must not matter either.
    return {name: batch_of(r + [[]] * (ROWS - len(r)), tokens=128, signals=10) for name, r in rows.items()}


@functools.cache
def compiled(update: tuple[str, ...]) -> tuple[Callable, dict, dict]:
    structure, arrays = tiny_elm()
    trained, moving, frozen = (({n: arrays[n] for n in names}) for names in split_names(structure, update))
    step = jax.jit(lambda t, m, b: loss_and_gradients(structure, t, m, frozen, b)[:3])
    return step, trained, moving


def evaluate(batch: Batch, update: tuple[str, ...]) -> tuple[jax.Array, dict, dict]:
    step, trained, moving = compiled(update)
    with jax.default_matmul_precision("highest"):
        return step(trained, moving, batch)


@pytest.mark.parametrize(
    "update", [("connector", "llm"), ("encoder", "connector", "llm")], ids=["frozen", "trained"]
)
@pytest.mark.parametrize("layout", ["packed", "system", "ecg"])
def test_layouts_agree(layouts: dict[str, Batch], layout: str, update: tuple[str, ...]) -> None:
    expected = evaluate(layouts["single"], update)
    found = evaluate(layouts[layout], update)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-5 * scale, err_msg=name)
    for name, statistic in expected[2].items():
        np.testing.assert_allclose(found[2][name], statistic, rtol=1e-5, atol=1e-6, err_msg=name)
    assert ("encoder" in update) == bool(expected[2])


@pytest.mark.parametrize("layout", ["packed", "system", "ecg"])
def test_leaving_out_hidden_blocks_changes_nothing(layouts: dict[str, Batch], layout: str) -> None:
    """Blocks of 16 tokens, as many for each as the fullest needs."""
    whole, size = layouts[layout], 16
    seen = np.asarray(packed_mask(whole.group_ids[0], whole.branch_ids[0]))[:, 0]
    blocks = seen.reshape(ROWS, 128 // size, size, 128 // size, size).any((2, 4))
    most = int(blocks.sum(-1).max())
    order = np.argsort(~blocks, axis=-1, kind="stable")[..., :most]
    key_blocks = np.where(np.take_along_axis(blocks, order, -1), order, -1).astype(np.int32)
    assert most < 8 and (key_blocks < 0).any()
    update = ("encoder", "connector", "llm")
    expected, found = evaluate(whole, update), evaluate(whole._replace(key_blocks=key_blocks[None]), update)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-6 * scale, err_msg=name)


def test_shared_layouts_run_the_encoder_once_for_a_recording(layouts: dict[str, Batch]) -> None:
    used = {name: int((np.asarray(batch.signal_weights) > 0).sum()) for name, batch in layouts.items()}
    assert used == {"single": 14, "packed": 14, "system": 14, "ecg": 7}


def test_a_branch_does_not_see_another_by_a_bit() -> None:
    talk = RandomConversations(3)
    recording = talk.recording()
    questions = [talk.ask(recording) for _ in range(3)]
    structure, arrays = tiny_elm()
    batch = batch_of([[Group(7, questions), Group(0, [talk.ask(talk.recording())])]])
    run = jax.jit(lambda b: structure.bind(arrays).hidden(jax.tree.map(lambda x: x[0], b)))
    before = np.asarray(run(batch))
    group, branch = batch.group_ids[0, 0], batch.branch_ids[0, 0]
    mine = (group == 1) & (branch == 2)
    tokens = batch.tokens.copy()
    tokens[0, 0, mine] = tokens[0, 0, mine] % 40 + 2
    after = np.asarray(run(batch._replace(tokens=tokens)))
    assert not np.array_equal(before[0, mine], after[0, mine])
    np.testing.assert_array_equal(before[0, ~mine], after[0, ~mine])


def test_accumulated_micro_batches_equal_one_batch(layouts: dict[str, Batch]) -> None:
    update = ("connector", "llm")
    whole = layouts["packed"]
    parts = jax.tree.map(lambda x: np.swapaxes(np.asarray(x), 0, 1), whole)
    expected, found = evaluate(whole, update), evaluate(parts, update)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-5 * scale, err_msg=name)


def test_a_bad_record_weighs_nothing() -> None:
    talk = RandomConversations(5)
    good, bad = talk.ask(talk.recording()), talk.ask(talk.recording())
    marked = type(bad)(bad.sample, bad.ids, bad.supervised, bad.signal_positions, None)
    update = ("encoder", "connector", "llm")
    alone = evaluate(batch_of([[Group(0, [good])], *[[]] * (ROWS - 1)], tokens=128, signals=10), update)
    both = evaluate(
        batch_of([[Group(0, [good])], [Group(0, [marked])], *[[]] * (ROWS - 2)], tokens=128, signals=10),
        update,
    )
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-6)
    for name in alone[2]:
        np.testing.assert_allclose(both[2][name], alone[2][name], rtol=1e-5, err_msg=name)
