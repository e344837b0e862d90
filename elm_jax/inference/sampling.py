"""How a token is drawn from logits. A row's draws depend on the key, its number and the token's number alone.

B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens whose probabilities are summed before those of all


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
) -> tuple[jax.Array, jax.Array]:
    """The next token (B,) int32 of rows with these numbers (B,), of each `drawn` (B,) tokens were drawn before, and its
    log probability (B,) float32 among all tokens, at the temperature; at temperature 0 that is 0.

    `seen` (B, V): which tokens the repetition penalty is for; None: there is none.
    """
    logits = logits if seen is None else penalised(logits, seen, sampling.penalty)

    def random() -> tuple[jax.Array, jax.Array]:
        keys = jax.vmap(lambda n, d: jax.random.fold_in(jax.random.fold_in(sampling.key, n), d))(number, drawn)
        return from_nucleus(keys, logits / sampling.temperature, sampling.top_p)

    def likeliest() -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(len(logits), jnp.float32)

    return jax.lax.cond(sampling.temperature > 0, random, likeliest)


def from_nucleus(keys: jax.Array, logits: jax.Array, top_p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token (B,) of softmax(logits) (B, V), drawn by the row's key from the fewest whose probabilities sum to top_p
    or more, and its log probability (B,) among all.

    Nothing is sorted (as in FlashInfer, arXiv 2501.01005): a token is drawn from all; where those likelier than it sum
    to top_p or more, it is not of the nucleus, nor is any that is less likely: the next is drawn from those above it.
    """
    top = logits.max(-1, keepdims=True)
    weights = jnp.pad(jnp.exp(logits - top), ((0, 0), (0, -logits.shape[1] % BLOCK)))
    blocks = weights.reshape(len(weights), -1, BLOCK)

    def above(least: jax.Array) -> jax.Array:
        """The blocks' sums (B, V / BLOCK) of weights that are more than `least` (B,)."""
        return jnp.where(blocks > least[:, None, None], blocks, 0.0).sum(-1)

    def chosen(trial: jax.Array | int, least: jax.Array, sums: jax.Array) -> jax.Array:
        """Tokens (B,) by their weights: the block, then the place in it, where what is summed passes the target."""
        to_block = jnp.cumsum(sums, -1)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, trial)))(keys)
        target = uniform * to_block[:, -1]
        block = jnp.minimum((to_block <= target[:, None]).sum(-1), sums.shape[1] - 1)
        inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
        to_place = jnp.cumsum(jnp.where(inside > least[:, None], inside, 0.0), -1)
        before = jnp.where(block > 0, jnp.take_along_axis(to_block, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
        rest = jnp.minimum(target - before, jnp.nextafter(to_place[:, -1], jnp.float32(0)))  # however sums are rounded
        place = block * BLOCK + (to_place <= rest[:, None]).sum(-1)
        return jnp.minimum(place, logits.shape[1] - 1).astype(jnp.int32)  # past it where logits are not finite

    def again(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        trial, token, done = carry
        least = at(weights, token)
        sums = above(least)
        done |= sums.sum(-1) < top_p * total
        return trial + 1, jnp.where(done, token, chosen(trial, least, sums)), done

    nothing = jnp.zeros(len(weights))
    sums = above(nothing)
    total = sums.sum(-1)
    first = jnp.int32(1), chosen(0, nothing, sums), (top_p >= 1) | ~(total > 0)  # no sum: logits that are not finite
    _, token, _ = jax.lax.while_loop(lambda carry: ~carry[2].all(), again, first)
    return token, at(logits, token) - top[:, 0] - jnp.log(total)


def at(values: jax.Array, token: jax.Array) -> jax.Array:
    """(B, V) -> (B,): each row's value of its token."""
    return jnp.take_along_axis(values, token[:, None], 1)[:, 0]


def penalised(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits (B, V) of tokens that were `seen` (B, V) divided by the penalty, or times it where they are negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
