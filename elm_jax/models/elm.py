"""The ECG-language model: encode, connect, splice, decode. It knows how the parts meet, and nothing else.

Dimension letters: B rows, T tokens, S signal slots, N signal tokens per ECG, E encoder width, D model width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.data.batch import Batch
from elm_jax.models.attention import Blocks, packed_mask
from elm_jax.models.connectors import splice
from elm_jax.models.decoder import Decoder
from elm_jax.models.hints import hint


class ELM(nnx.Module):
    """Of each view an encoder of signals -> (B, N, E) and a connector E -> D; and a decoder.

    With one view their arrays are `encoder.*` and `connector.*`, with several `encoder.<view>.*`, `connector.<view>.*`.

    Args:
        encoder: of one view, or by view where there are several; None, or left out, where the connector reads the
            signals itself.
        connector: of one view, or by view in their order; None where ECGs are symbols in the text.
        through: a view -> another one, through whose connector its embeddings go, too.
        places: of several views, the embeddings of each: it does not learn from ECGs that have none of them.
        llm: the decoder; None where encoders learn alone, which have no connectors then.
        dtype: dtype of the decoder's activations.
        compat: names of reference behaviours (`elm_jax.compat`).
    """

    def __init__(
        self,
        encoder: nnx.Module | Mapping[str, nnx.Module] | None,
        connector: nnx.Module | Mapping[str, nnx.Module] | None,
        llm: Decoder | None,
        dtype: jnp.dtype,
        compat: tuple[str, ...] = (),
        through: Mapping[str, str] | None = None,
        places: Mapping[str, int] | None = None,
    ) -> None:
        several = connector if isinstance(connector, Mapping) else encoder if isinstance(encoder, Mapping) else None
        self.views = () if several is None else tuple(several)
        self.encoder: Any = encoder if several is None else nnx.Dict(dict(encoder or {}))  # type: ignore[arg-type]
        self.connector: Any = nnx.Dict(dict(connector)) if isinstance(connector, Mapping) else connector
        self.llm, self.dtype, self.compat = cast(Decoder, llm), dtype, compat
        self.through, self.places = tuple((through or {}).items()), tuple((places or {}).values())

    def signal_embeddings(
        self, signals: Any, weights: jax.Array, trained: Collection[str] = (), slot: jax.Array | None = None
    ) -> jax.Array:
        """ECGs (by view, leaves (B, S, ...)) as LLM inputs (B, S·N, D); (B, 0, D) where ECGs are symbols.

        The N embeddings of an ECG are those of its views, one after the other. `weights` (B, S) counts the
        conversations that read each ECG; where `trained` has the part of an encoder, its batch statistics are taken
        with these weights and its running statistics move; of several views with those of the ECGs alone that have it,
        by `slot` (B, T), which embedding a token is.
        """
        rows, slots = weights.shape
        if self.connector is None:
            return jnp.zeros((rows, 0, self.llm.config.embedding), self.dtype)

        def flattened(x: jax.Array) -> jax.Array:
            return hint(x.reshape(rows * slots, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))

        parts, shown = [], self._shown(slots, slot) if trained and slot is not None else {}
        for part, view, encoder, connector in self._paths(signals):
            features = jax.tree.map(flattened, view)
            if encoder is not None:
                own = weights * shown[part] if part in shown else weights
                features = encoder(features, own.reshape(-1), train=part in trained)
            embedded = connector(features.astype(self.dtype))
            behind = dict(self.through).get(part.partition(".")[2])
            parts.append(embedded if behind is None else self.connector[behind](embedded))
        embeddings = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        if behaviours.enabled("scale_signal_embeddings", self.compat):
            embeddings = embeddings * jnp.asarray(self.llm.embedding_scale, embeddings.dtype)
        return hint(embeddings.reshape(rows, -1, embeddings.shape[-1]), "batch", None, None)

    def _paths(self, signals: Any) -> list[tuple[str, Any, Any, Any]]:
        """Of each view the name of its encoder's part, its signals, its encoder and its connector."""
        if not self.views:
            (signal,) = signals.values()
            return [("encoder", signal, self.encoder, self.connector)]
        return [(f"encoder.{v}", signals[v], self.encoder.get(v), self.connector[v]) for v in self.views]

    def _shown(self, slots: int, slot: jax.Array) -> dict[str, jax.Array]:
        """By the part of each view's encoder, where there are several, which ECGs have the view: (B, S) of 0 and 1."""
        if not self.places:
            return {}
        width = sum(self.places)
        # The last one is that of text, whose number is -1.
        there = jax.vmap(lambda row: jnp.zeros(slots * width + 1).at[row].set(1.0))(slot)[:, :-1]
        each = jnp.split(there.reshape(-1, slots, width), np.cumsum(self.places)[:-1], axis=2)
        return {f"encoder.{view}": own.max(2) for view, own in zip(self.views, each, strict=True)}

    def inputs(self, tokens: jax.Array, signal_slot: jax.Array, embeddings: jax.Array) -> jax.Array:
        """Token embeddings (B, T, D) with the signals' in their slots."""
        return splice(self.llm.embed(tokens, self.dtype), embeddings, signal_slot, self.compat)

    def hidden(self, batch: Batch, trained: Collection[str] = (), key: jax.Array | None = None) -> jax.Array:
        """Final hidden states (B, T, D) of a batch without micro-batch axis; dropout draws from `key`, if given."""
        embeddings = self.signal_embeddings(batch.signals, batch.signal_weights, trained, batch.signal_slot)
        x = self.inputs(batch.tokens, batch.signal_slot, embeddings)
        blocks = Blocks(batch.key_blocks) if batch.key_blocks.shape[-1] else None
        return self.llm.hidden(
            x, batch.positions, packed_mask(batch.group_ids, batch.branch_ids, blocks), key, blocks,
            self.llm.chains(batch.group_ids, batch.branch_ids),
        )  # fmt: skip
