"""The ECG-language model: encode, connect, splice, decode. It knows how the parts meet, and nothing else.

Dimension letters: B rows, T tokens, S signal slots, N signal tokens per ECG, E encoder width, D model width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.data.batch import Batch
from elm_jax.models.attention import Blocks, packed_mask
from elm_jax.models.connectors import splice
from elm_jax.models.decoder import Decoder
from elm_jax.models.hints import hint


class ELM(nnx.Module):
    """An encoder of signals -> (B, N, E), a connector E -> D and a decoder.

    Args:
        encoder: None where the connector reads the signals itself.
        connector: None where ECGs are symbols in the text.
        llm: the decoder.
        dtype: dtype of the decoder's activations.
        compat: names of reference behaviours (`elm_jax.compat`).
    """

    def __init__(
        self,
        encoder: nnx.Module | None,
        connector: nnx.Module | None,
        llm: Decoder,
        dtype: jnp.dtype,
        compat: tuple[str, ...] = (),
    ) -> None:
        self.encoder, self.connector, self.llm = encoder, connector, llm
        self.dtype, self.compat = dtype, compat

    def signal_embeddings(self, signals: Any, weights: jax.Array, train_encoder: bool = False) -> jax.Array:
        """ECGs (leaves (B, S, ...)) as LLM inputs (B, S·N, D); (B, 0, D) where ECGs are symbols.

        `weights` (B, S) counts the conversations that read each signal; with `train_encoder` the encoder's
        batch statistics are taken with these weights and its running statistics move.
        """
        rows, slots = weights.shape
        if self.connector is None:
            return jnp.zeros((rows, 0, self.llm.config.hidden), self.dtype)

        def flattened(x: jax.Array) -> jax.Array:
            return hint(x.reshape(rows * slots, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))

        features = jax.tree.map(flattened, signals)
        if self.encoder is not None:
            features = self.encoder(features, weights.reshape(-1), train=train_encoder)
        embeddings = self.connector(features.astype(self.dtype))
        if behaviours.enabled("scale_signal_embeddings", self.compat):
            embeddings = embeddings * jnp.asarray(self.llm.embedding_scale, embeddings.dtype)
        return hint(embeddings.reshape(rows, -1, embeddings.shape[-1]), "batch", None, None)

    def inputs(self, tokens: jax.Array, signal_slot: jax.Array, embeddings: jax.Array) -> jax.Array:
        """Token embeddings (B, T, D) with the signals' in their slots."""
        return splice(self.llm.embed(tokens, self.dtype), embeddings, signal_slot, self.compat)

    def hidden(self, batch: Batch, train_encoder: bool = False, key: jax.Array | None = None) -> jax.Array:
        """Final hidden states (B, T, D) of a batch without micro-batch axis; dropout draws from `key`, if given."""
        embeddings = self.signal_embeddings(batch.signals, batch.signal_weights, train_encoder)
        x = self.inputs(batch.tokens, batch.signal_slot, embeddings)
        blocks = Blocks(batch.key_blocks) if batch.key_blocks.shape[-1] else None
        return self.llm.hidden(
            x, batch.positions, packed_mask(batch.group_ids, batch.branch_ids, blocks), key, blocks
        )
