"""What a decoder is made of, by its `DecoderConfig`: the norms, the attention's projections, the layer.

B batch, T tokens, D width, H heads, K key/value heads, d head size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.models.hints import hint
from elm_jax.models.layers import Activation, LayerNorm, Linear, Mlp, RMSNorm, Rope, rotate
from elm_jax.models.noise import dropout

Rotary = tuple[jax.Array, jax.Array]
Window = int | None


@dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes one decoder from another.

    hidden: D. embedding: width of the token embeddings; where it is not D, projections lead to D and back. mlp: width
    inside the MLP. max_len: the longest context it was made for. tied: whether the embedding
    table is the output projection.
    rope: rotary positions; None: a table of learned ones, whose row `position_offset` is that of position 0.
    local_rope: those of layers with a window, where they are others.
    norm: "rms", "rms_offset" (which multiplies by 1 + scale) or "layer".
    pre_norm: whether a branch's input is normed and, after the last layer, the output; else each sum is.
    post_norms: whether the branches are normed once more before they are added. qk_norm: whether each head's
    queries and keys are.
    fused_qkv, fused_mlp: one projection for queries, keys and values; one for gate and up.
    qkv_bias, out_bias (of the attention), mlp_bias.
    gated: whether the MLP has a gate, which goes through the activation in place of `up`.
    query_scalar: attention scores are divided by its root (None: head_dim).
    attention_cap, logit_cap: soft caps c of scores and logits, c tanh(x / c).
    windows: one period of the layers' windows, repeated through the layers (their number is a multiple of it): a
    query sees the keys less than so many positions before it; None: all.
    scale_embeddings: whether token embeddings are multiplied by the root of D.
    """

    model_type: str
    vocab_size: int
    hidden: int
    embedding: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_len: int
    norm_eps: float
    tied: bool
    rope: Rope | None
    local_rope: Rope | None = None
    position_offset: int = 0
    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    pre_norm: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False
    fused_mlp: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: Activation = "silu"
    query_scalar: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    windows: tuple[Window, ...] = (None,)
    scale_embeddings: bool = False


def make_norm(config: DecoderConfig, dim: int, param_dtype: jax.typing.DTypeLike) -> RMSNorm | LayerNorm:
    """The norm of this decoder, over `dim` features."""
    if config.norm == "layer":
        return LayerNorm(dim, config.norm_eps, param_dtype)
    return RMSNorm(dim, config.norm_eps, param_dtype, offset=1.0 if config.norm == "rms_offset" else 0.0)


class Attention(nnx.Module):
    """The projections of self-attention, and the norms of its heads where there are any."""

    def __init__(
        self, config: DecoderConfig, rngs: nnx.Rngs, out_std: float, param_dtype: jax.typing.DTypeLike
    ) -> None:
        width, inner, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
        linear = partial(Linear, rngs=rngs, param_dtype=param_dtype)
        self.head_dim, self.cuts = config.head_dim, (inner, inner + kv)
        self.fused = config.fused_qkv
        if config.fused_qkv:
            self.qkv = linear(width, inner + 2 * kv, ("embed", "heads"), bias=config.qkv_bias)
        else:
            self.q = linear(width, inner, ("embed", "heads"), bias=config.qkv_bias)
            self.k = linear(width, kv, ("embed", "kv_heads"), bias=config.qkv_bias)
            self.v = linear(width, kv, ("embed", "kv_heads"), bias=config.qkv_bias)
        init = jax.nn.initializers.normal(out_std)
        self.o = linear(inner, width, ("heads", "embed"), bias=config.out_bias, init=init)
        self.q_norm = make_norm(config, config.head_dim, param_dtype) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim, param_dtype) if config.qk_norm else None

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B,T,D) -> q (B,T,H,d), k and v (B,T,K,d), before any rotation."""
        parts = jnp.split(self.qkv(x), self.cuts, axis=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        q = hint(q, "batch", None, "heads", None)
        k, v = (hint(part, "batch", None, "kv_heads", None) for part in (k, v))
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v


class Layer(nnx.Module):
    """One transformer layer, cut where attention happens: `combine(x, attend(*project(x)))`."""

    def __init__(
        self,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike,
        dropout: float = 0.0,
    ) -> None:
        # What writes to the residual stream starts smaller, so that its variance does not grow with L.
        shrink = (2 * config.layers) ** -0.5
        attention_std = shrink * (config.heads * config.head_dim) ** -0.5
        norm = partial(make_norm, config, config.hidden, param_dtype)
        self.dropout, self.pre_norm = dropout, config.pre_norm
        self.attention_norm = norm()
        self.attention = Attention(config, rngs, attention_std, param_dtype)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = Mlp(
            config.hidden, config.mlp, rngs, activation=config.activation, gated=config.gated, bias=config.mlp_bias,
            out_std=shrink * config.mlp**-0.5, fused=config.fused_mlp, param_dtype=param_dtype,
        )  # fmt: skip
        self.mlp_post_norm = norm() if config.post_norms else None

    def project(self, x: jax.Array, rotary: Rotary | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B,T,D) -> q (B,T,H,d), k and v (B,T,K,d); q and k are turned to their positions."""
        x = hint(x, "batch", None, None)
        q, k, v = self.attention.heads(self.attention_norm(x) if self.pre_norm else x)
        return (q, k, v) if rotary is None else (rotate(q, rotary), rotate(k, rotary), v)

    def combine(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x (B,T,D) and what its tokens attended to (B,T,H,d) -> the layer's output (B,T,D)."""
        x = x + self._branch(self.attention.o(attended.reshape(*x.shape[:2], -1)), self.attention_post_norm)
        x = x if self.pre_norm else self.attention_norm(x)
        x = x + self._branch(self.mlp(self.mlp_norm(x) if self.pre_norm else x), self.mlp_post_norm)
        return hint(x if self.pre_norm else self.mlp_norm(x), "batch", None, None)

    def _branch(self, x: jax.Array, norm: RMSNorm | LayerNorm | None) -> jax.Array:
        return dropout(x if norm is None else norm(x), self.dropout)
