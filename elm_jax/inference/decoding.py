"""Generation's programs: prompts into a cache, and tokens out of it, for rows that come and go.

Rows and the pool of prefixes are donated: they are written in place.

Token p of a conversation has place p of its row in the keys and values: what a row has beyond its length is never seen.
A layer with a recurrence has one state for all tokens of a row up to its length.

B rows that generate, R rows that begin, T tokens of a prompt (behind its prefix), P places of a prefix, S places of a
row, K key/value heads, d head size, L layers, V vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.inference.cache import TOKENS, Cache, Tokens
from elm_jax.inference.sampling import Sampling, draw
from elm_jax.models.decoder import Decoder, Layer, Window
from elm_jax.models.decoder_layer import Rotary
from elm_jax.models.delta import Chains, Recurrent
from elm_jax.models.hints import Placement, hint, placed
from elm_jax.models.stack import Parts

NONE = -1  # where there is no token
ENDLESS = 2**31 - 1  # patience: rows may stand idle until all have ended
Array = Any  # of JAX, or of NumPy on the host
P = ParamSpec("P")
R = TypeVar("R")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Model:
    """A decoder, split once, and where it lies: what programs are given."""

    graph: nnx.GraphDef = field(metadata={"static": True})
    state: nnx.State
    placement: Placement | None = field(metadata={"static": True})


def program(
    static: Sequence[str] = (), donate: Sequence[str] = ()
) -> Callable[[Callable[Concatenate[Decoder, P], R]], Callable[Concatenate[Model, P], R]]:
    """Compiles a function of a decoder as one of a `Model`; its `static` and donated arguments by their names."""

    def compiled(function: Callable[Concatenate[Decoder, P], R]) -> Callable[Concatenate[Model, P], R]:
        @wraps(function)
        def run(model: Model, *args: P.args, **kwargs: P.kwargs) -> R:
            with placed(model.placement):
                return function(nnx.merge(model.graph, model.state), *args, **kwargs)

        return jax.jit(run, static_argnames=static, donate_argnames=donate, inline=True)

    return compiled


class Rows(NamedTuple):
    """Conversations that go on; each but the cache has a leading axis of B."""

    cache: Cache
    length: jax.Array  # tokens in the cache
    last: jax.Array  # the token drawn last, which is not in the cache yet
    left: jax.Array  # tokens that may still be drawn; 0: the row has ended, or never began
    number: jax.Array  # of the prompt
    drawn: jax.Array  # tokens drawn so far
    seen: jax.Array | None  # (B, V) bool: tokens of prompt and answer; None without a repetition penalty


class Prompts(NamedTuple):
    """R prompts that begin: each is a prefix that is known and what comes after it."""

    x: Array  # (R, T, D) embeddings, padded on the right
    lengths: Array  # (R,) tokens of x; 0: no prompt
    before: Array  # (R,) tokens of the prefix


class Start(NamedTuple):
    """How R rows begin; each has a leading axis of R."""

    slot: Array  # their places among the B; B: nowhere
    left: Array
    number: Array
    seen: Array | None  # (R, V)


@program(static=("rows", "places", "dtype", "axis"))
def make_cache(llm: Decoder, rows: int, places: int, dtype: jax.typing.DTypeLike, axis: str | None) -> Cache:
    """A cache of zeros, laid over the mesh as `_spread` says.

    (What is never written must be finite: its weight is zero, and zero times NaN is not.)
    """
    c = llm.config
    shape, recurrent = (len(c.layers_with("attention")), rows, c.kv_heads), len(c.layers_with("delta"))
    keys, values = jnp.zeros((*shape, places, c.head_dim), dtype), jnp.zeros((*shape, c.head_dim, places), dtype)
    delta = Recurrent.empty(c.delta, (recurrent, rows), dtype) if c.delta and recurrent else None
    return _spread(Cache(Tokens(keys, values), delta), axis)


@program(static=("places", "axis"))
def enlarge_cache(llm: Decoder, cache: Cache, places: int, axis: str | None) -> Cache:
    """The cache with S = `places`, which is more than it had."""
    tokens = Tokens(*(_enlarged(x, places, along) for x, along in zip(cache.attention, TOKENS, strict=True)))
    return _spread(cache._replace(attention=tokens), axis)


def empty_rows(cache: Cache, vocabulary: int | None) -> Rows:
    """Rows that have not begun. `vocabulary`: V where there is a repetition penalty."""
    count = cache.attention.keys.shape[1]
    length, last, left, number, drawn = (jnp.zeros(count, jnp.int32) for _ in range(5))
    seen = None if vocabulary is None else jnp.zeros((count, vocabulary), bool)
    return Rows(cache, length, last, left, number, drawn, seen)


def _spread(cache: Cache, axis: str | None) -> Cache:
    """The cache laid over the mesh: rows by the logical `axis` (None: whole everywhere), heads as the model's."""
    tokens = Tokens(*(hint(x, None, axis, "kv_heads", None, None) for x in cache.attention))
    if cache.delta is None:
        return Cache(tokens)
    inputs, state = cache.delta
    return Cache(tokens, Recurrent(hint(inputs, None, axis, None, None), hint(state, None, axis, "heads", None, None)))


