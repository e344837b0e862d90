"""What training changes: parameters, running statistics, optimizer, step; and how each is laid out on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from elm_jax.models.functional import Arrays, Structure
from elm_jax.runtime.mesh import named_sharding, replicated


class TrainState(NamedTuple):
    """The state of a run after `step` optimizer steps; a pytree of sharded arrays."""

    step: jax.Array  # int32 scalar
    trained: Arrays  # float32 parameters
    statistics: Arrays  # running statistics that move
    optimizer: optax.OptState


def split_names(structure: Structure, update: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    """(trained parameters, moving statistics, frozen arrays): what belongs to the components of `update`."""
    mine = [name for name in structure.leaves if name.split(".")[0] in update]
    trained = [name for name in mine if not structure.leaves[name].statistic]
    moving = [name for name in mine if structure.leaves[name].statistic]
    return trained, moving, [name for name in structure.leaves if name not in set(mine)]


def array_shardings(structure: Structure, mesh: Mesh) -> dict[str, NamedSharding]:
    """The layout of every array of the model."""
    return {n: named_sharding(mesh, leaf.axes, leaf.shape, n) for n, leaf in structure.leaves.items()}


def state_shardings(state: TrainState, arrays: Mapping[str, NamedSharding], mesh: Mesh) -> TrainState:
    """The layout of a state (given abstract or real): optimizer arrays lie as their parameters do."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
        return arrays[name] if name is not None and jnp.ndim(leaf) else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def new_state(
    arrays: Arrays,
    trained: list[str],
    moving: list[str],
    tx: Any,
    mesh: Mesh,
    shardings: Mapping[str, NamedSharding],
) -> TrainState:
    """The state before the first step, every array already in its shards."""

    def make(parameters: Arrays, statistics: Arrays) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), parameters, statistics, tx.init(parameters))

    parts = {n: arrays[n] for n in trained}, {n: arrays[n] for n in moving}
    out = state_shardings(jax.eval_shape(make, *parts), shardings, mesh)
    return jax.jit(make, out_shardings=out)(*parts)
