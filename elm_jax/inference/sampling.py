"""How a token is drawn from logits. A row's draws depend on the key, its number and the token's number alone.

B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """temperature: 0 takes the likeliest token. top_p: the nucleus. penalty: what `penalised` takes. All scalars."""

    temperature: jax.Array
    top_p: jax.Array
    penalty: jax.Array
    key: jax.Array  # of jax.random; unused at temperature 0

    @classmethod
    def of(
        cls, temperature: float = 0.0, top_p: float = 1.0, penalty: float = 1.0, key: jax.Array | None = None
    ) -> "Sampling":
        """As arrays. By default greedy; `penalty` 1 is none; `key` None: that of seed 0."""
        key = jax.random.key(0) if key is None else key
        return cls(jnp.float32(temperature), jnp.float32(top_p), jnp.float32(penalty), key)


def draw(
    logits: jax.Array, sampling: Sampling, number: jax.Array, drawn: jax.Array, seen: jax.Array | None
) -> jax.Array:
    """The next token (B,) int32 of rows with these numbers (B,), of each `drawn` (B,) tokens were drawn before.

    `seen` (B, V): which tokens the repetition penalty is for; None: there is none.
    """
    logits = logits if seen is None else penalised(logits, seen, sampling.penalty)

    def random() -> jax.Array:
        def one(number: jax.Array, drawn: jax.Array, logits: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(sampling.key, number), drawn)
            return jax.random.categorical(key, logits)

        allowed = nucleus(logits / sampling.temperature, sampling.top_p)
        return jax.vmap(one)(number, drawn, allowed).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, random, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits (B, V) with -inf for all but the fewest tokens whose probabilities sum to top_p or more."""

    def cut() -> jax.Array:
        # The least logit of which those above it sum to less, by halving what it may be: a sort takes ten times as long
        # on a CPU. Whole numbers that are ordered as the floats are that have their bits (of zeros: one of both).
        floats = jnp.where(logits == 0, 0.0, logits).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(floats, jnp.int32)
        order, probabilities = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), jax.nn.softmax(logits, axis=-1)

        def halve(_: jax.Array, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = span
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            enough = jnp.where(order > middle, probabilities, 0.0).sum(-1, keepdims=True) < top_p
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        ends = order.min(-1, keepdims=True), order.max(-1, keepdims=True)
        least, _ = jax.lax.fori_loop(0, 32, halve, ends)
        return jnp.where(order >= least, logits, -jnp.inf)

    return jax.lax.cond(top_p < 1, cut, lambda: logits)


def penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits (B, V) of tokens that were `seen` (B, V) divided by the penalty, or times it where they are negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
