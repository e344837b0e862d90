"""Log probabilities at supervised positions only; (B, T, V) logits never exist.

Dimension letters: B rows, T tokens, M supervised slots, D model width, V vocabulary, W parts of the batch (one for
each of the devices that the rows are divided over), N slots of a part.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from elm_jax.data.batch import Batch
from elm_jax.models.decoder import Decoder
from elm_jax.models.hints import copies, hint, ways

CHUNK = 2**27  # logits that may exist at a time on a device


Part = tuple[jax.Array, jax.Array, jax.Array]  # of the targets: hidden states (W, N, D), ids and weights (W, N)


def summed_cross_entropy(llm: Decoder, hidden: jax.Array, batch: Batch) -> jax.Array:
    """Σ weight · −log p(target) over the supervised slots, float32 scalar.

    Args:
        hidden: (B, T, D) final hidden states.
        batch: `target_index`, `target_ids`, `target_weights` (B, M).
    """
    losses, inputs, chunks = _in_chunks(llm, hidden, batch)

    def chunk(total: jax.Array, part: Part) -> tuple[jax.Array, None]:
        weights = part[2]
        return total + jnp.where(weights > 0, losses(part) * weights, 0.0).sum(), None

    if chunks == 1:
        return chunk(jnp.zeros((), jnp.float32), jax.tree.map(lambda x: x[0], inputs))[0]
    body = jax.checkpoint(chunk, prevent_cse=False)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), inputs)[0]


def log_probs(llm: Decoder, hidden: jax.Array, batch: Batch, temperature: float = 1.0) -> jax.Array:
    """log p(target) of each slot, float32 (B, M); 0 where a slot is unused. Arguments as `summed_cross_entropy`;
    logits are divided by `temperature`."""
    losses, inputs, chunks = _in_chunks(llm, hidden, batch, temperature)

    def chunk(part: Part) -> jax.Array:
        return jnp.where(part[2] > 0, -losses(part), 0.0)

    if chunks == 1:
        found = chunk(jax.tree.map(lambda x: x[0], inputs))[None]
    else:
        found = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), inputs)
    return jnp.moveaxis(found, 0, 1).reshape(batch.target_ids.shape)


def sums_of_samples(values: jax.Array, batch: Batch) -> jax.Array:
    """The sums (B, M) of values (B, M) of the targets over those of each sample, by the sample's place in its row."""
    size = values.shape[1]
    return jax.vmap(lambda x, samples: jax.ops.segment_sum(x, samples, size))(values, batch.target_sample)


def per_target(of_samples: jax.Array, batch: Batch) -> jax.Array:
    """What each target's sample has, (B, M), of values (B, M) by the sample's place in its row."""
    return jnp.take_along_axis(of_samples, batch.target_sample, axis=1)


def _in_chunks(
    llm: Decoder, hidden: jax.Array, batch: Batch, temperature: float = 1.0
) -> tuple[Callable[[Part], jax.Array], Part, int]:
    """(a part of the targets -> −log p (W, N); the parts (chunks, W, N, ...); the number of chunks)."""
    picked = jnp.take_along_axis(hidden, batch.target_index[..., None], axis=1)  # (B, M, D)
    rows, targets, _ = picked.shape
    # Its gradient is summed over the chunks where it arises, and over the devices once, after the last chunk.
    each = copies(llm.output_weight(picked.dtype), ("embed", "vocab"), rows)
    parts = len(each)
    chunks = _chunks(rows // parts * targets, -(-llm.config.vocab_size // ways("vocab")))

    def losses(part: Part) -> jax.Array:
        h, ids, _ = part
        logits = llm.logits(h, each)
        if temperature != 1.0:
            logits = logits / temperature
        # A masked sum rather than a gather: the vocabulary may be divided over devices.
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        target = jnp.where(vocabulary == ids[..., None], logits, 0.0).sum(-1)
        return jax.nn.logsumexp(logits, axis=-1) - target

    def split(x: jax.Array) -> jax.Array:
        """(B, M, ...) -> (chunks, W, N / chunks, ...)."""
        x = x.reshape(parts, chunks, -1, *x.shape[2:])
        return hint(jnp.moveaxis(x, 1, 0), None, "batch", *(None,) * (x.ndim - 2))

    return losses, (split(picked), split(batch.target_ids), split(batch.target_weights)), chunks


def _chunks(slots: int, vocabulary: int) -> int:
    """The least number of equal parts of a device's slots that keeps a part's logits within CHUNK."""
    least = -(-slots * vocabulary // CHUNK)
    return next((n for n in range(max(1, least), slots) if slots % n == 0), slots)
