"""One decoder for every language model family; a family is a `DecoderConfig`.

B batch, T tokens, D width, H heads, K key/value heads, V vocabulary.
Layers are stacked (every parameter of `layers` has a leading axis of L) and run by one `lax.scan`. The model
has no KV cache: `generate` brings its own, through `project`, `combine` and `scan_layers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.models import hints
from elm_jax.models.attention import Implementation, attend, padding_mask, positions_from_mask
from elm_jax.models.hints import hint, weight
from elm_jax.models.layers import Embedding, GatedMlp, Linear, RMSNorm, Rope, rotate

Remat = Literal["none", "dots", "full"]
Rotary = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes one decoder from another.

    hidden is D, mlp the width of the gated MLP, max_len the longest context it was made for, qkv_bias whether
    the query, key and value projections have one, tied whether the embedding table is the output projection.
    """

    model_type: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_len: int
    norm_eps: float
    rope: Rope
    qkv_bias: bool
    tied: bool


class Attention(nnx.Module):
    """The four projections of self-attention."""

    def __init__(
        self, config: DecoderConfig, rngs: nnx.Rngs, out_std: float, param_dtype: jax.typing.DTypeLike
    ) -> None:
        width, inner, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
        linear = partial(Linear, rngs=rngs, param_dtype=param_dtype)
        self.q = linear(width, inner, ("embed", "heads"), bias=config.qkv_bias)
        self.k = linear(width, kv, ("embed", "kv_heads"), bias=config.qkv_bias)
        self.v = linear(width, kv, ("embed", "kv_heads"), bias=config.qkv_bias)
        self.o = linear(inner, width, ("heads", "embed"), std=out_std)