def _prefixes(pool: Cache | None, source: Array) -> Cache | None:
    """Rows `source` (R,) of the pool, S = P, for prompts that begin with them."""
    return None if pool is None else _spread(jax.tree.map(lambda x: x[:, source], pool), "batch")


def prefill(
    llm: Decoder, prompts: Prompts, prefix: Cache | None, wanted: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """States (R, T, D) before the final norm, and the keys and values (S = T), of prompts behind prefixes.

    `prefix` (S = P); None: no prompt has one. `wanted` (R,): only the state at this place, (R, 1, D).
    Attention is always the reference path: scores must not rest on a kernel that nobody has tried on these shapes.
    """
    count, room = prompts.x.shape[1], 0 if prefix is None else prefix.places
    index, before = jnp.arange(count), prompts.before[:, None]
    # Padding stands at the place of the last token: learned positions may end there.
    positions = before + jnp.minimum(index, jnp.maximum(prompts.lengths - 1, 0)[:, None])
    places = jnp.broadcast_to(jnp.arange(room), (len(positions), room))
    past = jnp.broadcast_to((places < before)[:, None], (len(positions), count, room))
    own = jnp.broadcast_to(index[:, None] >= index, (len(positions), count, count))
    mask = jnp.concatenate([past, own], -1)[:, None]
    masks = llm.masks(mask, positions, jnp.concatenate([places, positions], 1))
    x, rotary = llm.placed(hint(prompts.x, "batch", None, None), positions), llm.rotary(positions)
    delta, known = llm.config.delta, {} if prefix is None else prefix.parts
    chains = None if delta is None else Chains.behind_past(index < prompts.lengths[:, None], delta.taps)
    if "delta" in known:  # a prompt without a prefix has any row of the pool
        begun = prompts.before > 0
        known["delta"] = jax.tree.map(
            lambda x: jnp.where(begun[(None, slice(None), *[None] * (x.ndim - 2))], x, 0), known["delta"]
        )

    def body(layer: Layer, window: Window, x: jax.Array, past: Parts) -> tuple[jax.Array, Parts]:
        if layer.attention is None:
            x, kept = layer.recur(x, chains, past.get("delta"))
            return x, {"delta": kept}
        q, own, gate = _projected(layer, x, rotary[window])
        attended = llm.attend(q, *_by_token(_behind(past.get("attention"), own)), masks[window], "xla")
        return layer.combine(x, attended, gate), {"attention": own}

    if wanted is None:
        x, made = llm.scan_layers(body, x, known)
        return x, Cache(**made)

    def at(x: jax.Array, axis: int) -> jax.Array:
        return jnp.take_along_axis(x, jnp.expand_dims(wanted, [i for i in range(x.ndim) if i]), axis)

    def last(layer: Layer, window: Window, x: jax.Array, past: Parts) -> tuple[jax.Array, Parts]:
        """All of the last layer that is wanted: its keys and values, and one token's attention and MLP."""
        if layer.attention is None:
            return body(layer, window, x, past)
        q, own, gate = _projected(layer, x, rotary[window])
        seen = _by_token(_behind(past.get("attention"), own))
        attended = llm.attend(at(q, 1), *seen, at(masks[window], 2), "xla")
        return layer.combine(at(x, 1), attended, None if gate is None else at(gate, 1)), {"attention": own}

    x, made = llm.scan_layers(body, x, known, last)
    return (at(x, 1) if x.shape[1] > 1 else x), Cache(**made)


def _projected(layer: Layer, x: jax.Array, rotary: Rotary | None) -> tuple[jax.Array, Tokens, jax.Array | None]:
    """x (R, T, D) -> queries (R, T, H, d), keys and values as a cache has them, and the gate of what is attended to."""
    q, k, v, gate = layer.project(x, rotary)
    return q, Tokens(jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 3)), gate


