"""The small pieces every model is made of: Linear, norms, Embedding, rotary positions, the MLP of a decoder.

Weights are cast to the dtype of the input; norms and rotary angles are computed in float32.
Every parameter carries `axes`, the logical names of its trailing dimensions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.models.hints import copies, hint, weight

Axes = tuple[str | None, ...]
Init = Callable[..., jax.Array]  # key, shape, dtype -> initial values, as in jax.nn.initializers


class Held(nnx.Variable):
    """A part of a checkpoint that is kept, saved and laid out as the others are, and never trained.

    It is float32 whatever the parameters are, so that a run that trains the others holds what one that freezes them
    does.
    """


def held(param: nnx.Param) -> Held:
    """The values of `param` (float32), never trained."""
    assert param[...].dtype == jnp.float32
    return Held(param[...], axes=param.axes)


def hold(module: nnx.Module) -> None:
    """Turn the parameters of `module` itself, not of modules inside it, into `Held`."""
    for name, value in list(vars(module).items()):
        if isinstance(value, nnx.Param):
            setattr(module, name, held(value))


def uniform(bound: float) -> Init:
    """Values uniform within ±bound."""
    return partial(jax.random.uniform, minval=-bound, maxval=bound)


def plus(x: jax.Array, param: nnx.Variable, places: slice = slice(None)) -> jax.Array:
    """x and a parameter (or these places of its first axis) that many rows of x share, in the dtype of x.

    The parameter's gradient is summed in float32: in bfloat16 the sum over a batch would be off by a percent or more.
    """
    return (x + weight(param, jnp.float32)[places]).astype(x.dtype)


def repeated(param: nnx.Variable, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """A parameter once for each row of `shape`; its gradient is summed as that of `plus`."""
    return jnp.broadcast_to(weight(param, jnp.float32), shape).astype(dtype)


class Linear(nnx.Module):
    """(..., I) -> (..., O): x @ kernel (I, O), plus a bias (O,) if there is one.

    `init` draws the kernel in float32 (default: normal, of standard deviation 1/sqrt(I)); the bias starts at zero.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: Axes,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        init: Init | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        init = init or jax.nn.initializers.normal(in_dim**-0.5)
        kernel = init(rngs.params(), (in_dim, out_dim), jnp.float32)
        self.kernel = nnx.Param(kernel.astype(param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_dim,), param_dtype), axes=axes[1:]) if bias else None
        self.lora: Callable[[jax.Array], jax.Array] | None = nnx.data(None)  # see `elm_jax.models.lora`

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ weight(self.kernel, x.dtype)
        y = y if self.bias is None else plus(y, self.bias)
        return y if self.lora is None else y + self.lora(x)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, in float32, returned in the dtype of x."""

    def __init__(
        self, dim: int, eps: float, param_dtype: jax.typing.DTypeLike = jnp.float32, offset: float = 0.0
    ) -> None:
        self.scale = nnx.Param(jnp.full((dim,), 1 - offset, param_dtype), axes=(None,))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        unit = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (unit * (self.offset + weight(self.scale, jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32, returned in the dtype of x."""

    def __init__(self, dim: int, eps: float, param_dtype: jax.typing.DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (unit * weight(self.scale, jnp.float32) + weight(self.bias, jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """Token ids -> rows of table (V, D); the same table is the output projection of a tied model."""

    def __init__(
        self, vocab_size: int, dim: int, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike = jnp.float32
    ) -> None:
        self.table = _table(vocab_size, dim, ("vocab", "embed"), rngs, param_dtype)

    def __call__(self, tokens: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        # Gathered along D only before the look-up; otherwise the partitioner replicates all of it.
        table = hint(weight(self.table, dtype or self.table[...].dtype), "vocab", None)
        each = copies(table, self.table.axes, len(tokens))
        parts = jnp.asarray(tokens).reshape(len(each), len(tokens) // len(each), *tokens.shape[1:])
        found = jax.vmap(lambda table, tokens: _look_up(table, tokens, "clip"))(each, parts)
        return found.reshape(*tokens.shape, table.shape[-1])


class LearnedPositions(nnx.Module):
    """Positions (B, T) -> rows of table (offset + P, D), position 0 having row `offset`.

    A position beyond the table gives NaN: callers that know the lengths refuse them first.
    """

    def __init__(
        self, length: int, offset: int, dim: int, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike = jnp.float32
    ) -> None:
        self.table = _table(length + offset, dim, (None, "embed"), rngs, param_dtype)
        self.offset = offset

    def __call__(self, positions: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return _look_up(weight(self.table, dtype), positions + self.offset, "fill")


def _look_up(table: jax.Array, index: jax.Array, beyond: Literal["clip", "fill"]) -> jax.Array:
    """Rows (..., D) of a table (V, D); `beyond`: what an index outside it gives, as in `jnp.take`.

    The table's gradient is summed in float32 and rounded to its dtype once: in bfloat16 a frequent token's sum would
    stop growing after a few hundred terms.
    """
    rows, dtype = len(table), table.dtype

    def take(table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take(table, index, axis=0, mode=beyond)

    def forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return take(table, index), index

    def backward(index: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
        like = jax.ShapeDtypeStruct((rows, cotangent.shape[-1]), jnp.float32)
        summed = jax.linear_transpose(lambda table: take(table, index), like)(cotangent.astype(jnp.float32))
        return summed[0].astype(dtype), None

    found = jax.custom_vjp(take)
    found.defvjp(forward, backward)
    return found(table, index)


def _table(
    rows: int, dim: int, axes: Axes, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike
) -> nnx.Param[jax.Array]:
    table = 0.02 * jax.random.normal(rngs.params(), (rows, dim), jnp.float32)
    return nnx.Param(table.astype(param_dtype), axes=axes)


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
class LongScaling:
    """LongRoPE (arXiv:2402.13753): each frequency divided by its own number, by `long` in a conversation of more than
    `original_max_len` tokens, by `short` in others. Cosines and sines are multiplied by `scale` in both."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_len: int
    scale: float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta`, optionally stretched (a number: all frequencies are divided by it).

    `share`: of a head's features that are turned, the first ones; the others are the same everywhere.
    """

    theta: float
    stretch: float | Llama3Scaling | LongScaling = 1.0
    share: float = 1.0

    def frequencies(self, head_dim: int, long: bool = False) -> np.ndarray:
        """(half of what is turned,) float32, radians per position; computed in float64 and rounded once."""
        turned, s = int(head_dim * self.share), self.stretch
        freq = self.theta ** (-np.arange(0, turned, 2, dtype=np.float64) / turned)
        if isinstance(s, Llama3Scaling):
            turns = s.original_max_len * freq / (2 * math.pi)  # rotations within the original context
            keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
            freq = keep * freq + (1 - keep) * freq / s.factor
        else:
            freq = freq / (np.asarray(s.long if long else s.short) if isinstance(s, LongScaling) else s)
        return freq.astype(np.float32)

    def angles(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """(B, T) positions -> cos and sin, each (B, T, 1, half of what is turned) float32."""
        at = positions[:, :, None, None].astype(jnp.float32)
        angle = at * self.frequencies(head_dim)
        if not isinstance(self.stretch, LongScaling):
            return jnp.cos(angle), jnp.sin(angle)
        is_long = _longest(positions)[:, :, None, None] >= self.stretch.original_max_len
        angle = jnp.where(is_long, at * self.frequencies(head_dim, long=True), angle)
        return jnp.cos(angle) * self.stretch.scale, jnp.sin(angle) * self.stretch.scale


def _longest(positions: jax.Array) -> jax.Array:
    """(B, T) positions -> the largest of each one's conversation, (B, T); with a position 0 another one begins.

    What shares a prefix is as long as the longest of it.
    """

    def of_row(row: jax.Array) -> jax.Array:
        conversation = jnp.cumsum(row == 0)
        return jax.ops.segment_max(row, conversation, len(row) + 1)[conversation]

    return jax.vmap(of_row)(positions)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn x (B, T, H, head_dim) by its angles, in pairs (i, i + half) as Hugging Face has them.

    What has no angle, after the last pair, stays as it is.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    cuts = [half, 2 * half][: 1 if 2 * half == x.shape[-1] else 2]
    first, second, *rest = jnp.split(x.astype(jnp.float32), cuts, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, *rest], axis=-1)
    return turned.astype(x.dtype)


Activation = Literal["silu", "relu", "gelu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x))); (..., D) -> (..., D).

    fused: one projection makes the gate, first, and `up`."""

    def __init__(
        self,
        dim: int,
        inner: int,
        rngs: nnx.Rngs,
        *,
        activation: Activation,
        gated: bool,
        bias: bool,
        out_std: float,
        fused: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        linear = partial(Linear, rngs=rngs, bias=bias, param_dtype=param_dtype)
        self.gate_up = linear(dim, 2 * inner, ("embed", "mlp")) if fused else None
        self.gate = linear(dim, inner, ("embed", "mlp")) if gated and not fused else None
        self.up = None if fused else linear(dim, inner, ("embed", "mlp"))
        self.down = linear(inner, dim, ("mlp", "embed"), init=jax.nn.initializers.normal(out_std))
        self.activation: Activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(hint(self._inner(x, ACTIVATIONS[self.activation]), "batch", None, "mlp"))

    def _inner(self, x: jax.Array, act: Callable[[jax.Array], jax.Array]) -> jax.Array:
        if self.gate_up is not None:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
            return act(gate) * up
        assert self.up is not None
        return act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
