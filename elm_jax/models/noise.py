"""Dropout, seeded from outside: a module drops where its caller has opened `drawing(key)`, and nowhere else.

So that evaluation, generation and a frozen part drop nothing, and no module carries random state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp


class _Source:
    """A key, and how many draws have been taken from it while this function was traced."""

    def __init__(self, key: jax.Array) -> None:
        self.key, self.taken = key, 0

    def next(self) -> jax.Array:
        self.taken += 1
        return jax.random.fold_in(self.key, self.taken)


_source: ContextVar[_Source | None] = ContextVar("noise", default=None)


@contextmanager
def drawing(key: jax.Array | None) -> Iterator[None]:
    """Within this context `dropout` draws from `key`; None: it drops nothing.

    Open it anew inside a function that is scanned or rematerialised, with a key that is an argument of that
    function: a key that differs from layer to layer gives each layer its own draws.
    """
    token = _source.set(None if key is None else _Source(key))
    try:
        yield
    finally:
        _source.reset(token)


def dropout(x: jax.Array, rate: float) -> jax.Array:
    """`x` with each element zero with probability `rate`, the others divided by 1 - rate."""
    source = _source.get()
    if source is None or rate == 0:
        return x
    kept = jax.random.bernoulli(source.next(), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
