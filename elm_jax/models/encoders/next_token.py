"""A transformer that predicts the next id of an ECG's symbols (trans_discrete_decoder of ECG-Neural-Networks).

Ids are those of ECG-Byte, then padding, begin and end, and with lead tokens a begin and an end of each lead. In batches
−1 is padding; unlike the reference's it stands behind the ids, so that a place means the same in training and in
forecasts. B ECGs, T ids, D width, V vocabulary, H heads, d head size, N signal tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.data.ecg_ids import OF_LEADS, PADDED, SPECIAL
from elm_jax.errors import UserError
from elm_jax.models.attention import attend
from elm_jax.models.encoders.mae import XAVIER, token
from elm_jax.models.encoders.sequence import BlockConfig, Layers, OfBlocks
from elm_jax.models.encoders.transformer import Block, Transformer
from elm_jax.models.hints import weight
from elm_jax.models.layers import LearnedPositions, plus
from elm_jax.schema import key

CHUNK = 256  # ids whose logits exist at a time


@dataclass(frozen=True)
class NextTokenConfig(BlockConfig):
    """Sizes; vocab_size is that of the file of `data.ecg_tokenizer` with what stands beside its ids."""

    num_layers: int = key(12, "blocks of the encoder", limit="at least 1")
    vocab_size: int = key(SPECIAL + 256, "V", limit="at least 1")
    max_seq_len: int = key(2048, "T, at most", limit="at least 2")
    lead_tokens: bool = key(False, "each lead is encoded by itself, between a begin and an end of its own")

    @property
    def pad_id(self) -> int:
        return self.vocab_size - SPECIAL - (OF_LEADS if self.lead_tokens else 0)

    @property
    def bos_id(self) -> int:
        return self.pad_id + 1


class NextToken(OfBlocks):
    """Post-norm causal blocks behind ids and their places; the head is not tied."""

    config: NextTokenConfig

    def make(self, config: NextTokenConfig, rngs: nnx.Rngs, param_dtype: Any, linear: Layers) -> None:
        # Of as many rows as there are ids, which need not divide over devices.
        self.embedding = LearnedPositions(config.vocab_size, 0, self.width, rngs, param_dtype)
        self.position = token(rngs, param_dtype, config.max_seq_len, self.width)
        self.layers = Transformer(config.blocks(config.num_layers, causal=True), rngs, param_dtype)
        head = XAVIER(rngs.params(), (config.vocab_size, self.width), jnp.float32)
        self.head = nnx.Param(head.astype(param_dtype), axes=(None, "embed"))

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Ids (B, T) -> (B, N, D) float32: N bins of each ECG's own. weights, train: without effect."""
        ids = signals
        known = ids != PADDED
        count, bins = known.sum(1)[:, None], jnp.arange(self.tokens)
        first, last = bins * count // self.tokens, -(-(bins + 1) * count // self.tokens)  # (B, N)
        place = (jnp.cumsum(known, 1) - 1)[:, None]
        inside = known[:, None] & (place >= first[..., None]) & (place < last[..., None])
        share = inside / jnp.maximum(inside.sum(-1, keepdims=True), 1)
        hidden = self.hidden(ids).astype(jnp.float32)
        return jnp.einsum("bnt,btd->bnd", share, hidden, precision=jax.lax.Precision.HIGHEST)

    def hidden(self, ids: jax.Array) -> jax.Array:
        """(B, T) -> (B, T, D): what each place makes of the ids up to it."""
        if ids.ndim != 2 or ids.shape[1] > self.config.max_seq_len:
            expected = f"(batch, at most {self.config.max_seq_len} ids)"
            raise UserError("encoder input", f"shape {ids.shape}", expected, "raise max_seq_len")
        return self.layers(self._embed(ids, slice(ids.shape[1])), ids != PADDED)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., D) -> (..., V) float32."""
        return (hidden @ weight(self.head, hidden.dtype).T).astype(jnp.float32)

    def _embed(self, ids: jax.Array, places: slice) -> jax.Array:
        own = jnp.where(ids == PADDED, self.config.pad_id, ids)
        return plus(self.embedding(own, self.dtype), self.position, places)

    def forecast(self, ids: jax.Array, temperature: float = 0.0, key: jax.Array | None = None) -> jax.Array:
        """(B, T) -> (B, T): where the ids are `PADDED`, what continues those before it.

        The likeliest id, or with a temperature one drawn from `key`; never padding or a begin. Nothing ends a forecast.
        """
        (batch, length), config = ids.shape, self.config
        graph, state = nnx.split(self.layers.blocks)
        shape = config.num_layers, batch, length, config.n_heads, config.d_model // config.n_heads
        places = jnp.arange(length)
        never = jnp.isin(jnp.arange(config.vocab_size), jnp.array([config.pad_id, config.bos_id]))

        def step(carry: tuple[jax.Array, Any], at: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
            made, cache = carry
            now = jnp.where(ids[:, at] == PADDED, made, ids[:, at])
            x = plus(self.embedding(now[:, None], self.dtype), nnx.Param(self.position[...][at]))

            def layer(x: jax.Array, one: Any) -> tuple[jax.Array, Any]:
                parts, keys, values = one
                return _step_of(nnx.merge(graph, parts), x, keys, values, at, places <= at)

            x, cache = jax.lax.scan(layer, x, (state, *cache))
            logits = jnp.where(never, -jnp.inf, self.logits(x)[:, 0])
            if temperature > 0:
                assert key is not None, "a forecast is drawn from a key"
                following = jax.random.categorical(jax.random.fold_in(key, at), logits / temperature)
            else:
                following = logits.argmax(-1)
            return (following.astype(jnp.int32), cache), now

        empty = jnp.zeros(shape, self.dtype)
        start = jnp.full(batch, config.bos_id, jnp.int32)
        return jax.lax.scan(step, (start, (empty, empty)), places)[1].T


def _step_of(
    block: Block, x: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array, seen: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One place (B, 1, D) through a post-norm block, with the keys and values (B, T, H, d) of those before it."""
    attention = block.attention
    q, k, v = (part.reshape(len(x), 1, attention.heads, -1) for part in jnp.split(attention.qkv(x), 3, axis=-1))
    keys, values = (jax.lax.dynamic_update_slice(all_, new, (0, at, 0, 0)) for all_, new in ((keys, k), (values, v)))
    out = attend(q, keys, values, seen[None, None, None], q.shape[-1] ** -0.5, "xla").reshape(x.shape)
    assert attention.o is not None
    x = block.norm1(x + attention.o(out))
    return block.norm2(x + block.mlp(x)), (keys, values)


def next_id_errors(encoder: NextToken, ids: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """(B,) float32: of ids (B, T), Σ −log p of each but the first, by those before it; a begin is not learnt.

    counted: (B, T - 1) bool, of which ids alone the sum is.
    """
    hidden, labels = encoder.hidden(ids)[:, :-1], ids[:, 1:]
    known = (labels != PADDED) & (labels != encoder.config.bos_id) & (True if counted is None else counted)
    batch, length, width = hidden.shape
    chunks = -(-length // CHUNK)
    more = ((0, 0), (0, chunks * -(-length // chunks) - length))
    hidden, labels, known = jnp.pad(hidden, (*more, (0, 0))), jnp.pad(labels, more), jnp.pad(known, more)

    def parts(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, chunks, -1, *x.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, labels, known = part
        logits = encoder.logits(hidden)
        target = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return total + jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - target, 0.0).sum(1), None

    zero = jnp.zeros(batch, jnp.float32)
    return jax.lax.scan(add, zero, (parts(hidden), parts(labels), parts(known)))[0]


NEXT_TOKEN_NAMES = {
    "embedding.table": "token_emb.weight", "position": "pos_emb.weight", "layers.blocks": "layers.{layer}",
    "head": "lm_head.weight",
}  # fmt: skip
