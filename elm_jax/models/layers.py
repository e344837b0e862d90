"""The small pieces every decoder is made of: Linear, RMSNorm, Embedding, rotary positions, gated MLP.

Weights are cast to the dtype of the input; norms and rotary angles are computed in float32.
Every parameter carries `axes`, the logical names of its trailing dimensions.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.models.hints import hint, weight

Axes = tuple[str | None, ...]


class Linear(nnx.Module):
    """(..., I) -> (..., O): x @ kernel (I, O), plus a bias (O,) if there is one.

    `std` is that of the initial kernel (default 1/sqrt(I)).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: Axes,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        std: float | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        scale = in_dim**-0.5 if std is None else std
        kernel = scale * jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32)
        self.kernel = nnx.Param(kernel.astype(param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_dim,), param_dtype), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ weight(self.kernel, x.dtype)
        return y if self.bias is None else y + weight(self.bias, x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in the dtype of x."""

    def __init__(self, dim: int, eps: float, param_dtype: jax.typing.DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        unit = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (unit * weight(self.scale, jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """Token ids -> rows of table (V, D); the same table is the output projection of a tied model."""

    def __init__(
        self, vocab_size: int, dim: int, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike = jnp.float32
    ) -> None:
        table = 0.02 * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
        self.table = nnx.Param(table.astype(param_dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        # Gathered along D only before the look-up; otherwise the partitioner replicates all of it.
        table = hint(weight(self.table, dtype or self.table[...].dtype), "vocab", None)
        return jnp.take(table, tokens, axis=0, mode="clip")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the slow rotary frequencies: by `factor` below `low_freq_factor` turns.

    A frequency is left alone above `high_freq_factor` turns in `original_max_len` tokens; between, blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta`, optionally stretched."""

    theta: float
    llama3: Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """(head_dim / 2,) float32, radians per position; computed in float64 and rounded once."""
        freq = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.llama3 is not None:
            s = self.llama3
            turns = s.original_max_len * freq / (2 * math.pi)  # rotations within the original context
            keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
            freq = keep * freq + (1 - keep) * freq / s.factor
        return freq.astype(np.float32)

    def angles(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """(B, T) positions -> cos and sin, each (B, T, 1, head_dim / 2) float32."""
        angle = positions[:, :, None, None].astype(jnp.float32) * self.frequencies(head_dim)
        return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn x (B, T, H, head_dim) by its angles, in pairs (i, i + head_dim / 2) as Hugging Face has them."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), (..., D) -> (..., D)."""

    def __init__(
        self,
        dim: int,
        inner: int,
        rngs: nnx.Rngs,
        *,
        out_std: float,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        self.gate = Linear(dim, inner, ("embed", "mlp"), rngs, param_dtype=param_dtype)
        self.up = Linear(dim, inner, ("embed", "mlp"), rngs, param_dtype=param_dtype)
        self.down = Linear(inner, dim, ("mlp", "embed"), rngs, std=out_std, param_dtype=param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(hint(inner, "batch", None, "mlp"))
