"""The train step and the evaluation step: pure functions, jitted once per batch shape.

Dimension letters: A micro-batches, B rows, T tokens, M supervised slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from elm_jax import compat as behaviours
from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.models.functional import Arrays, Structure
from elm_jax.models.hints import placed
from elm_jax.objectives.cross_entropy import summed_cross_entropy
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, replicated
from elm_jax.training.optim import clip_coefficient
from elm_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def loss_and_gradients(
    structure: Structure,
    trained: Arrays,
    statistics: Arrays,
    frozen: Arrays,
    batch: Batch,
    key: jax.Array | None = None,
    mean_of_means: bool = False,
) -> tuple[jax.Array, Arrays, Arrays]:
    """The loss of one step, its gradients and the running statistics after it.

    The loss is the sum of the cross-entropies over the supervised tokens of all micro-batches (leading axis A)
    divided by their number. Batch statistics are those of a micro-batch. `key` is what dropout draws from; without
    it nothing is dropped. With `mean_of_means` the loss is instead the mean over the micro-batches of the mean over
    each one's tokens (compat "micro_batch_mean_loss").
    """
    total = jnp.maximum(batch.target_weights.sum(), 1.0)

    def micro_loss(
        trained: Arrays, statistics: Arrays, micro: Batch, number: jax.typing.ArrayLike
    ) -> tuple[jax.Array, Arrays]:
        elm = structure.bind({**frozen, **statistics, **trained})
        own_key = None if key is None else jax.random.fold_in(key, number)
        hidden = elm.hidden(micro, trained={structure.leaves[name].part for name in trained}, key=own_key)
        after = structure.arrays(elm)
        own_total = jnp.maximum(micro.target_weights.sum(), 1.0) * batch.tokens.shape[0]
        divisor = own_total if mean_of_means else total
        return summed_cross_entropy(elm.llm, hidden, micro) / divisor, {n: after[n] for n in statistics}

    gradient = jax.value_and_grad(micro_loss, has_aux=True)
    if batch.tokens.shape[0] == 1:
        (loss, statistics), gradients = gradient(trained, statistics, jax.tree.map(lambda x: x[0], batch), 0)
        return loss, gradients, statistics

    def accumulate(carry: tuple[jax.Array, Arrays, Arrays], part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        loss, gradients, statistics = carry
        (more_loss, statistics), more = gradient(trained, statistics, *part)
        return (loss + more_loss, jax.tree.map(jnp.add, gradients, more), statistics), None

    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trained), statistics
    (loss, gradients, statistics), _ = jax.lax.scan(accumulate, zero, (batch, jnp.arange(batch.tokens.shape[0])))
    return loss, gradients, statistics


def make_train_step(
    structure: Structure,
    config: Config,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    layout: TrainState,
    frozen: Any,
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, Metrics]]:
    """The jitted step (state, frozen, batch) -> (state, metrics); the state is donated.

    A step whose gradients are not finite changes nothing but the step number and says so in `finite`.

    Args:
        layout: the shardings of the state; frozen: those of the frozen arrays.
    """

    mean_of_means = behaviours.enabled("micro_batch_mean_loss", config.compat)

    def step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if _drops(config) else None
        with placed(MeshPlacement(mesh)):
            loss, gradients, statistics = loss_and_gradients(
                structure, state.trained, state.statistics, frozen, batch, key, mean_of_means
            )
        norm = optax.tree.norm(gradients)
        gradients = jax.tree.map(lambda g: g * clip_coefficient(norm, config.optim.grad_clip), gradients)
        updates, optimizer = tx.update(gradients, state.optimizer, state.trained)
        moved = (optax.apply_updates(state.trained, updates), statistics, optimizer)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            moved,
            (state.trained, state.statistics, state.optimizer),
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "finite": finite,
            "updates": optax.tree.get_all_with_path(state.optimizer, "count")[0][1],  # so far, which set the rate
            "tokens": (batch.group_ids > 0).sum(),
            "supervised_tokens": (batch.target_weights > 0).sum(),
            "recordings": (batch.signal_weights > 0).sum(),
        }
        return TrainState(state.step + 1, *kept), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(layout, frozen, batch_sharding(mesh)),
        out_shardings=(layout, replicated(mesh)),
    )


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
    structure: Structure, mesh: Mesh
) -> Callable[[Arrays, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted step (arrays, batch without micro-batch axis) -> (summed cross-entropy, supervised tokens)."""

    def step(arrays: Arrays, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with placed(MeshPlacement(mesh)):
            elm = structure.bind(arrays)
            return summed_cross_entropy(elm.llm, elm.hidden(batch), batch), batch.target_weights.sum()

    return jax.jit(step, out_shardings=replicated(mesh))


def _drops(config: Config) -> bool:
    """Whether anything is dropped: only in an LLM that is trained."""
    llm = config.llm
    return "llm" in config.update and (llm.dropout > 0 or llm.lora.dropout > 0)
