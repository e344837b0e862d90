"""Batched generation with a key/value cache: one prefill, then a `while_loop` of single tokens on the device.

B batch, P prompt slots, S cache slots (P and the new tokens), K key/value heads, d head size, V vocabulary.
The keys of a row carry their positions, so padding may be anywhere: the mask alone says what is seen.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models import hints
from elm_jax.models.attention import padding_mask, positions_from_mask
from elm_jax.models.decoder import Decoder, Layer, Window, as_prompt

ENDED = -1  # what fills a row after its end


class _Loop(NamedTuple):
    """What the loop carries: tokens drawn, the last ones (B,), output (B, new), rows done (B,), the cache."""

    step: jax.Array
    last: jax.Array
    output: jax.Array
    done: jax.Array
    cache: "_Cache"


class _Cache(NamedTuple):
    """Keys and values (L, B, S, K, d), which slots hold something, and the positions of these (both B, S)."""

    keys: jax.Array
    values: jax.Array
    filled: jax.Array
    positions: jax.Array


def generate(
    llm: Decoder,
    tokens: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """Continue prompts: ids (B, P) or embeddings (B, P, D) -> ids (B, max_new_tokens) int32.

    Args:
        attention_mask: (B, P) of 0/1, padded on either side; a row of zeros gives nothing.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: drawn from the fewest tokens whose probabilities reach top_p.
        eos_ids: a row ends with the first of these, which is still in the output; -1 follows.
        key: of `jax.random`, needed where temperature is above 0.
    Prompts are padded to a few lengths, so that compilations stay few; the other arguments, max_new_tokens
    and the number of eos_ids excepted, compile nothing anew.
    Raises UserError for values out of range, and where the learned positions of a model do not suffice.
    """
    _check(max_new_tokens, temperature, top_p, key)
    prompt, valid = as_prompt(tokens, inputs_embeds, attention_mask)
    llm.check_length(positions_from_mask(valid), max_new_tokens)
    spare = bucket(prompt.shape[1]) - prompt.shape[1]
    prompt = jnp.pad(prompt, ((0, 0), (0, spare)) + ((0, 0),) * (prompt.ndim - 2))
    valid = jnp.pad(valid.astype(bool), ((0, 0), (0, spare)))
    graph, state = nnx.split(llm)
    return generate_from_prompt(
        graph,
        state,
        prompt,
        valid,
        jnp.float32(temperature),
        jnp.float32(top_p),
        jnp.asarray(tuple(eos_ids), jnp.int32),
        jax.random.key(0) if key is None else key,  # unused at temperature 0
        max_new_tokens,
        hints.current(),
    )


def bucket(length: int) -> int:
    """The padded length of a prompt: a multiple of 64, and of an eighth of the next power of two."""
    step = max(64, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "placement"))
def generate_from_prompt(
    graph: nnx.GraphDef,
    state: nnx.State,
    prompt: jax.Array,
    valid: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    eos_ids: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    placement: hints.Placement | None,
) -> jax.Array:
    """The jitted core of `generate`, for a split model. Ids (B, P) or embeddings (B, P, D) -> (B, new)."""
    with hints.placed(placement):
        llm = nnx.merge(graph, state)
        logits, cache = _prefill(llm, prompt, valid, max_new_tokens)
        lengths = valid.sum(-1, dtype=jnp.int32)

        def draw(logits: jax.Array, loop: _Loop) -> _Loop:
            """Draw the next token of each row that goes on, and write it into the output."""
            token = _sample(logits, temperature, top_p, jax.random.fold_in(key, loop.step))
            token = jnp.where(loop.done, ENDED, token)
            output = jax.lax.dynamic_update_index_in_dim(loop.output, token, loop.step, axis=1)
            ended = loop.done | jnp.isin(token, eos_ids)
            return loop._replace(step=loop.step + 1, last=token, output=output, done=ended)

        def goes_on(loop: _Loop) -> jax.Array:
            return (loop.step < max_new_tokens) & ~loop.done.all()

        def advance(loop: _Loop) -> _Loop:
            slot, positions = prompt.shape[1] + loop.step - 1, lengths + loop.step - 1
            dtype = None if prompt.ndim == 2 else prompt.dtype
            x = llm.embed(jnp.maximum(loop.last, 0)[:, None], dtype)
            logits, cache = _decode(llm, x, positions[:, None], slot, loop.cache)
            return draw(logits, loop._replace(cache=cache))

        output = jnp.full((prompt.shape[0], max_new_tokens), ENDED, jnp.int32)
        start = _Loop(jnp.int32(0), output[:, 0], output, lengths == 0, cache)
        return jax.lax.while_loop(goes_on, advance, draw(logits, start)).output


def _prefill(llm: Decoder, prompt: jax.Array, valid: jax.Array, new: int) -> tuple[jax.Array, _Cache]:
    """Logits (B, V) at the last real token of each prompt, and the cache with room for `new` tokens."""
    positions = positions_from_mask(valid)
    x, rotary = llm.placed(llm.embed_prompt(prompt), positions), llm.rotary(positions)
    masks = llm.masks(padding_mask(valid), positions, positions)

    def body(
        layer: Layer, window: Window, x: jax.Array, _: None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, v = layer.project(x, rotary)
        return layer.combine(x, llm.attend(q, k, v, masks[window])), (k, v)

    x, (keys, values) = llm.scan_layers(body, x)
    room, after = ((0, 0), (0, 0), (0, new), (0, 0), (0, 0)), ((0, 0), (0, new))
    cache = _Cache(jnp.pad(keys, room), jnp.pad(values, room), jnp.pad(valid, after), jnp.pad(positions, after))
    index = jnp.arange(valid.shape[1])
    last = jnp.max(jnp.where(valid, index, 0), axis=-1)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return llm.logits(llm.norm(x))[:, 0], cache


def _decode(
    llm: Decoder, x: jax.Array, positions: jax.Array, slot: jax.Array, cache: _Cache
) -> tuple[jax.Array, _Cache]:
    """One token (B, 1, D) at `positions` (B, 1), kept in `slot` of the cache -> logits (B, V), the cache."""
    filled, cached = cache.filled.at[:, slot].set(True), cache.positions.at[:, slot].set(positions[:, 0])
    x, rotary = llm.placed(x, positions), llm.rotary(positions)
    masks = llm.masks(filled[:, None, None, :], positions, cached)

    def body(
        layer: Layer, window: Window, carry: tuple[jax.Array, jax.Array, jax.Array], index: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        # The caches travel in the carry, where they are written in place; as inputs and outputs of the scan
        # they would be copied whole for every token.
        x, keys, values = carry
        q, k, v = layer.project(x, rotary)
        at = (index, 0, slot, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, k[None], at)
        values = jax.lax.dynamic_update_slice(values, v[None], at)
        attended = llm.attend(q, keys[index], values[index], masks[window], "xla")
        return (layer.combine(x, attended), keys, values), None

    layers = jnp.arange(llm.config.layers)
    (x, keys, values), _ = llm.scan_layers(body, (x, cache.keys, cache.values), layers)
    return llm.logits(llm.norm(x))[:, 0], _Cache(keys, values, filled, cached)


def _sample(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, key: jax.Array) -> jax.Array:
    """(B, V) -> (B,) int32."""

    def drawn() -> jax.Array:
        return jax.random.categorical(key, nucleus(logits / temperature, top_p), axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits (B, V) with -inf for all but the fewest tokens whose probabilities sum to top_p or more."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) | (top_p >= 1)  # rounding must not cut the tail where nothing is to be cut
    threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _check(max_new_tokens: int, temperature: float, top_p: float, key: jax.Array | None) -> None:
    where = "generate"
    if max_new_tokens < 1:
        raise UserError(where, f"max_new_tokens = {max_new_tokens}", "at least 1", "raise it")
    if not temperature >= 0:
        raise UserError(where, f"temperature = {temperature}", "0 or more", "use 0 for greedy decoding")
    if not 0 < top_p <= 1:
        raise UserError(where, f"top_p = {top_p}", "above 0 and at most 1", "use 1 to leave nothing out")
    if temperature > 0 and key is None:
        raise UserError(
            where, f"temperature = {temperature} without key", "a key", "give key=jax.random.key(seed)"
        )
