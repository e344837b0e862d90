"""Spikes: steps whose loss or gradient norm is far above what it was in the steps before.

One rule, in two places: on the devices, where `optim.skip_spikes` has such steps skipped, and on the host, which tells
of them. It is that of standard deviations above the mean of the latest steps. A spike enters what is known of them as
the highest value that is none: one alone moves little, and a level that stays becomes the usual one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

WINDOW = 128  # steps that are known
LEAST = 64  # of them, before any is a spike
TOLD = 6.0  # standard deviations above the mean from which on a step is told of, where none is skipped

Array = Any  # of JAX on devices, of NumPy on the host


class Recent(NamedTuple):
    """Loss and gradient norm of the latest steps."""

    values: Array  # (2, WINDOW), float32 on devices: a ring; 0 where nothing is yet
    seen: Array  # int32 scalar: steps so far

    @classmethod
    def none(cls, xp: Any = jnp) -> Recent:
        """Nothing seen yet. xp: the module that arrays are of, jax.numpy or numpy."""
        return cls(xp.zeros((2, WINDOW)), xp.zeros((), np.int32))

    def judge(self, now: Array, limit: float, xp: Any = jnp) -> tuple[Array, Array, Recent]:
        """Whether a step is a spike; what is usual, the means (2,) of loss and norm; and what is known after it.

        Args:
            now: (2,) its loss and gradient norm, finite; limit: standard deviations above the mean.
        """
        places = xp.arange(WINDOW)
        known = places < self.seen
        count = xp.maximum(known.sum(), 1)
        usual = self.values.sum(1) / count
        deviation = xp.sqrt((known * (self.values - usual[:, None]) ** 2).sum(1) / count)
        highest = usual + limit * deviation
        above = (self.seen >= LEAST) & (deviation > 0) & (now > highest)
        here = places == self.seen % WINDOW
        values = xp.where(here, xp.where(above, highest, now)[:, None], self.values)
        return above.any(), usual, Recent(values, self.seen + 1)


class Remembering(NamedTuple):
    """The state of an optimizer whose spikes are skipped."""

    optimizer: optax.OptState
    recent: Recent


def remembering(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with room in its state for what is usual, which the train step fills."""

    def init(params: Any) -> Remembering:
        return Remembering(tx.init(params), Recent.none())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Remembering]:
        updates, optimizer = tx.update(updates, state.optimizer, params)
        return updates, Remembering(optimizer, state.recent)

    return optax.GradientTransformation(init, update)
