"""The pre-norm transformer that the ECG and vision encoders share: full attention, LayerNorm, a plain MLP.

B signals, T tokens, D width, H heads, d head size. Layers are stacked: every parameter of `blocks` has a leading
axis of the depth, and one `lax.scan` runs them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.models.attention import attend
from elm_jax.models.layers import Axes, LayerNorm, Linear

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class XavierLinear(Linear):
    """A Linear whose kernel (I, O) starts uniform within sqrt(6 / (I + O)), after Glorot and Bengio (2010)."""

    def __init__(self, in_dim: int, out_dim: int, axes: Axes, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(in_dim, out_dim, axes, rngs, **options)
        bound = (6 / (in_dim + out_dim)) ** 0.5
        kernel = jax.random.uniform(rngs.params(), (in_dim, out_dim), jnp.float32, -bound, bound)
        self.kernel.set_value(kernel.astype(self.kernel[...].dtype))


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes: width is D, mlp the width inside the MLP. fused_qkv: one projection for queries, keys and values.

    out_bias: whether the output projection of the attention has one (the queries', keys' and values' have
    `qkv_bias`). out: whether there is one at all. head_dim None: width / heads. linear: the class of all
    projections, which says how they start.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    head_dim: int | None = None
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    fused_qkv: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    out: bool = True
    linear: type[Linear] = Linear

    @property
    def head(self) -> int:
        """d."""
        return self.head_dim or self.width // self.heads


class Attention(nnx.Module):
    """Multi-head self-attention without a causal mask."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        width, inner = config.width, config.heads * config.head
        self.heads, self.fused = config.heads, config.fused_qkv
        linear = partial(config.linear, rngs=rngs, param_dtype=param_dtype)
        if config.fused_qkv:
            self.qkv = linear(width, 3 * inner, ("signal", "heads"), bias=config.qkv_bias)
        else:
            self.q = linear(width, inner, ("signal", "heads"), bias=config.qkv_bias)
            self.k = linear(width, inner, ("signal", "heads"), bias=config.qkv_bias)
            self.v = linear(width, inner, ("signal", "heads"), bias=config.qkv_bias)
        self.o = linear(inner, width, ("heads", "signal"), bias=config.out_bias) if config.out else None

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in (q, k, v))
        out = attend(q, k, v, mask, q.shape[-1] ** -0.5, "xla")
        out = out.reshape(*x.shape[:2], -1)
        return out if self.o is None else self.o(out)


class Mlp(nnx.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        linear = partial(config.linear, rngs=rngs, param_dtype=param_dtype, bias=True)
        self.fc1 = linear(config.width, config.mlp, ("signal", "mlp"))
        self.fc2 = linear(config.mlp, config.width, ("mlp", "signal"))
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        self.norm1 = LayerNorm(config.width, config.norm_eps, param_dtype)
        self.attention = Attention(config, rngs, param_dtype)
        self.norm2 = LayerNorm(config.width, config.norm_eps, param_dtype)
        self.mlp = Mlp(config, rngs, param_dtype)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nnx.Module):
    """The stacked blocks, without embedding or final norm. Parameters: `blocks.attention.q.kernel` and so on."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> None:
        self.depth = config.depth

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(block_rngs: nnx.Rngs) -> Block:
            return Block(config, block_rngs, param_dtype)

        self.blocks = stacked(rngs)

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """(B, T, D) -> (B, T, D), in the dtype of x; `valid` (B, T) bool says which tokens are seen."""
        return self.run(x, valid)[0]

    def run(self, x: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The output (B, T, D) and the sum (B, T, D) float32 of the outputs of all blocks."""
        mask = jnp.ones((1, 1, 1, 1), bool) if valid is None else valid.astype(bool)[:, None, None, :]
        graph, state = nnx.split(self.blocks)

        def step(carry: tuple[jax.Array, jax.Array], block: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, total = carry
            x = nnx.merge(graph, block)(x, mask)
            return (x, total + x.astype(jnp.float32)), None

        start = x, jnp.zeros(x.shape, jnp.float32)
        return jax.lax.scan(step, start, state, length=self.depth)[0]
