"""The train step and the evaluation step: pure functions, jitted once per batch shape.

Dimension letters: A micro-batches, B rows, T tokens, M supervised slots.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from elm_jax import compat as behaviours
from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.errors import UserError
from elm_jax.models.functional import Arrays, Structure
from elm_jax.models.hints import placed
from elm_jax.objectives import SFT, Objective, Redrawn, Sums, log_probs, objective_of
from elm_jax.run.folder import REFERENCE
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, replicated
from elm_jax.training.optim import clip_coefficient
from elm_jax.training.state import TrainState, averaged

Metrics = dict[str, Any]  # scalars; of "others", what the objective has beside its loss, by name


def loss_and_gradients(
    structure: Structure,
    trained: Arrays,
    statistics: Arrays,
    frozen: Arrays,
    batch: Batch,
    key: jax.Array | None = None,
    mean_of_means: bool = False,
    objective: Objective = SFT,
) -> tuple[jax.Array, Arrays, Arrays, Sums]:
    """The loss of one step, its gradients, the running statistics after it, and the objective's other numbers.

    The loss is the sum over all micro-batches (leading axis A) divided by the count of the objective: for `sft`, of
    the cross-entropies over the supervised tokens. Batch statistics are those of a micro-batch. `key` is what dropout
    draws from; without it nothing is dropped. With `mean_of_means` the loss is instead the mean over the micro-batches
    of each one's own mean (compat "micro_batch_mean_loss").
    """
    each = jax.vmap(objective.counts)(batch)
    totals = {name: jnp.maximum(counts.sum(), 1.0) for name, counts in each.items()}
    micro_batches = batch.tokens.shape[0]

    def micro_loss(
        trained: Arrays, statistics: Arrays, micro: Batch, number: jax.typing.ArrayLike
    ) -> tuple[jax.Array, tuple[Arrays, Sums]]:
        model = structure.bind({**frozen, **statistics, **trained})
        micro = _with_reference(structure, frozen, micro, objective)
        own_key = None if key is None else jax.random.fold_in(key, number)
        sums = dict(objective.loss(model, micro, own_key, {structure.leaves[name].part for name in trained}))
        if sums.keys() != totals.keys() or "loss" not in sums:
            found = f"sums of {', '.join(sums) or 'nothing'} and counts of {', '.join(totals) or 'nothing'}"
            raise UserError("objective", found, "the same names, loss among them", "correct the objective's functions")
        after = structure.arrays(model)
        own_total = jnp.maximum(each["loss"][number], 1.0) * micro_batches
        loss = sums.pop("loss") / (own_total if mean_of_means else totals["loss"])
        return loss, ({n: after[n] for n in statistics}, sums)

    def means(sums: Sums) -> Sums:
        return {name: total / totals[name] for name, total in sums.items()}

    gradient = jax.value_and_grad(micro_loss, has_aux=True)
    if micro_batches == 1:
        (loss, (statistics, sums)), gradients = gradient(trained, statistics, jax.tree.map(lambda x: x[0], batch), 0)
        return loss, gradients, statistics, means(sums)

    def accumulate(
        carry: tuple[jax.Array, Arrays, Arrays, Sums], part: tuple[Batch, jax.Array]
    ) -> tuple[Any, None]:
        loss, gradients, statistics, sums = carry
        (more_loss, (statistics, more_sums)), more = gradient(trained, statistics, *part)
        add = functools.partial(jax.tree.map, jnp.add)
        return (loss + more_loss, add(gradients, more), statistics, add(sums, more_sums)), None

    zero = jnp.zeros((), jnp.float32)
    start = zero, jax.tree.map(jnp.zeros_like, trained), statistics, {n: zero for n in totals if n != "loss"}
    (loss, gradients, statistics, sums), _ = jax.lax.scan(accumulate, start, (batch, jnp.arange(micro_batches)))
    return loss, gradients, statistics, means(sums)


def make_train_step(
    structure: Structure,
    config: Config,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    layout: TrainState,
    frozen: Any,
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, Metrics]]:
    """The jitted step (state, frozen, batch) -> (state, metrics); the state is donated.

    A step is skipped if its loss, the norm of its gradients or a statistic after it is not finite: it changes nothing
    but the step number. (A norm beyond float32 is none that Adam's second moments could hold.) `finite` says so.
    With optim.skip_spikes a spike (training/spikes.py) is skipped, too. `taken`: not skipped. Where the model makes
    its samples itself, a step with nothing to learn from, whose gradients are all zero, moves nothing either (Adam
    would go on as before it); it is no fault.

    Args:
        layout: the shardings of the state; frozen: those of the frozen arrays.
    """

    mean_of_means = behaviours.enabled("micro_batch_mean_loss", config.compat)
    objective = objective_of(config)
    draws = _drops(config) or "key" in objective.needs

    def step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if draws else None
        with placed(MeshPlacement(mesh)):
            loss, gradients, statistics, others = loss_and_gradients(
                structure, state.trained, state.statistics, frozen, batch, key, mean_of_means, objective
            )
        norm = optax.tree.norm(gradients)
        gradients = jax.tree.map(lambda g: g * clip_coefficient(norm, config.optim.grad_clip), gradients)
        updates, optimizer = tx.update(gradients, state.optimizer, state.trained)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        for values in statistics.values():
            finite &= jnp.isfinite(values).all()
        learns = norm > 0 if objective.samples.experience else True
        taken, before, after = finite, cast(Any, state.optimizer), cast(Any, optimizer)
        if config.optim.skip_spikes:
            spike, _, recent = before.recent.judge(jnp.stack([loss, norm]), config.optim.skip_spikes)
            recent = _chosen(finite & learns, recent, before.recent)  # which a spike moves, too
            taken, before, after = finite & ~spike, before._replace(recent=recent), after._replace(recent=recent)
        trained = cast(Arrays, optax.apply_updates(state.trained, updates))
        moved = (trained, statistics, after, averaged(state.average, trained, config.optim.ema))
        kept = _chosen(taken & learns, moved, (state.trained, state.statistics, before, state.average))
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "finite": finite,
            "taken": taken,
            "updates": optax.tree.get_all_with_path(state.optimizer, "count")[0][1],  # so far, which set the rate
            "tokens": (batch.group_ids > 0).sum(),
            "supervised_tokens": (batch.target_weights > 0).sum(),
            "recordings": (batch.signal_weights > 0).sum(),
            "others": others,
        }
        return TrainState(state.step + 1, *kept), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(layout, frozen, batch_sharding(mesh)),
        out_shardings=(layout, replicated(mesh)),
    )


def _chosen(first: jax.Array, one: Any, other: Any) -> Any:
    """One pytree or the other: `one` where `first` is true."""
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)


class StepPrograms:
    """A jitted train step as its programs: one for each shape of a batch, compiled when that shape is first met."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self._programs: dict[Any, Callable[[TrainState, Arrays, Batch], tuple[TrainState, Metrics]]] = {}

    def has(self, batch: Batch) -> bool:
        """Whether there is a program for batches of this shape."""
        return _shapes(batch) in self._programs

    def compile(self, state: TrainState, frozen: Arrays, batch: Batch) -> float:
        """Make the program for arguments like these; the seconds that it took."""
        began = time.perf_counter()
        self._programs[_shapes(batch)] = self._step.lower(state, frozen, batch).compile()
        return time.perf_counter() - began

    def __call__(self, state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
        """Take a step with the program that `compile` has made; nothing is traced or compiled."""
        return self._programs[_shapes(batch)](state, frozen, batch)


def _shapes(batch: Batch) -> Any:
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))


