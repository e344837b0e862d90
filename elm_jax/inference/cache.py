"""What generation keeps of the tokens before: keys and values by token, and the state of layers with a recurrence.

B rows, R rows that begin, T tokens of a prompt, S places of a row, K key/value heads, d head size, L layers.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elm_jax.models.delta import Recurrent
from elm_jax.models.hints import hint

_TOKENS = -2, -1  # the axis of S, of keys and of values


class Tokens(NamedTuple):
    """Keys (L, B, K, S, d) and values (L, B, K, d, S); of one layer without L. (Of prompts A in the place of B.)

    That is how the products of attention want them: otherwise all of a layer's would be copied for every token drawn.
    """

    keys: jax.Array
    values: jax.Array

    def layer(self, index: jax.Array) -> "Tokens":
        return Tokens(self.keys[index], self.values[index])


class Cache(NamedTuple):
    """What each layer keeps, by the part of it that does: a table of parts, as `scan_layers` takes it.

    delta: None where no layer has a recurrence; with a leading axis of L.
    """

    attention: Tokens
    delta: Recurrent | None = None

    @property
    def places(self) -> int:
        """S"""
        return self.attention.keys.shape[-2]

    @property
    def parts(self) -> dict[str, Any]:
        return {name: part for name, part in self._asdict().items() if part is not None}


def spread(cache: Cache, axis: str | None) -> Cache:
    """The cache laid over the mesh: rows by the logical `axis` (None: whole everywhere), heads as the model's."""
    tokens = Tokens(*(hint(x, None, axis, "kv_heads", None, None) for x in cache.attention))
    if cache.delta is None:
        return Cache(tokens)
    inputs, state = cache.delta
    return Cache(tokens, Recurrent(hint(inputs, None, axis, None, None), hint(state, None, axis, "heads", None, None)))


def enlarged(cache: Cache, places: int) -> Cache:
    """The cache with S = `places`, which is more than it had."""
    tokens = Tokens(*(_enlarged(x, places, along) for x, along in zip(cache.attention, _TOKENS, strict=True)))
    return cache._replace(attention=tokens)


def by_token(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values (B, S, K, d), as `attend` takes them."""
    return jnp.moveaxis(tokens.keys, 2, 1), jnp.moveaxis(tokens.values, 3, 1)


def behind_past(past: Tokens | None, own: Tokens) -> Tokens:
    """The keys and values of all that a prompt sees."""
    return own if past is None else Tokens(*map(jnp.concatenate, zip(past, own, strict=True), _TOKENS))


def with_token(tokens: Tokens, row: tuple[jax.Array, ...], place: jax.Array, k: jax.Array, v: jax.Array) -> Tokens:
    """With k and v (B, 1, K, d) at the rows' places (B,)."""
    keys, values = tokens.keys.at[*row, :, place].set(k[:, 0]), tokens.values.at[*row, :, :, place].set(v[:, 0])
    return Tokens(keys, values)


def stored(cache: Cache, own: Cache, prefix: Cache | None, before: jax.Array, slot: jax.Array) -> Cache:
    """The cache with prefixes, cut to `before` (R,) tokens, and what comes after them in its rows `slot` (R,)."""

    def laid(prefix: jax.Array | None, own: jax.Array, axis: int) -> jax.Array:
        known, room = (own, 0) if prefix is None else (prefix, min(prefix.shape[axis], cache.places))
        kept = jax.lax.slice_in_dim(known, 0, room, axis=axis)
        return _written(_enlarged(kept, cache.places, axis), own, before, axis)

    before_them = (None, None) if prefix is None else prefix.attention
    each = zip(cache.attention, before_them, own.attention, _TOKENS, strict=True)
    tokens = Tokens(*(whole.at[:, slot].set(laid(p, o, axis), mode="drop") for whole, p, o, axis in each))
    put = partial(jax.tree.map, lambda whole, new: whole.at[:, slot].set(new, mode="drop"))
    return Cache(tokens, None if cache.delta is None else put(cache.delta, own.delta))


def _enlarged(x: jax.Array, places: int, axis: int) -> jax.Array:
    """With zeros behind it along `axis`."""
    room = [(0, 0)] * x.ndim
    room[axis] = 0, places - x.shape[axis]
    return jnp.pad(x, room)


def _written(rows: jax.Array, new: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """Rows (L, R, ...) with what is `new` in each from its place `at` (R,) of `axis` on."""
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    return jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)(rows, new, at)
