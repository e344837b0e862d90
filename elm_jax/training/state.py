"""What training changes: parameters, running statistics, optimizer, average, step; and how each lies on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from elm_jax.models.functional import Arrays, Structure
from elm_jax.models.lora import is_lora
from elm_jax.runtime.mesh import replicated


class TrainState(NamedTuple):
    """The state of a run after `step` optimizer steps; a pytree of sharded arrays."""

    step: jax.Array  # int32 scalar
    trained: Arrays  # float32 parameters
    statistics: Arrays  # running statistics that move
    optimizer: optax.OptState
    average: Arrays = {}  # float32: of the parameters after each step (`optim.ema`); empty where it is not asked for

    @property
    def items(self) -> dict[str, Any]:
        """What a checkpoint holds, by item."""
        return {name: tree for name, tree in self._asdict().items() if name != "step"}


def averaged(average: Arrays, trained: Arrays, decay: float) -> Arrays:
    """The exponential moving average after a step that has led to `trained`."""
    return {n: x + (1.0 - decay) * (trained[n].astype(jnp.float32) - x) for n, x in average.items()}


def split_names(structure: Structure, update: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    """(trained parameters, moving statistics, frozen arrays): what belongs to the components of `update`.

    A component that has LoRA is trained in nothing else.
    """
    leaves = structure.leaves
    adapted = {leaf.part.removesuffix(".lora") for name, leaf in leaves.items() if is_lora(name)}
    mine = [n for n, leaf in leaves.items() if leaf.is_of(update) and leaf.part not in adapted]
    trained = [name for name in mine if not leaves[name].statistic]
    moving = [name for name in mine if leaves[name].statistic]
    return trained, moving, [name for name in leaves if name not in set(mine)]


def state_shardings(state: TrainState, arrays: Mapping[str, NamedSharding], mesh: Mesh) -> TrainState:
    """The layout of a state (given abstract or real): optimizer arrays lie as their parameters do."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
        return arrays[name] if name is not None and jnp.ndim(leaf) else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def abstract_state(
    structure: Structure, trained: list[str], moving: list[str], tx: Any, mesh: Mesh,
    shardings: Mapping[str, NamedSharding], averages: bool = False,
) -> TrainState:  # fmt: skip
    """Shapes, dtypes and places of a state, before any of its arrays exists; `averages`: it has an average."""
    like = structure.abstract(shardings)
    parts = {n: like[n] for n in trained}, {n: like[n] for n in moving}
    state = jax.eval_shape(lambda *parts: _initial(tx, averages, *parts), *parts)
    layout = state_shardings(state, shardings, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)


def new_state(arrays: Arrays, like: TrainState, tx: Any) -> TrainState:
    """The state before the first step, laid out as `like`; the buffers of its arrays are taken over."""
    parts = {n: arrays[n] for n in like.trained}, {n: arrays[n] for n in like.statistics}
    out = jax.tree.map(lambda x: x.sharding, like)
    made = jax.jit(lambda *parts: _initial(tx, bool(like.average), *parts), out_shardings=out, donate_argnums=(0, 1))
    return made(*parts)


def _initial(tx: Any, averages: bool, trained: Arrays, statistics: Arrays) -> TrainState:
    average = {name: jnp.array(x, jnp.float32, copy=True) for name, x in trained.items()} if averages else {}
    return TrainState(jnp.zeros((), jnp.int32), trained, statistics, tx.init(trained), average)
