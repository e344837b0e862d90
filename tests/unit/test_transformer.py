"""The transformer that the encoders share: what it keeps for the backward pass, and the sum of its blocks' outputs."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.models.encoders.transformer import Transformer, TransformerConfig
from elm_jax.models.functional import structure_of

CONFIG = TransformerConfig(width=32, depth=6, heads=2, mlp=128)


def squares(remat: Any, summed: bool, arrays: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    structure = structure_of(lambda: Transformer(replace(CONFIG, remat=remat), nnx.Rngs(0)))
    model = structure.bind(arrays)
    return jnp.sum((model.sum_of_outputs(x) if summed else model(x)) ** 2)


def inputs() -> tuple[dict[str, jax.Array], jax.Array]:
    structure = structure_of(lambda: Transformer(CONFIG, nnx.Rngs(0)))
    return structure.arrays(Transformer(CONFIG, nnx.Rngs(0))), jax.random.normal(jax.random.key(0), (4, 48, 32))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_no_gradient(remat: str, summed: bool) -> None:
    arrays, x = inputs()
    found, expected = (jax.jit(jax.grad(partial(squares, kind, summed)))(arrays, x) for kind in (remat, "none"))
    scale = min(np.abs(expected[f"blocks.{name}.kernel"]).max() for name in ("attention.v", "mlp.fc1"))
    for name, gradient in expected.items():  # that of the keys' biases is zero but for rounding
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_the_backward_pass_keeps_the_blocks_inputs_alone() -> None:
    arrays, x = inputs()

    def kept(remat: str, function: Any = jax.grad) -> int:
        compiled = jax.jit(function(partial(squares, remat, False))).lower(arrays, x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert kept("full") < 0.5 * kept("none")
    assert kept("full", lambda f: f) == kept("none", lambda f: f)  # nothing where nothing is trained
    assert CONFIG.remat == "full"


def test_the_sum_is_of_the_outputs_of_all_blocks() -> None:
    arrays, x = inputs()
    graph, state = nnx.split(Transformer(CONFIG, nnx.Rngs(0)).blocks)
    total, h, mask = jnp.zeros_like(x), x, jnp.ones((1, 1, 1, 1), bool)
    for layer in range(CONFIG.depth):
        h = nnx.merge(graph, jax.tree.map(lambda leaf, i=layer: leaf[i], state))(h, mask)
        total += h
    model = structure_of(lambda: Transformer(CONFIG, nnx.Rngs(0))).bind(arrays)
    np.testing.assert_allclose(model.sum_of_outputs(x), total, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(model(x), h, rtol=1e-5, atol=1e-5)
