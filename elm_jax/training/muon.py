"""Muon: momentum whose direction is made orthogonal, for the matrices of a model.

As torch.optim.Muon has it, except that the iteration runs in float32 where PyTorch's runs in bfloat16. (The Muon of
optax differs from both: it corrects the bias of its momentum.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from elm_jax.models.functional import Arrays, Leaf
from elm_jax.models.lora import is_lora
from elm_jax.models.names import Rule

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LEAST_NORM = 1e-7
# A published name with one of these in it is no matrix, to the reference.
_EXCLUDED = ("emb", "output_proj", "head", "norm", "ln")


class MuonState(NamedTuple):
    """The momentum of each matrix, in its shape."""

    momentum: Arrays


def orthogonalised(x: jax.Array, steps: int) -> jax.Array:
    """(..., I, O) -> nearly U Vᵀ of x = U S Vᵀ (singular values about 0.7 to 1.2), by Newton-Schulz in float32."""
    wide = x.shape[-2] <= x.shape[-1]
    y = x.astype(jnp.float32) if wide else x.astype(jnp.float32).swapaxes(-2, -1)
    y /= jnp.maximum(jnp.linalg.norm(y, axis=(-2, -1), keepdims=True), LEAST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = _product(y, y.swapaxes(-2, -1))
        y = a * y + _product(b * square + _product(c * square, square), y)
    return y if wide else y.swapaxes(-2, -1)


def scale_by_muon(momentum: float, steps: int, rows: Mapping[str, int]) -> optax.GradientTransformation:
    """Gradients (..., I, O) -> orthogonal directions times √max(1, rows / columns), with Nesterov momentum.

    `rows` is the axis (-2 or -1) of each matrix that PyTorch has first. Stacked layers are matrices of their own.
    """

    def init(params: Any) -> MuonState:
        return MuonState({name: jnp.zeros_like(x, jnp.float32) for name, x in params.items()})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Arrays, MuonState]:
        mixed = {n: momentum * state.momentum[n] + (1 - momentum) * g for n, g in updates.items()}
        ahead = {n: momentum * mixed[n] + (1 - momentum) * g for n, g in updates.items()}
        directions = {n: orthogonalised(x, steps) * _stretch(x.shape, rows[n]) for n, x in ahead.items()}
        return directions, MuonState(mixed)

    return optax.GradientTransformation(init, update)


class _Parts(NamedTuple):
    """The states of two optimizers, each of its own arrays."""

    chosen: optax.OptState
    rest: optax.OptState


def divided(
    names: Collection[str], chosen: optax.GradientTransformation, rest: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The arrays called `names` by one optimizer, the others by another; each has state of its own only."""

    def parts(tree: Arrays) -> tuple[Arrays, Arrays]:
        return {n: x for n, x in tree.items() if n in names}, {n: x for n, x in tree.items() if n not in names}

    def init(params: Any) -> _Parts:
        mine, others = parts(params)
        return _Parts(chosen.init(mine), rest.init(others))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _Parts]:
        (mine, others), (my_params, other_params) = parts(updates), parts(params)
        mine, first = chosen.update(mine, state.chosen, my_params)
        others, second = rest.update(others, state.rest, other_params)
        return cast(Any, mine) | others, _Parts(first, second)

    return optax.GradientTransformation(init, update)


def matrices(leaves: Mapping[str, Leaf]) -> dict[str, int]:
    """Which arrays Muon moves, each with the axis of its outputs (which PyTorch has first).

    They are the kernels of linear layers and the matrices of LoRA. The vocabulary's table and head, positions and
    tokens, convolutions, norms and biases are not.
    """
    return {
        name: -1
        for name, leaf in leaves.items()
        if not leaf.statistic
        and len(leaf.axes) == 2
        and "vocab" not in leaf.axes
        and (name.endswith(".kernel") or is_lora(name))
    }


def matrices_by_name(leaves: Mapping[str, Leaf], rules: Mapping[str, Rule]) -> dict[str, int]:
    """`matrices` as the reference chooses them, by their published names and shapes (compat "muon_by_name").

    `rules` has the weight rule of every array that is not of LoRA.
    """
    found = {}
    for name, leaf in leaves.items():
        if is_lora(name):
            kernel = f"{name.rpartition('.lora.')[0]}.kernel"
            rule = Rule(f"{rules[kernel].theirs}.lora", name, transpose=True)
        else:
            rule = rules[name]
        if not leaf.statistic and is_matrix_by_name(rule.theirs, len(rule.their_shape(leaf.shape))):
            found[name] = -1 if rule.transpose else -2
    return found


def is_matrix_by_name(published: str, dimensions: int) -> bool:
    """The reference's rule: of two dimensions, and none of some words in the name."""
    return dimensions == 2 and not any(word in published.lower() for word in _EXCLUDED)


# Of float32 on every device: the default is TF32 on NVIDIA's and bfloat16 on TPUs.
_product = partial(jnp.matmul, precision="highest")


def _stretch(shape: tuple[int, ...], rows: int) -> float:
    columns = -3 - rows  # the other one of -2 and -1
    return max(1.0, shape[rows] / shape[columns]) ** 0.5