def make_eval_step(
    structure: Structure, config: Config, mesh: Mesh
) -> Callable[[Arrays, Batch], tuple[Sums, Sums]]:
    """The jitted step (arrays, batch without micro-batch axis) -> (the objective's sums, their counts)."""
    objective = objective_of(config)

    def step(arrays: Arrays, batch: Batch) -> tuple[Sums, Sums]:
        key = jax.random.key(config.seed) if "key" in objective.needs else None
        with placed(MeshPlacement(mesh)):
            batch = _with_reference(structure, arrays, batch, objective)
            return objective.loss(structure.bind(arrays), batch, key, ()), objective.counts(batch)

    return jax.jit(step, out_shardings=replicated(mesh))


def make_redraw(
    structure: Structure, config: Config, mesh: Mesh, name: str, count: int | None = None
) -> Callable[[Arrays, Batch, jax.Array], Redrawn]:
    """The jitted function (arrays, batch without micro-batch axis, key) -> one of the objective's redraws, of the
    first `count` rows or of all."""
    redraw = objective_of(config).redraws[name]

    def step(arrays: Arrays, batch: Batch, key: jax.Array) -> Redrawn:
        with placed(MeshPlacement(mesh)):
            return redraw(structure.bind(arrays), jax.tree.map(lambda x: x[:count], batch), key)

    return jax.jit(step, out_shardings=replicated(mesh))


def _with_reference(structure: Structure, arrays: Arrays, batch: Batch, objective: Objective) -> Batch:
    """The batch with the reference's log probabilities of its targets, where the objective needs them."""
    if "reference" not in objective.needs:
        return batch
    begins = f"{REFERENCE}."
    first = {n.removeprefix(begins): x for n, x in arrays.items() if n.startswith(begins)}
    model = structure.bind({**arrays, **first})
    found = log_probs(model.llm, model.hidden(batch), batch, objective.temperature)
    return batch._replace(extras={**batch.extras, "reference": found})


def _drops(config: Config) -> bool:
    """Whether anything is dropped: only in an LLM that is trained."""
    llm = config.llm
    return "llm" in config.update and (llm.dropout > 0 or llm.lora.dropout > 0)
