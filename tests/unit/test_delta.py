"""Gated DeltaNet: the rule itself, and rows that hold several conversations and branches behind a shared prefix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.models import delta
from elm_jax.models.delta import Chains, DeltaSizes, GatedDeltaNet, Recurrent, delta_rule

SIZES, WIDTH = DeltaSizes(taps=4, key_heads=2, value_heads=4, key_dim=5, value_dim=3), 8
# Groups of a row: the tokens of the prefix, and of each branch; a group of one conversation has a prefix alone.
LAYOUTS = [
    [(5, (3, 7, 1)), (6, ()), (1, (2, 2)), (9, (4,))],
    [(4, ()), (2, (1, 1, 1)), (8, (8, 3)), (3, ())],  # bounds at those of chunks, too
]
ROOM = 44


def test_the_rule_is_that_of_the_golden_whatever_the_chunk(golden, monkeypatch) -> None:
    """With a state before the first token; and token by token, as the paper writes it."""
    found = np.load(golden("llm_qwen3_5") / "outputs.npz")
    case = {name.split("/")[1]: found[name] for name in found if name.startswith("delta_rule_unit/")}
    q, k, v, g, beta = (jnp.asarray(case[name]) for name in ("query", "key", "value", "g", "beta"))
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    unit = delta._unit
    for size in (64, 16):
        monkeypatch.setattr(delta, "CHUNK", size)
        chains = Chains.behind_past(jnp.ones(g.shape[:2], bool), 4)
        scaled = unit(q) * q.shape[-1] ** -0.5
        out, state = delta_rule(scaled, unit(k), v, g, beta, chains, jnp.asarray(case["initial_state"]))
        np.testing.assert_allclose(out, case["out"], atol=5e-6)
        np.testing.assert_allclose(state, case["final_state"], atol=5e-6)


def packed(layout: list[tuple[int, tuple[int, ...]]]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Groups and branches (T,) of a row, and of each conversation the places of its tokens."""
    groups, branches, conversations = np.zeros((2, ROOM), int)[0], np.zeros(ROOM, int), []
    at = 0
    for number, (prefix, own) in enumerate(layout, start=1):
        start = at
        for branch, size in enumerate((prefix, *own)):
            groups[at : at + size], branches[at : at + size] = number, branch
            if branch or not own:
                shared = range(start, start + prefix) if branch else ()
                conversations.append(np.array([*shared, *range(at, at + size)]))
            at += size
    assert at <= ROOM
    return groups, branches, conversations


@pytest.fixture(scope="module")
def layer() -> GatedDeltaNet:
    """With decays of all kinds, and a norm that is not that of the start."""
    made = GatedDeltaNet(WIDTH, SIZES, 1e-6, nnx.Rngs(0), shrink=1.0, param_dtype=jnp.float32)
    made.norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(1), made.norm.scale.shape)
    made.step_bias[...] = jnp.linspace(-3.0, 1.0, SIZES.value_heads)
    return made


def loss(layer: GatedDeltaNet, x: jax.Array, groups: Any, branches: Any, weights: jax.Array) -> jax.Array:
    return (layer(x, Chains.of(groups, branches, SIZES.taps))[0] * weights).sum()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["mixed", "at bounds"])
def test_packed_conversations_have_the_loss_and_gradients_that_they_have_alone(layer, layout, monkeypatch) -> None:
    """In chunks of 4, so that states go from chunk to chunk, start anew, and go from a prefix to later branches."""
    groups, branches, conversations = packed(layout)
    rng = np.random.default_rng(0)
    x, weights = (rng.normal(size=(ROOM, WIDTH)).astype(np.float32) for _ in range(2))
    graph, state = nnx.split(layer)

    def of(state: nnx.State, x: jax.Array, groups: Any, branches: Any, weights: jax.Array) -> jax.Array:
        return loss(nnx.merge(graph, state), x, groups, branches, weights)

    # Alone: each row one conversation, at its beginning; what is shared counts in the first of them.
    alone, theirs = np.zeros((len(conversations), ROOM, WIDTH), np.float32), np.zeros((len(conversations), ROOM))
    heard = np.zeros((len(conversations), ROOM, WIDTH), np.float32)
    counted = groups == 0
    for row, places in enumerate(conversations):
        count = len(places)
        alone[row, :count], theirs[row, :count] = x[places], 1
        heard[row, :count] = weights[places] * ~counted[places][:, None]
        counted[places] = True
    assert counted.all()
    run = jax.value_and_grad(of, argnums=(0, 1))
    expected, (by_state, by_rows) = jax.jit(run)(state, alone, theirs.astype(int), 0 * theirs.astype(int), heard)
    monkeypatch.setattr(delta, "CHUNK", 4)
    found, (ours, by_x) = jax.jit(lambda *given: run(*given))(
        state, x[None], groups[None], branches[None], (weights * (groups > 0)[:, None])[None]
    )
    assert found == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(by_state), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    gathered = np.zeros_like(x)
    for row, places in enumerate(conversations):
        gathered[places] += by_rows[row, : len(places)]
    np.testing.assert_allclose(by_x[0], gathered, atol=2e-5 * np.abs(gathered).max())


def test_a_row_that_goes_on_is_as_if_it_had_not_stopped(layer) -> None:
    """In pieces that are padded behind, one of them a single token, one shorter than the convolution."""
    x = jax.random.normal(jax.random.key(0), (2, 12, WIDTH))
    ones = jnp.ones((2, 12), int)
    whole, last = layer(x, Chains.of(ones, 0 * ones, SIZES.taps))
    past, at, parts = Recurrent.empty(SIZES, (2,), jnp.float32), 0, []
    for size in (2, 1, 5, 4):
        valid = jnp.broadcast_to(jnp.arange(5) < size, (2, 5))
        piece = jnp.pad(x[:, at : at + size], ((0, 0), (0, 5 - size), (0, 0)), constant_values=7.0)
        out, past = layer(piece, Chains.behind_past(valid, SIZES.taps), past)
        parts.append(out[:, :size])
        at += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    for a, b in zip(past, last, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