class Layer(nnx.Module):
    """One transformer layer, cut where attention happens: `combine(x, attend(*project(x)))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike) -> None:
        # What writes to the residual stream starts smaller, so that its variance does not grow with L.
        shrink = (2 * config.layers) ** -0.5
        attention_std = shrink * (config.heads * config.head_dim) ** -0.5
        mlp_std = shrink * config.mlp**-0.5
        self.head_dim = config.head_dim
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps, param_dtype)
        self.attention = Attention(config, rngs, attention_std, param_dtype)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps, param_dtype)
        self.mlp = GatedMlp(config.hidden, config.mlp, rngs, out_std=mlp_std, param_dtype=param_dtype)

    def project(self, x: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B,T,D) -> q (B,T,H,d), k and v (B,T,K,d); q and k are turned to their positions."""
        normed = self.attention_norm(hint(x, "batch", None, None))
        q = hint(self._heads(self.attention.q(normed)), "batch", None, "heads", None)
        k = hint(self._heads(self.attention.k(normed)), "batch", None, "kv_heads", None)
        v = hint(self._heads(self.attention.v(normed)), "batch", None, "kv_heads", None)
        return rotate(q, rotary), rotate(k, rotary), v

    def combine(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x (B,T,D) and what its tokens attended to (B,T,H,d) -> the layer's output (B,T,D)."""
        x = x + self.attention.o(attended.reshape(*x.shape[:2], -1))
        x = x + self.mlp(self.mlp_norm(x))
        return hint(x, "batch", None, None)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class Decoder(nnx.Module):
    """A causal language model. See `__call__` for plain use; training composes embed, hidden and logits.

    scan=False unrolls the same layer code over the same stacked parameters. remat: what the backward pass
    recomputes ("dots" keeps the results of the matrix products, "full" keeps only each layer's input).
    """

    def __init__(
        self,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        scan: bool = True,
        remat: Remat = "none",
        attention: Implementation = "xla",
    ) -> None:
        self.config, self.scan = config, scan
        self.remat: Remat = remat
        self.attention: Implementation = attention

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(layer_rngs: nnx.Rngs) -> Layer:
            return Layer(config, layer_rngs, param_dtype)

        self.embedding = Embedding(config.vocab_size, config.hidden, rngs, param_dtype)
        self.layers = stacked(rngs)
        self.norm = RMSNorm(config.hidden, config.norm_eps, param_dtype)
        self.head = (
            None
            if config.tied
            else Linear(config.hidden, config.vocab_size, ("embed", "vocab"), rngs, param_dtype=param_dtype)
        )

    def embed(self, tokens: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """(B, T) ids -> (B, T, D) in `dtype` (default: that of the parameters)."""
        return hint(self.embedding(tokens, dtype), "batch", None, None)

    def hidden(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings (B,T,D), positions (B,T), mask (B,1,T,T) True = sees -> final-normed states (B,T,D)."""
        rotary = self.rotary(positions)

        def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return self._layer(layer, x, rotary, mask), None

        x, _ = self.scan_layers(body, x)
        return self.norm(x)

    def output_weight(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The vocabulary projection, (D, V), in `dtype`: take it once where logits are computed in chunks."""
        if self.head is None:
            return weight(self.embedding.table, dtype).T
        return weight(self.head.kernel, dtype)

    def logits(self, h: jax.Array, output_weight: jax.Array | None = None) -> jax.Array:
        """Normed states (..., D) -> logits (..., V) in float32."""
        projection = self.output_weight(h.dtype) if output_weight is None else output_weight
        logits = jnp.matmul(h, projection, preferred_element_type=jnp.float32)
        return hint(logits, "batch", *(None,) * (logits.ndim - 2), "vocab") if logits.ndim > 1 else logits

    def rotary(self, positions: jax.Array) -> Rotary:
        """(B, T) positions -> what `Layer.project` needs to know of them."""
        return self.config.rope.angles(positions, self.config.head_dim)

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.config.head_dim**-0.5

    def scan_layers(
        self, body: Callable[[Layer, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None
    ) -> tuple[Any, Any]:
        """Run `body(layer, carry, x) -> (carry, y)` through the layers; (last carry, stacked ys).

        `xs` is a pytree of arrays with a leading axis of L. The body is rematerialised as the model says.
        """
        graph, state = nnx.split(self.layers)

        def step(carry: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
            layer_state, x = inputs
            return body(nnx.merge(graph, layer_state), carry, x)

        step = _rematerialised(step, self.remat, in_scan=self.scan)
        if self.scan:
            return jax.lax.scan(step, carry, (state, xs), length=self.config.layers)
        ys = []
        for index in range(self.config.layers):
            carry, y = step(carry, jax.tree.map(lambda leaf, i=index: leaf[i], (state, xs)))
            ys.append(y)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *ys)

    def __call__(
        self,
        tokens: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V) float32 of ids (B, T) or embeddings (B, T, D), padded on either side.

        attention_mask (B, T) of 0/1, default all ones. Positions count from the first real token; what stands
        at padding means nothing.
        """
        graph, state = nnx.split(self)
        prompt, valid = as_prompt(tokens, inputs_embeds, attention_mask)
        return _logits(graph, state, prompt, valid, hints.current())

    def all_hidden(
        self,
        tokens: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """(L+1, B, T, D): the embeddings, then each layer's output, the last one after the final norm."""
        prompt, valid = as_prompt(tokens, inputs_embeds, attention_mask)
        x = self.embed_prompt(prompt)
        rotary, mask = self.rotary(positions_from_mask(valid)), padding_mask(valid)

        def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = self._layer(layer, x, rotary, mask)
            return x, x

        last, outputs = self.scan_layers(body, x)
        return jnp.concatenate([x[None], outputs[:-1], self.norm(last)[None]])

    def embed_prompt(self, prompt: jax.Array) -> jax.Array:
        """Ids (B, T) or embeddings (B, T, D) -> embeddings."""
        return self.embed(prompt) if prompt.ndim == 2 else hint(prompt, "batch", None, None)

    def _layer(self, layer: Layer, x: jax.Array, rotary: Rotary, mask: jax.Array) -> jax.Array:
        q, k, v = layer.project(x, rotary)
        return layer.combine(x, attend(q, k, v, mask, self.attention_scale, self.attention))


def as_prompt(
    tokens: jax.Array | None, inputs_embeds: jax.Array | None, attention_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Ids (B,T) or embeddings (B,T,D), whichever was given, and the mask (B,T); ValueError otherwise."""
    if (tokens is None) == (inputs_embeds is None):
        raise ValueError("give either tokens or inputs_embeds")
    prompt = jnp.asarray(tokens if inputs_embeds is None else inputs_embeds)
    rank = 2 if inputs_embeds is None else 3
    if prompt.ndim != rank:
        raise ValueError(f"expected {rank} dimensions, found shape {prompt.shape}")
    valid = jnp.ones(prompt.shape[:2], jnp.int32) if attention_mask is None else jnp.asarray(attention_mask)
    if valid.shape != prompt.shape[:2]:
        raise ValueError(f"attention_mask has shape {valid.shape}, the prompt {prompt.shape[:2]}")
    return prompt, valid


@partial(jax.jit, static_argnums=(0, 4))
def _logits(
    graph: nnx.GraphDef,
    state: nnx.State,
    prompt: jax.Array,
    valid: jax.Array,
    placement: hints.Placement | None,
) -> jax.Array:
    with hints.placed(placement):
        model = nnx.merge(graph, state)
        h = model.hidden(model.embed_prompt(prompt), positions_from_mask(valid), padding_mask(valid))
        return model.logits(h)


def _rematerialised(step: Callable, remat: Remat, in_scan: bool) -> Callable:
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(step, policy=policy, prevent_cse=not in_scan)
