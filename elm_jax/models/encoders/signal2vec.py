"""signal2vec: each id of ECG-Byte has a vector, as words have in word2vec (ECG-Bench 0.0.5 of the reference).

Flow: ids (B, T) -> vectors (B, T, D) -> (B, N, D). Ids are those of `data.ecg_ids`; a begin, an end and padding have no
vector. Vectors are learnt by skip-grams with negative samples (Mikolov et al. 2013, arXiv 1310.4546): an id's vector as
a centre is to be near the vectors as context of those around it, and far from those of ids at random; what is kept of
an id is the mean of both. Dimension letters: B ECGs, T ids, V of ECG-Byte's ids, D width, N signal tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.data.ecg_ids import SPECIAL
from elm_jax.errors import UserError
from elm_jax.models.hints import weight
from elm_jax.models.names import bare_name
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.schema import key, sizes_of


@dataclass(frozen=True)
class Signal2VecConfig:
    """Sizes; vocab_size is that of the file of `data.ecg_tokenizer` with what stands beside its ids."""

    vocab_size: int = key(SPECIAL + 256, "V, and padding, begin and end", limit="from 1 to 10000000")
    dim: int = key(128, "D", limit="from 1 to 100000")
    max_seq_len: int = key(2048, "T, at most", limit="from 1 to 10000000")
    pairs: int = key(256, "P, pairs that are drawn of an ECG in a step", limit="from 1 to 10000000")
    window: int = key(12, "ids between a centre and its context, at most", limit="from 1 to 100000")
    negatives: int = key(5, "ids at random for each pair", limit="from 1 to 10000")
    subsample: float = key(1e-5, "the frequency above which ids are passed over", limit="above 0")
    min_count: int = key(10, "how often an id has to have been there", limit="at least 1")

    lead_tokens = False  # as `data.ecg_ids` asks: leads follow each other without a mark

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> Signal2VecConfig:
        """Read `encoder.config`. UserError for an unknown field or value."""
        return cls(**sizes_of(cls, "encoder.config", config))


class Signal2Vec(nnx.Module):
    """The table of vectors. `width` is D; `tokens` N: the T of the config for a place of each id, or fewer."""

    def __init__(
        self, config: Signal2VecConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.dim, jnp.dtype(dtype)
        shape, bound = (max(config.vocab_size - SPECIAL, 1), config.dim), 0.5 / config.dim  # as word2vec begins
        table = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.embeddings = nnx.Param(table.astype(param_dtype), axes=(None, None))
        self.make(table, param_dtype)

    def make(self, table: jax.Array, param_dtype: Any) -> None:
        """What is beside the vectors, which begin as `table`."""

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Ids (B, T) -> (B, N, D) float32. `weights` and `train` change nothing.

        Where N is the config's T, the vector of each id, and zeros behind the last, as the reference has them; else
        the means of N bins of each ECG's own ids. Raises UserError for more ids than the config has.
        """
        ids = signals
        if ids.ndim != 2 or ids.shape[1] > self.config.max_seq_len:
            expected = f"(batch, at most {self.config.max_seq_len} ids)"
            raise UserError("encoder input", f"shape {ids.shape}", expected, "raise encoder.config.max_seq_len")
        ids, known = self.own(ids)
        vectors = jnp.where(known[:, :, None], weight(self.embeddings, self.dtype)[ids], 0)
        if self.tokens == self.config.max_seq_len:
            rest = self.tokens - ids.shape[1]
            return jnp.pad(vectors, ((0, 0), (0, rest), (0, 0))).astype(jnp.float32)
        return adaptive_average_pool(vectors, self.tokens, known.sum(1))

    def own(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids (B, T) -> those that have a vector, first, 0 behind them; and where they are."""
        known = (ids >= 0) & (ids < self.embeddings.shape[0])
        order = jnp.argsort(~known, axis=1, stable=True)
        ids, known = (jnp.take_along_axis(x, order, axis=1) for x in (ids, known))
        return jnp.where(known, ids, 0), known


class SkipGram(Signal2Vec):
    """The table as it is learnt.

    A vector as a centre is the mean, `embeddings`, and `difference`; as context the mean less it. So the mean, which is
    all that an ELM takes, is an array of its own. At first contexts are zeros. counts: how often each id was there.
    """

    def make(self, table: jax.Array, param_dtype: Any) -> None:
        half = (table / 2).astype(param_dtype)
        self.embeddings.set_value(half)
        self.difference = nnx.Param(half, axes=(None, None))
        self.counts = nnx.BatchStat(jnp.zeros(len(table), jnp.float32), axes=(None,))

    def pair_errors(self, ids: jax.Array, draws: jax.Array, learns: bool) -> jax.Array:
        """Ids (B, T) -> (B,) float32: the mean error of the pairs that are drawn of each ECG, 0 where there is none.

        A pair is a centre and an id at most `window` away. Frequent ids count less, and rare ones nothing, by how often
        they were there until now: centres are drawn so, contexts weighed. `learns`: whether this batch counts from now
        on.
        """
        config, (ids, known) = self.config, self.own(ids)
        counts = self.counts[...].at[ids].add(known.astype(jnp.float32))
        if learns:
            self.counts.set_value(jax.lax.stop_gradient(counts))
        part = config.subsample * counts.sum() / jnp.maximum(counts, 1.0)  # t / f
        kept = jnp.where(counts >= config.min_count, jnp.minimum(jnp.sqrt(part) + part, 1.0), 0.0)
        keys, shape = jax.random.split(draws, 5), (len(ids), config.pairs)
        length, edges = known.sum(1, keepdims=True), jnp.cumsum(jnp.where(known, kept[ids], 0.0), 1)
        centre = jax.vmap(_drawn)(edges, jax.random.uniform(keys[0], shape))
        reach = jax.random.randint(keys[1], shape, 1, config.window + 1)
        offset = 1 + (jax.random.uniform(keys[2], shape) * reach).astype(jnp.int32)
        context = centre + jnp.where(jax.random.bernoulli(keys[3], shape=shape), offset, -offset)
        there = (context >= 0) & (context < length) & (edges[:, -1:] > 0)
        centre, context = (jnp.take_along_axis(ids, jnp.clip(x, 0, ids.shape[1] - 1), 1) for x in (centre, context))
        drawn, counted = self._negatives(counts, keys[4], context), jnp.where(there, kept[context], 0.0)
        mean, half = (weight(x, jnp.float32) for x in (self.embeddings, self.difference))
        vector = mean[centre] + half[centre]
        near = jnp.einsum("bpd,bpd->bp", vector, mean[context] - half[context])
        far = jnp.einsum("bpd,bpnd->bpn", vector, mean[drawn] - half[drawn])
        errors = -jax.nn.log_sigmoid(near) - jax.nn.log_sigmoid(-far).sum(-1)
        total = counted.sum(1)
        return jnp.where(total > 0, (errors * counted).sum(1) / jnp.where(total > 0, total, 1.0), 0.0)

    def _negatives(self, counts: jax.Array, draws: jax.Array, context: jax.Array) -> jax.Array:
        """(B, P, negatives) ids by their frequency to the power 0.75; one that is the context is drawn once more."""
        share = jnp.where(counts >= self.config.min_count, counts**0.75, 0.0)
        first, second = _drawn(
            jnp.cumsum(share), jax.random.uniform(draws, (2, *context.shape, self.config.negatives))
        )
        return jnp.where(first == context[:, :, None], second, first)


def _drawn(edges: jax.Array, uniform: jax.Array) -> jax.Array:
    """Places, each as likely as its step of the running sums `edges`, by numbers in [0, 1)."""
    return jnp.minimum(jnp.searchsorted(edges, uniform * edges[-1], side="right"), len(edges) - 1)


def published_name(name: str) -> str | None:
    """A checkpoint's key; None for what stands beside the table: how often each id was there, and what trained it."""
    name = bare_name(name)
    return None if name in ("freq", "vocab_size", "difference", "counts") else name
