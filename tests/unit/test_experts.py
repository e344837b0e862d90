"""A mixture of experts: only the chosen ones compute, and what they compute is what all of them would, weighed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.models import experts
from elm_jax.models.experts import Experts, ExpertSizes, _laid_out

WIDTH = 6


def made(count: int, chosen: int, normalised: bool) -> Experts:
    sizes = ExpertSizes(count, chosen, 5, normalised)
    return Experts(WIDTH, sizes, nnx.Rngs(0), activation="silu", shrink=1.0, param_dtype=jnp.float32)


def dense(layer: Experts, x: jax.Array) -> jax.Array:
    """All experts for all tokens."""
    share = jax.nn.softmax(x @ layer.router[...], axis=-1)
    best = jnp.sort(share, axis=-1)[..., -layer.sizes.chosen, None]
    share = jnp.where(share >= best, share, 0)
    share = share / share.sum(-1, keepdims=True) if layer.sizes.normalised else share
    inner = jax.nn.silu(jnp.einsum("btd,edi->btei", x, layer.gate.kernel[...]))
    inner *= jnp.einsum("btd,edi->btei", x, layer.up.kernel[...])
    return jnp.einsum("btei,eid,bte->btd", inner, layer.down.kernel[...], share)


@pytest.mark.parametrize(("shift", "normalised"), [(0.0, True), (50.0, False)], ids=["spread", "all to the same two"])
def test_the_chosen_experts_compute_what_all_of_them_would(shift: float, normalised: bool, monkeypatch) -> None:
    monkeypatch.setattr(experts, "BLOCK", 8)
    layer = made(7, 2, normalised)
    x = jax.random.normal(jax.random.key(1), (3, 9, WIDTH)).at[..., 0].set(1.0)
    layer.router[...] = layer.router[...].at[0, :2].add(shift)
    graph, state = nnx.split(layer)

    def outputs(function, state, x):
        return (function(nnx.merge(graph, state), x) * jnp.arange(WIDTH)).sum()

    run = [jax.jit(jax.value_and_grad(lambda s, x, f=f: outputs(f, s, x), (0, 1))) for f in (Experts.__call__, dense)]
    (found, ours), (expected, theirs) = (each(state, x) for each in run)
    assert found == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-3))


@pytest.mark.parametrize("expert", [[2, 0, 2, 2, 2, 0], [1] * 6, [0, 1, 2, 3, 0, 1]], ids=str)
def test_every_pair_has_a_place_in_a_block_of_its_expert(expert: list[int]) -> None:
    laid, place, owner = (np.asarray(x) for x in _laid_out(jnp.array(expert), 4, 4))
    assert laid[place].tolist() == list(range(6)) and (laid == 6).sum() == len(laid) - 6
    assert owner[place // 4].tolist() == expert
    assert len(owner) <= 6