def _by_token(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values (B, S, K, d), as `attend` takes them."""
    return jnp.moveaxis(tokens.keys, 2, 1), jnp.moveaxis(tokens.values, 3, 1)


def _behind(past: Tokens | None, own: Tokens) -> Tokens:
    """The keys and values of all that a prompt sees."""
    return own if past is None else Tokens(*map(jnp.concatenate, zip(past, own, strict=True), TOKENS))


@program(static=("behind",), donate=("pool",))
def cache_prefixes(
    llm: Decoder, pool: Cache, prompts: Prompts, source: Array, slot: Array, behind: bool
) -> Cache:
    """The pool with the keys and values of `prompts` in its rows `slot` (R,), behind its rows `source` (R,).

    With behind=False there is nothing before them.
    """
    prefix = _prefixes(pool, source) if behind else None
    _, own = prefill(llm, prompts, prefix)
    return _spread(_stored(pool, own, prefix, prompts.before, slot), None)


@program(donate=("rows",))
def prefill_and_sample(
    llm: Decoder, rows: Rows, pool: Cache | None, prompts: Prompts, source: Array, start: Start, sampling: Sampling,
    ends: jax.Array,
) -> tuple[Rows, jax.Array]:  # fmt: skip
    """Rows with new prompts in some places, and the first token (R,) of each of these; -1 where there is no prompt.

    Before prompts stand the pool's rows `source` (R,); pool None: no prompt has a prefix.
    """
    prefix = _prefixes(pool, source)
    x, own = prefill(llm, prompts, prefix, jnp.maximum(prompts.lengths - 1, 0))
    logits = llm.logits(llm.final(x))[:, 0]
    token = draw(logits, sampling, start.number, jnp.zeros_like(start.number), start.seen)
    begun = prompts.lengths > 0
    token = jnp.where(begun, token, NONE)
    left = jnp.where(begun & ~jnp.isin(token, ends), start.left - 1, 0)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return hint(old.at[start.slot].set(new, mode="drop"), "batch", *(None,) * (old.ndim - 1))

    seen = None
    if rows.seen is not None and start.seen is not None:
        seen = put(rows.seen, _marked(start.seen, token))
    rows = Rows(
        cache=_spread(_stored(rows.cache, own, prefix, prompts.before, start.slot), "batch"),
        length=put(rows.length, prompts.before + prompts.lengths),
        last=put(rows.last, token),
        left=put(rows.left, left),
        number=put(rows.number, start.number),
        drawn=put(rows.drawn, jnp.ones_like(left)),
        seen=seen,
    )
    return rows, hint(token, None)


@program(static=("room", "dtype"), donate=("rows",))
def decode(
    llm: Decoder,
    rows: Rows,
    sampling: Sampling,
    ends: jax.Array,
    room: int,
    limit: jax.Array | int,
    patience: jax.Array | int,
    dtype: jax.typing.DTypeLike | None,
) -> tuple[Rows, jax.Array]:
    """Draw up to `limit` <= `room` tokens a row -> rows, tokens (B, room). What a row did not draw is -1.

    It ends early once rows have stood idle for `patience` tokens, all of them taken together. `dtype`: of the
    embeddings.
    """

    def goes_on(carry: tuple[jax.Array, jax.Array, Rows, jax.Array]) -> jax.Array:
        step, idle, rows, _ = carry
        return (step < limit) & (rows.left > 0).any() & (idle < patience)

    def advance(
        carry: tuple[jax.Array, jax.Array, Rows, jax.Array],
    ) -> tuple[jax.Array, jax.Array, Rows, jax.Array]:
        step, idle, rows, output = carry
        logits, cache = _next_logits(llm, rows, dtype)
        token = draw(logits, sampling, rows.number, rows.drawn, rows.seen)
        busy = rows.left > 0
        token = jnp.where(busy, token, NONE)
        moved = busy.astype(jnp.int32)
        rows = Rows(
            cache=cache,
            length=rows.length + moved,
            last=token,
            left=jnp.where(busy & ~jnp.isin(token, ends), rows.left - 1, 0),
            number=rows.number,
            drawn=rows.drawn + moved,
            seen=None if rows.seen is None else _marked(rows.seen, token),
        )
        idle += (rows.left == 0).sum(dtype=jnp.int32)
        return step + 1, idle, rows, jax.lax.dynamic_update_index_in_dim(output, token, step, axis=1)

    output = jnp.full((len(rows.left), room), NONE, jnp.int32)
    _, _, rows, output = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), jnp.int32(0), rows, output))
    return rows._replace(cache=_spread(rows.cache, "batch")), hint(output, None, None)


@program()
def score(
    llm: Decoder, pool: Cache | None, prompts: Prompts, source: Array, ids: Array, counted: Array
) -> jax.Array:
    """(R,): the sum of the log probabilities of the tokens that follow the prompts' places, where `counted` (R, T).

    `ids` (R, T): what comes after each place. Prefixes as in `prefill_and_sample`.
    """
    x, _ = prefill(llm, prompts, _prefixes(pool, source))
    x = llm.final(x)

    def at(place: jax.Array) -> jax.Array:  # one place at a time: logits of all of them would not fit
        logits = jax.nn.log_softmax(llm.logits(x[:, place]), axis=-1)
        return jnp.take_along_axis(logits, ids[:, place, None], 1)[:, 0]

    found = jax.lax.map(at, jnp.arange(x.shape[1]))  # (T, R)
    return hint(jnp.where(counted, found.T, 0.0).sum(1), None)


def _next_logits(llm: Decoder, rows: Rows, dtype: jax.typing.DTypeLike | None) -> tuple[jax.Array, Cache]:
    """Logits (B, V) behind the last token of each row, and the cache with that token in it."""
    positions, count = rows.length[:, None], jnp.arange(len(rows.length))
    places = jnp.broadcast_to(jnp.arange(rows.cache.places), (len(count), rows.cache.places))
    masks = llm.masks((places <= positions)[:, None, None], positions, places)
    x = llm.placed(llm.embed(jnp.maximum(rows.last, 0)[:, None], dtype), positions)
    rotary, delta = llm.rotary(positions), llm.config.delta
    chains = None if delta is None else Chains.behind_past(jnp.ones((len(count), 1), bool), delta.taps)

    def body(
        layer: Layer, window: Window, carry: tuple[jax.Array, Cache], own: Parts
    ) -> tuple[tuple[jax.Array, Cache], Parts]:
        # The caches travel in the carry, where they are written in place; as inputs and outputs of the scan
        # they would be copied whole for every token.
        x, cache = carry
        if layer.attention is None:
            index, kept = own["delta"], cache.delta
            x, new = layer.recur(x, chains, jax.tree.map(lambda x: x[index], kept))
            return (x, cache._replace(delta=jax.tree.map(lambda x, new: x.at[index].set(new), kept, new))), {}
        index, (keys, values) = own["attention"], cache.attention
        q, k, v, gate = layer.project(x, rotary[window])
        keys = keys.at[index, count, :, rows.length].set(k[:, 0])
        values = values.at[index, count, :, :, rows.length].set(v[:, 0])
        attended = llm.attend(q, *_by_token(Tokens(keys[index], values[index])), masks[window], "xla")
        return (layer.combine(x, attended, gate), cache._replace(attention=Tokens(keys, values))), {}

    numbers = {name: jnp.arange(len(jax.tree.leaves(part)[0])) for name, part in rows.cache.parts.items()}
    (x, cache), _ = llm.scan_layers(body, (x, rows.cache), numbers)
    return llm.logits(llm.final(x))[:, 0], cache


def _stored(cache: Cache, own: Cache, prefix: Cache | None, before: jax.Array, slot: jax.Array) -> Cache:
    """The cache with prefixes, cut to `before` (R,) tokens, and what comes after them in its rows `slot` (R,)."""

    def laid(prefix: jax.Array | None, own: jax.Array, axis: int) -> jax.Array:
        known, room = (own, 0) if prefix is None else (prefix, min(prefix.shape[axis], cache.places))
        kept = jax.lax.slice_in_dim(known, 0, room, axis=axis)
        return _written(_enlarged(kept, cache.places, axis), own, before, axis)

    before_them = (None, None) if prefix is None else prefix.attention
    each = zip(cache.attention, before_them, own.attention, TOKENS, strict=True)
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


def _marked(seen: jax.Array, token: jax.Array) -> jax.Array:
    """`seen` (B, V) with the tokens (B,) of rows that drew one."""
    return seen.at[jnp.arange(len(token)), jnp.where(token < 0, seen.shape[1], token)].set(True, mode="drop")
