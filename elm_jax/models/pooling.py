"""Adaptive average pooling over time, as torch's AdaptiveAvgPool1d: T tokens become N, whatever T is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def adaptive_average_pool(x: jax.Array, tokens: int, lengths: jax.Array | None = None) -> jax.Array:
    """(B, T, D) -> (B, `tokens`, D) float32; token i is the mean of x[floor(i T/N) : ceil((i+1) T/N)].

    Bins overlap where T is not a multiple of N, and repeat where N > T. lengths: (B,) int, the T that counts in a row.
    """
    if lengths is None:
        weights, sums = pooling_weights(x.shape[1], tokens), "nt,btd->bnd"
    else:
        weights, sums = _weights(lengths[:, None, None], tokens, jnp.arange(x.shape[1]), jnp), "bnt,btd->bnd"
    return jnp.einsum(sums, weights, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def pooling_weights(length: int, tokens: int) -> np.ndarray:
    """(`tokens`, `length`) float32 whose rows average the bins; `length` and `tokens` at least 1."""
    return _weights(length, tokens, np.arange(length), np)


def _weights(length: Any, tokens: int, position: Any, xp: Any) -> Any:
    """(..., `tokens`, positions) float32 for `length`, or lengths (..., 1, 1)."""
    place = xp.arange(tokens)[:, None]
    inside = (position >= place * length // tokens) & (position < -(-(place + 1) * length // tokens))
    return (inside / xp.maximum(inside.sum(-1, keepdims=True), 1)).astype(np.float32)
