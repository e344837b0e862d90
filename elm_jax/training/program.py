"""The step as a program: its functions, and the shapes and places of all that goes in. No array exists here.

Training runs it; `elm_jax.plan` compiles it for hardware that is not there.

Dimension letters: A micro-batches, B rows, T tokens, S signal slots of a row, M supervised slots of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from elm_jax import compat as behaviours
from elm_jax.assemble import Assembly, encoder_structure, structure_behind_encoder
from elm_jax.config import Config, TrainConfig
from elm_jax.data.batch import ArraySpec, Batch, BatchShape, Layout, collate, empty_signals
from elm_jax.errors import UserError
from elm_jax.exchange.reference import Kinds, published_rules
from elm_jax.models.functional import Structure
from elm_jax.models.hints import placed
from elm_jax.run.folder import REFERENCE
from elm_jax.runtime.mesh import MeshPlacement, array_shardings, batch_sharding, batch_ways, divisors
from elm_jax.training.muon import matrices, matrices_by_name
from elm_jax.training.optim import make_optimizer
from elm_jax.training.state import TrainState, abstract_state, split_names
from elm_jax.training.step import make_eval_step, make_redraw, make_train_step

DRAWN = 4  # rows of a validation batch, at least


@dataclass(frozen=True)
class TrainProgram:
    """One step of a run on one mesh. All but the steps and the optimizer are shapes, dtypes and places."""

    step: Callable[..., Any]  # jitted: (state, frozen, batch) -> (state, metrics)
    eval_step: Callable[..., Any]  # jitted: (arrays, batch without micro-batch axis) -> sums
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]  # what the step is given; an encoder whose outputs are kept is no part
    shardings: dict[str, NamedSharding]  # of all arrays of the model
    batch: Callable[[BatchShape], Batch]  # the batch of a shape
    redraw: Callable[..., Any] | None = None  # jitted: (arrays, batch, key) -> what a validation draws of it


def train_program(assembly: Assembly, mesh: Mesh, total_steps: int) -> TrainProgram:
    """The program of `assembly`.

    Raises:
        UserError: a parameter does not divide over the mesh.
    """
    config, structure, layout = assembly.config, assembly.structure, assembly.signal.layout
    shardings = array_shardings(structure, mesh)
    if config.encoder.cache:
        with placed(MeshPlacement(mesh)):  # whose platform decides the attention
            structure, layout = structure_behind_encoder(assembly), {assembly.signal.view: _encoded(assembly)}
    trained, moving, frozen = split_names(structure, config.update)
    tx = optimizer_of(assembly, total_steps)
    state = abstract_state(structure, trained, moving, tx, mesh, shardings, config.optim.ema > 0)
    places = jax.tree.map(lambda x: x.sharding, state)
    like = structure.abstract(shardings)
    kept = {n: like[n] for n in frozen}
    if "reference" in assembly.objective.needs:
        kept |= {f"{REFERENCE}.{n}": like[n] for n in (*trained, *moving)}
    step = make_train_step(structure, config, tx, mesh, places, {n: x.sharding for n, x in kept.items()})
    batch = functools.partial(_abstract_batch, assembly=assembly, layout=layout, mesh=mesh)
    drawn = assembly.objective.drawn
    redraw = make_redraw(structure, config, mesh, drawn, max(DRAWN, batch_ways(mesh))) if drawn else None
    return TrainProgram(
        step, make_eval_step(structure, config, mesh), tx, state, kept, shardings, batch, redraw
    )


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raise UserError unless the rows of a micro-batch divide over the mesh; those of conversations always do."""
    if config.train.batch_size is None:
        return
    accum, ways = config.optim.accum_steps, batch_ways(mesh)
    rows = config.train.batch_size // accum
    if rows % ways:
        below, above = (accum * ways * n for n in (rows // ways, rows // ways + 1))
        fits = max(n for n in divisors(rows) if n <= ways)
        raise UserError(
            "train.batch_size", f"{rows} rows a micro-batch", f"a multiple of data x fsdp = {ways}",
            f"set --config.train.batch_size={f'{below} or ' if below else ''}{above}, or change optim.accum_steps;"
            f" a run that goes on keeps them: start it on data x fsdp = {fits}, with fewer devices or more mesh.tensor",
        )  # fmt: skip


def check_updates(train: TrainConfig, updates: int) -> None:
    """Raise UserError unless a run is saved, validated and ended where the model makes new answers: behind the last of
    the `updates` steps that learn from the same ones."""
    for name in ("steps", "save_every", "eval_every"):
        count = getattr(train, name)
        if count is not None and count % updates:
            more = count + updates - count % updates
            raise UserError(
                f"train.{name}", str(count), f"a multiple of rl.updates={updates}", f"set --config.train.{name}={more}"
            )


def optimizer_of(assembly: Assembly, total_steps: int) -> Any:
    """The optimizer of a run; Muon is told which parameters are matrices."""
    leaves, config = assembly.structure.leaves, assembly.config
    if behaviours.enabled("muon_by_name", config.compat):
        moved = matrices_by_name(leaves, published_rules(leaves, Kinds.of(assembly)))
    else:
        moved = matrices(leaves)
    return make_optimizer(config.optim, config.train, total_steps, moved)


def _abstract_batch(shape: BatchShape, assembly: Assembly, layout: Layout, mesh: Mesh) -> Batch:
    """A batch (A, B, ...) of this shape, laid out as training lays it out."""
    place, accum, rows = batch_sharding(mesh), assembly.config.optim.accum_steps, assembly.config.train.batch_size
    assert rows is not None, "a program has rows; how many conversations fill, data tell"
    leading = accum, rows // accum

    def stacked(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype, sharding=place)

    return jax.tree.map(stacked, collate([[]], shape, layout, assembly.objective.samples.extras))


def _encoded(assembly: Assembly) -> ArraySpec:
    """The layout of what a frozen encoder makes of one ECG."""
    structure: Structure = encoder_structure(assembly)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty_signals(assembly.signal.own_layout, 1))
    arrays = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in structure.leaves.items()}
    out = jax.eval_shape(lambda a, x: structure.bind(a)(x, jnp.ones(1, jnp.float32), train=False), arrays, one)
    return ArraySpec(out.shape[1:], jnp.dtype(assembly.config.llm.compute_dtype))
