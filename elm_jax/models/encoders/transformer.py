"""The transformer that the ECG and vision encoders share: full attention, LayerNorm, a plain MLP.

B signals, T tokens, D width, H heads, d head size. Layers are stacked: every parameter of `blocks` has a leading
axis of the depth, and one `lax.scan` runs them. In training the backward pass recomputes each block from its input
(`remat`): the activations of one block are kept at a time, not those of all.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.models.attention import attend
from elm_jax.models.hints import weight
from elm_jax.models.layers import ACTIVATIONS, Activation, Init, LayerNorm, Linear
from elm_jax.models.remat import Remat, rematerialised


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes: width is D, mlp the width inside the MLP. fused_qkv: one projection for queries, keys and values.

    qkv_bias: whether these have biases; all other projections do. out: whether the attention has an output
    projection. head_dim None: width / heads. init: how the kernels start, None as `Linear` has it. remat: what the
    backward pass recomputes (`elm_jax.models.remat`). post_norm: norms stand behind the sums, not before what is added.
    causal: a token sees those before it alone. layer_scale: what a block adds is scaled by value (CaiT, Touvron et al.
    2021). gated: the MLP is a SwiGLU.
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
    out: bool = True
    init: Init | None = None
    remat: Remat = "full"
    post_norm: bool = False
    causal: bool = False
    layer_scale: bool = False
    gated: bool = False

    @property
    def head(self) -> int:
        """d."""
        return self.head_dim or self.width // self.heads


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        width, inner = config.width, config.heads * config.head
        self.heads, self.fused = config.heads, config.fused_qkv
        linear = partial(Linear, rngs=rngs, init=config.init, param_dtype=param_dtype)
        if config.fused_qkv:
            self.qkv = linear(width, 3 * inner, ("signal", "heads"), bias=config.qkv_bias)
        else:
            self.q = linear(width, inner, ("signal", "heads"), bias=config.qkv_bias)
            self.k = linear(width, inner, ("signal", "heads"), bias=config.qkv_bias)
            self.v = linear(width, inner, ("signal", "heads"), bias=config.qkv_bias)
        self.o = linear(inner, width, ("heads", "signal"), bias=True) if config.out else None

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in (q, k, v))
        out = attend(q, k, v, mask, q.shape[-1] ** -0.5, "xla")
        out = out.reshape(*x.shape[:2], -1)
        return out if self.o is None else self.o(out)


class Mlp(nnx.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        linear = partial(Linear, rngs=rngs, init=config.init, param_dtype=param_dtype, bias=True)
        self.fc1 = linear(config.width, config.mlp, ("signal", "mlp"))
        self.fc2 = linear(config.mlp, config.width, ("mlp", "signal"))
        self.activation: Activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class SwiGlu(nnx.Module):
    """weights_out(silu(a) * b) of the halves a, b of weights_in(x)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        linear = partial(Linear, rngs=rngs, init=config.init, param_dtype=param_dtype, bias=True)
        self.weights_in = linear(config.width, 2 * config.mlp, ("signal", "mlp"))
        self.weights_out = linear(config.mlp, config.width, ("mlp", "signal"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.weights_in(x), 2, axis=-1)
        return self.weights_out(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); post-norm: norm1(x + attention(x)), then norm2(x + mlp(x))."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        self.norm1 = LayerNorm(config.width, config.norm_eps, param_dtype)
        self.attention = Attention(config, rngs, param_dtype)
        self.norm2 = LayerNorm(config.width, config.norm_eps, param_dtype)
        self.mlp = (SwiGlu if config.gated else Mlp)(config, rngs, param_dtype)
        self.post_norm = config.post_norm
        scale = partial(nnx.Param, jnp.ones(config.width, param_dtype), axes=("signal",))
        self.scale1, self.scale2 = (scale(), scale()) if config.layer_scale else (None, None)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        if self.post_norm:
            x = self.norm1(x + self.attention(x, mask))
            return self.norm2(x + self.mlp(x))
        x = x + _scaled(self.attention(self.norm1(x), mask), self.scale1)
        return x + _scaled(self.mlp(self.norm2(x)), self.scale2)


def _scaled(x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    return x if scale is None else x * weight(scale, x.dtype)


class Transformer(nnx.Module):
    """The stacked blocks, without embedding or final norm. Parameters: `blocks.attention.q.kernel` and so on."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> None:
        self.depth = config.depth
        self.remat: Remat = config.remat
        self.causal = config.causal

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(block_rngs: nnx.Rngs) -> Block:
            return Block(config, block_rngs, param_dtype)

        self.blocks = stacked(rngs)

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """(B, T, D) -> (B, T, D), in the dtype of x; `valid` (B, T) bool says which tokens are seen."""
        return self._run(x, valid, None)[0]

    def sum_of_outputs(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """(B, T, D) -> the sum (B, T, D) float32 of the outputs of all blocks."""
        total = self._run(x, valid, jnp.zeros(x.shape, jnp.float32))[1]
        assert total is not None
        return total

    def _run(
        self, x: jax.Array, valid: jax.Array | None, total: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The output, and `total` with the outputs of all blocks added to it, where it is wanted."""
        mask = jnp.ones((1, 1, 1, 1), bool) if valid is None else valid.astype(bool)[:, None, None, :]
        if self.causal:
            mask = mask & jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        graph, state = nnx.split(self.blocks)

        run_block = rematerialised(lambda block, x: nnx.merge(graph, block)(x, mask), self.remat)

        def step(carry: tuple[jax.Array, jax.Array | None], block: Any) -> tuple[Any, None]:
            x, total = carry
            x = run_block(block, x)
            return (x, None if total is None else total + x.astype(jnp.float32)), None

        return jax.lax.scan(step, (x, total), state, length=self.depth)[0]
