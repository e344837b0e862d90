"""The ECG-language model: encode, connect, splice, decode. It knows how the parts meet, and nothing else.

Dimension letters: B rows, T tokens, S signal slots, C leads, L samples, N signal tokens per ECG, D model width,
M supervised slots, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.data.batch import Batch
from elm_jax.models.attention import packed_mask
from elm_jax.models.connectors import splice
from elm_jax.models.decoder import Decoder
from elm_jax.models.hints import hint


class ELM(nnx.Module):
    """An encoder (B, C, L) -> (B, N, E), a connector E -> D and a decoder.

    Args:
        encoder, connector, llm: the parts, each with parameters of one dtype.
        dtype: dtype of the decoder's activations.
        compat: names of reference behaviours (`elm_jax.compat`).
    """

    def __init__(
        self,
        encoder: nnx.Module,
        connector: nnx.Module,
        llm: Decoder,
        dtype: jnp.dtype,
        compat: tuple[str, ...] = (),
    ) -> None:
        self.encoder, self.connector, self.llm = encoder, connector, llm
        self.dtype, self.compat = dtype, compat

    def signal_embeddings(
        self, signals: jax.Array, weights: jax.Array, train_encoder: bool = False
    ) -> jax.Array:
        """ECGs (B, S, C, L) as LLM inputs (B, S·N, D).

        `weights` (B, S) counts the conversations that read each signal; with `train_encoder` the encoder's
        batch statistics are taken with these weights and its running statistics move.
        """
        rows, slots = signals.shape[:2]
        flat = hint(signals.reshape(rows * slots, *signals.shape[2:]), "batch", None, None)
        features = self.encoder(flat, weights.reshape(-1), train=train_encoder)
        embeddings = self.connector(features.astype(self.dtype))
        return hint(embeddings.reshape(rows, -1, embeddings.shape[-1]), "batch", None, None)

    def inputs(self, tokens: jax.Array, signal_slot: jax.Array, embeddings: jax.Array) -> jax.Array:
        """Token embeddings (B, T, D) with the signals' in their slots."""
        return splice(self.llm.embed(tokens, self.dtype), embeddings, signal_slot, self.compat)

    def hidden(self, batch: Batch, train_encoder: bool = False) -> jax.Array:
        """Final hidden states (B, T, D) of a batch without micro-batch axis."""
        embeddings = self.signal_embeddings(batch.signals, batch.signal_weights, train_encoder)
        x = self.inputs(batch.tokens, batch.signal_slot, embeddings)
        return self.llm.hidden(x, batch.positions, packed_mask(batch.group_ids, batch.branch_ids))
