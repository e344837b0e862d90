"""Optimizers and schedules: Adam (L2 in the gradient, as the reference), AdamW and Muon (decoupled decay)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from elm_jax.config import OptimConfig, TrainConfig
from elm_jax.training.muon import divided, scale_by_muon
from elm_jax.training.spikes import remembering


def learning_rate_multiplier(
    config: OptimConfig, total_steps: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The factor on the peak learning rate at each step (from 0): linear warm-up, then the schedule.

    Warm-up takes `warmup_steps`, else int(total_steps · warmup_ratio) steps, the first of which already moves. After w
    steps of it:
    constant 1; inverse square root 1/√(s − w + 1); cosine from 1 down to `min_lr_ratio` at `total_steps`.
    """
    warmup = int(total_steps * config.warmup_ratio) if config.warmup_steps is None else config.warmup_steps

    def multiplier(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        if config.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
            low = config.min_lr_ratio
            after = low + 0.5 * (1.0 - low) * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "inv_sqrt":
            after = jax.lax.rsqrt(jnp.maximum(step - warmup + 1.0, 1.0))
        else:
            after = jnp.ones_like(step)
        return jnp.where(step < warmup, (step + 1.0) / max(1, warmup), after)

    return multiplier


def batch_scale(optim: OptimConfig, train: TrainConfig) -> float:
    """Rows, or conversations where they are counted, of a step over `optim.ref_batch` (1 where that is not set)."""
    return train.count / optim.ref_batch if optim.ref_batch else 1.0


def weight_decay(optim: OptimConfig, train: TrainConfig) -> float:
    """The decay, scaled with the batch as `optim.weight_decay_scale` asks."""
    scale = batch_scale(optim, train)
    return (
        optim.weight_decay
        / {"none": 1.0, "inv_sqrt": math.sqrt(scale), "inv_linear": scale}[optim.weight_decay_scale]
    )


def make_optimizer(
    optim: OptimConfig, train: TrainConfig, total_steps: int, matrices: Mapping[str, int] | None = None
) -> optax.GradientTransformation:
    """The optimizer of a flat dictionary of float32 parameters; its state has their shapes.

    `matrices` (`muon.matrices`) are those that Muon moves; AdamW has the others, at a rate of its own.
    """
    multiplier = learning_rate_multiplier(optim, total_steps)
    peak = optim.lr * batch_scale(optim, train)
    decay = optax.add_decayed_weights(weight_decay(optim, train))

    def rate(ratio: float = 1.0) -> optax.GradientTransformation:
        return optax.scale_by_learning_rate(lambda step: ratio * peak * multiplier(step))

    adam = optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps)
    if optim.name == "adam":
        tx = optax.chain(decay, adam, rate())
    elif optim.name == "adamw":
        tx = optax.chain(adam, decay, rate())
    else:
        assert matrices is not None, "Muon has to know what is a matrix"
        muon = optim.muon
        directions = scale_by_muon(muon.momentum, muon.ns_steps, matrices)
        tx = divided(
            matrices, optax.chain(directions, decay, rate()), optax.chain(adam, decay, rate(muon.adamw_lr_ratio))
        )
    return remembering(tx) if optim.skip_spikes else tx


def clip_coefficient(norm: jax.Array, limit: float) -> jax.Array:
    """What gradients are multiplied by: min(1, limit / (norm + 1e-6)); 1 where limit is 0."""
    return jnp.minimum(1.0, limit / (norm + 1e-6)) if limit > 0 else jnp.ones_like(norm)
