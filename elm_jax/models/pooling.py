"""Adaptive average pooling over time, as torch's AdaptiveAvgPool1d: T tokens become N, whatever T is."""

import jax
import jax.numpy as jnp
import numpy as np


def adaptive_average_pool(x: jax.Array, tokens: int) -> jax.Array:
    """(B, T, D) -> (B, `tokens`, D) float32; token i is the mean of x[floor(i T/N) : ceil((i+1) T/N)].

    Bins overlap where T is not a multiple of N, and repeat where N > T.
    """
    weights = pooling_weights(x.shape[1], tokens)
    return jnp.einsum("nt,btd->bnd", weights, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def pooling_weights(length: int, tokens: int) -> np.ndarray:
    """(`tokens`, `length`) float32 whose rows average the bins; `length` and `tokens` at least 1."""
    first = np.arange(tokens) * length // tokens
    last = -(-np.arange(1, tokens + 1) * length // tokens)
    position = np.arange(length)
    inside = (position >= first[:, None]) & (position < last[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
