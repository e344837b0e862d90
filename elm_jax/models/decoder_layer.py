"""What a decoder is made of, by its `DecoderConfig`: the norms, the attention's projections, the layer.

B batch, T tokens, D width, H heads, K key/value heads, d head size.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.models.delta import Chains, DeltaSizes, GatedDeltaNet, Recurrent
from elm_jax.models.experts import Experts, ExpertSizes
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
    attention_gate: whether what is attended to is multiplied by a sigmoid, which the projection of queries makes too.
    linear: one period, as that of the windows, of whether a layer has Gated DeltaNet, of sizes `delta`, in the place
    of attention.
    sparse: one period of whether a layer has a mixture of `experts` in the place of the MLP.
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
    attention_gate: bool = False
    linear: tuple[bool, ...] = (False,)
    delta: DeltaSizes | None = None
    sparse: tuple[bool, ...] = (False,)
    experts: ExpertSizes | None = None

    @property
    def period(self) -> int:
        """After how many layers they begin again."""
        return math.lcm(len(self.windows), len(self.linear), len(self.sparse))

    def layers_with(self, part: str) -> tuple[int, ...]:
        """The numbers of the layers with a part of this name, if it is one that not every layer has; else all."""
        return _layers_with(self, part)


@cache
def _layers_with(config: DecoderConfig, part: str) -> tuple[int, ...]:
    known = {"attention": (config.linear, False), "delta": (config.linear, True),
             "mlp": (config.sparse, False), "experts": (config.sparse, True)}  # fmt: skip
    flags, wanted = known.get(part, ((True,), True))
    return tuple(n for n in range(config.layers) if flags[n % len(flags)] == wanted)


def make_norm(config: DecoderConfig, dim: int, param_dtype: jax.typing.DTypeLike) -> RMSNorm | LayerNorm:
    """The norm of this decoder, over `dim` features."""
    if config.norm == "layer":
        return LayerNorm(dim, config.norm_eps, param_dtype)
    return RMSNorm(dim, config.norm_eps, param_dtype, offset=1.0 if config.norm == "rms_offset" else 0.0)


class Projected(NamedTuple):
    """What tokens attend with: q (B,T,H,d), k and v (B,T,K,d); the gate (B,T,H,d) of what they attend to, if any."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gate: jax.Array | None


class Attention(nnx.Module):
    """The projections of self-attention, and the norms of its heads where there are any."""

    def __init__(
        self, config: DecoderConfig, rngs: nnx.Rngs, out_std: float, param_dtype: jax.typing.DTypeLike
    ) -> None:
        width, inner, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
        linear = partial(Linear, rngs=rngs, param_dtype=param_dtype)
        self.head_dim, self.cuts = config.head_dim, (inner, inner + kv)
        self.fused, self.gated = config.fused_qkv, config.attention_gate
        if config.fused_qkv:
            self.qkv = linear(width, inner + 2 * kv, ("embed", "heads"), bias=config.qkv_bias)
        else:
            self.q = linear(width, inner * (1 + self.gated), ("embed", "heads"), bias=config.qkv_bias)
            self.k = linear(width, kv, ("embed", "kv_heads"), bias=config.qkv_bias)
            self.v = linear(width, kv, ("embed", "kv_heads"), bias=config.qkv_bias)
        init = jax.nn.initializers.normal(out_std)
        self.o = linear(inner, width, ("heads", "embed"), bias=config.out_bias, init=init)
        self.q_norm = make_norm(config, config.head_dim, param_dtype) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim, param_dtype) if config.qk_norm else None

    def heads(self, x: jax.Array) -> Projected:
        """x (B,T,D) -> what it is attended with, before any rotation."""
        parts = jnp.split(self.qkv(x), self.cuts, axis=-1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        # Of each head the query, then the gate.
        q, gate = (q[:, :, ::2], q[:, :, 1::2]) if self.gated else (q, None)
        q = hint(q, "batch", None, "heads", None)
        k, v = (hint(part, "batch", None, "kv_heads", None) for part in (k, v))
        q, k = q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
        return Projected(q, k, v, gate)


class Layer(nnx.Module):
    """One transformer layer, cut where attention happens: `combine(x, attend(q, k, v), gate)` of `project(x)`.

    One with `delta` has no attention: `recur(x, chains)` is all of it.
    """

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
        has = config.layers_with
        self.attention = Attention(config, rngs, attention_std, param_dtype) if has("attention") else None
        self.delta = (
            GatedDeltaNet(config.hidden, config.delta, config.norm_eps, rngs, shrink=shrink, param_dtype=param_dtype)
            if config.delta and has("delta") else None
        )  # fmt: skip
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = Mlp(
            config.hidden, config.mlp, rngs, activation=config.activation, gated=config.gated, bias=config.mlp_bias,
            out_std=shrink * config.mlp**-0.5, fused=config.fused_mlp, param_dtype=param_dtype,
        ) if has("mlp") else None  # fmt: skip
        self.experts = Experts(
            config.hidden, config.experts, rngs, activation=config.activation, shrink=shrink, param_dtype=param_dtype,
        ) if config.experts and has("experts") else None  # fmt: skip
        self.mlp_post_norm = norm() if config.post_norms else None

    def project(self, x: jax.Array, rotary: Rotary | None) -> Projected:
        """x (B,T,D) -> what it is attended with; q and k are turned to their positions."""
        assert self.attention is not None
        x = hint(x, "batch", None, None)
        found = self.attention.heads(self.attention_norm(x) if self.pre_norm else x)
        return found if rotary is None else found._replace(q=rotate(found.q, rotary), k=rotate(found.k, rotary))

    def combine(self, x: jax.Array, attended: jax.Array, gate: jax.Array | None) -> jax.Array:
        """x (B,T,D), what its tokens attended to (B,T,H,d) and the gate of that -> the layer's output (B,T,D).

        What was attended to may come in blocks, (B·Q,b,H,d).
        """
        assert self.attention is not None
        attended = attended.reshape(*x.shape[:2], -1)
        attended = attended if gate is None else attended * jax.nn.sigmoid(gate).reshape(attended.shape)
        return self._added(x, self.attention.o(attended))

    def recur(
        self, x: jax.Array, chains: Chains | None, past: Recurrent | None = None
    ) -> tuple[jax.Array, Recurrent]:
        """x (B,T,D) -> the layer's output, and what is to be kept for tokens that follow (see `GatedDeltaNet`)."""
        assert self.delta is not None and chains is not None, "a recurrence needs to know what follows what"
        mixed, kept = self.delta(self.attention_norm(hint(x, "batch", None, None)), chains, past)
        return self._added(x, mixed), kept

    def _added(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = x + self._branch(mixed, self.attention_post_norm)
        x = x if self.pre_norm else self.attention_norm(x)
        feed = self.experts if self.mlp is None else self.mlp
        assert feed is not None
        x = x + self._branch(feed(self.mlp_norm(x) if self.pre_norm else x), self.mlp_post_norm)
        return hint(x if self.pre_norm else self.mlp_norm(x), "batch", None, None)

    def _branch(self, x: jax.Array, norm: RMSNorm | LayerNorm | None) -> jax.Array:
        return dropout(x if norm is None else norm(x), self.dropout)
