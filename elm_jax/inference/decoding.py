"""Generation's programs: prompts into a cache, and tokens out of it, for rows that come and go.

Rows and the pool of prefixes are donated: they are written in place.

A prompt with its answers, G of each in a run, is a group: keys and values of the prompt are kept, and read, once for
all of them. Token p of a prompt, or of an answer, has place p of its row in keys and values: what a row has beyond its
length is never seen. A layer with a recurrence has one state for all tokens of a row up to its length.

A groups, B = A G rows that generate, R groups that begin, T tokens of a prompt (behind its prefix), P places of a
prefix, S places of a row, K key/value heads, d head size, L layers, V vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.inference.cache import Cache, Tokens, behind_past, by_token, enlarged, spread, stored, with_token
from elm_jax.inference.sampling import Sampling, draw
from elm_jax.models.attention import attend_in_groups
from elm_jax.models.decoder import Decoder, Layer, Window
from elm_jax.models.decoder_layer import Rotary
from elm_jax.models.delta import Chains, Recurrent
from elm_jax.models.hints import Placement, hint, placed, platform
from elm_jax.models.stack import Parts, gathered, taken

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


Kept = tuple[Cache, Cache] | list[tuple[Any, Any]]  # of prompts and of answers: stacked, or the part of each layer


class Rows(NamedTuple):
    """Conversations that go on; each but the caches and `length` has a leading axis of B."""

    prompts: Cache
    answers: Cache
    length: jax.Array  # (A,) tokens of the prompt
    last: jax.Array  # the token drawn last, which is not in the cache yet
    left: jax.Array  # tokens that may still be drawn; 0: the row has ended, or never began
    number: jax.Array  # what is drawn depends on it
    drawn: jax.Array  # tokens drawn so far
    seen: jax.Array | None  # (B, V) bool: tokens of prompt and answer; None without a repetition penalty


class Drawn(NamedTuple):
    """Tokens, and their log probabilities as `draw` has them, float32."""

    tokens: jax.Array
    log_probs: jax.Array


_Carry = tuple[jax.Array, jax.Array, Any, Kept, Drawn]  # of `decode`: steps, idle tokens, rows, caches, what was drawn


class Prompts(NamedTuple):
    """R prompts that begin: each is a prefix that is known and what comes after it."""

    x: Array  # (R, T, D) embeddings, padded on the right
    lengths: Array  # (R,) tokens of x; 0: no prompt
    before: Array  # (R,) tokens of the prefix


class Start(NamedTuple):
    """How R groups begin; each has a leading axis of R."""

    slot: Array  # their places among the A; A: nowhere
    left: Array
    number: Array  # (R, G)
    seen: Array | None  # (R, V)


@program(static=("rows", "places", "dtype", "axis"))
def make_cache(llm: Decoder, rows: int, places: int, dtype: jax.typing.DTypeLike, axis: str | None) -> Cache:
    """A cache of zeros, laid over the mesh as `spread` says.

    (What is never written must be finite: its weight is zero, and zero times NaN is not.)
    """
    c = llm.config
    shape, recurrent = (len(c.layers_with("attention")), rows, c.kv_heads), len(c.layers_with("delta"))
    keys, values = jnp.zeros((*shape, places, c.head_dim), dtype), jnp.zeros((*shape, c.head_dim, places), dtype)
    delta = Recurrent.empty(c.delta, (recurrent, rows), dtype) if c.delta and recurrent else None
    return spread(Cache(Tokens(keys, values), delta), axis)


@program(static=("places", "axis"))
def enlarge_cache(llm: Decoder, cache: Cache, places: int, axis: str | None) -> Cache:
    """The cache with S = `places`, which is more than it had."""
    return spread(enlarged(cache, places), axis)


def empty_rows(prompts: Cache, answers: Cache, vocabulary: int | None) -> Rows:
    """Rows that have not begun. `vocabulary`: V where there is a repetition penalty."""
    groups, count = (cache.attention.keys.shape[1] for cache in (prompts, answers))
    last, left, number, drawn = (jnp.zeros(count, jnp.int32) for _ in range(4))
    seen = None if vocabulary is None else jnp.zeros((count, vocabulary), bool)
    return Rows(prompts._replace(delta=None), answers, jnp.zeros(groups, jnp.int32), last, left, number, drawn, seen)


def _prefixes(pool: Cache | None, source: Array) -> Cache | None:
    """Rows `source` (R,) of the pool, S = P, for prompts that begin with them."""
    return None if pool is None else spread(jax.tree.map(lambda x: x[:, source], pool), "batch")


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
        attended = llm.attend(q, *by_token(behind_past(past.get("attention"), own)), masks[window], "xla")
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
        seen = by_token(behind_past(past.get("attention"), own))
        attended = llm.attend(at(q, 1), *seen, at(masks[window], 2), "xla")
        return layer.combine(at(x, 1), attended, None if gate is None else at(gate, 1)), {"attention": own}

    x, made = llm.scan_layers(body, x, known, last)
    return (at(x, 1) if x.shape[1] > 1 else x), Cache(**made)


def _projected(layer: Layer, x: jax.Array, rotary: Rotary | None) -> tuple[jax.Array, Tokens, jax.Array | None]:
    """x (R, T, D) -> queries (R, T, H, d), keys and values as a cache has them, and the gate of what is attended to."""
    q, k, v, gate = layer.project(x, rotary)
    return q, Tokens(jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 3)), gate


@program(static=("behind",), donate=("pool",))
def cache_prefixes(
    llm: Decoder, pool: Cache, prompts: Prompts, source: Array, slot: Array, behind: bool
) -> Cache:
    """The pool with the keys and values of `prompts` in its rows `slot` (R,), behind its rows `source` (R,).

    With behind=False there is nothing before them.
    """
    prefix = _prefixes(pool, source) if behind else None
    _, own = prefill(llm, prompts, prefix)
    return spread(stored(pool, own, prefix, prompts.before, slot), None)


@program(donate=("rows",))
def prefill_and_sample(
    llm: Decoder, rows: Rows, pool: Cache | None, prompts: Prompts, source: Array, start: Start, sampling: Sampling,
    ends: jax.Array,
) -> tuple[Rows, Drawn]:  # fmt: skip
    """Rows with new groups in some places, and the first token (R G,) of each of their answers; -1: there is none.

    Before prompts stand the pool's rows `source` (R,); pool None: no prompt has a prefix.
    """
    prefix, answers = _prefixes(pool, source), start.number.shape[1]
    x, own = prefill(llm, prompts, prefix, jnp.maximum(prompts.lengths - 1, 0))
    each = partial(jnp.repeat, repeats=answers, axis=0)  # (R, ...) -> (R G, ...)
    logits, number = each(llm.logits(llm.final(x))[:, 0]), start.number.reshape(-1)
    seen = None if start.seen is None else each(start.seen)
    token, log_prob = draw(logits, sampling, number, jnp.zeros_like(number), seen)
    begun = each(prompts.lengths) > 0
    token = jnp.where(begun, token, NONE)
    left = jnp.where(begun & ~jnp.isin(token, ends), each(start.left) - 1, 0)
    slot = (start.slot[:, None] * answers + jnp.arange(answers)).reshape(-1)

    def put(old: jax.Array, new: jax.Array, slot: jax.Array = slot) -> jax.Array:
        return hint(old.at[slot].set(new, mode="drop"), "batch", *(None,) * (old.ndim - 1))

    fork = partial(jax.tree.map, lambda old, new: old.at[:, slot].set(jnp.repeat(new, answers, axis=1), mode="drop"))
    rows = Rows(
        prompts=spread(stored(rows.prompts, own, prefix, prompts.before, start.slot), "batch"),
        answers=spread(rows.answers._replace(delta=fork(rows.answers.delta, own.delta)), "batch"),
        length=put(rows.length, prompts.before + prompts.lengths, start.slot),
        last=put(rows.last, token),
        left=put(rows.left, left),
        number=put(rows.number, number),
        drawn=put(rows.drawn, jnp.ones_like(left)),
        seen=None if rows.seen is None or seen is None else put(rows.seen, _marked(seen, token)),
    )
    return rows, Drawn(hint(token, None), hint(log_prob, None))


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
) -> tuple[Rows, Drawn]:
    """Draw up to `limit` <= `room` tokens a row -> rows, tokens (B, room). What a row did not draw is -1.

    It ends early once groups have stood idle for `patience` tokens, those of their rows taken together. `dtype`: of the
    embeddings.
    """
    kept: Kept = rows.prompts, rows.answers
    if not llm.scan or platform() == "cpu":
        # A slice of a stacked array is a copy there: it is made here, and not for every token.
        tables = [[taken(llm.config, cache.parts, i) for cache in kept] for i in range(llm.config.layers)]
        kept = [(prompt.get("attention"), *own.values()) for prompt, own in tables]
        llm = llm.unstacked()
    each, places = len(rows.left) // len(rows.length), (rows.prompts.places, rows.answers.places)

    def goes_on(carry: _Carry) -> jax.Array:
        step, idle, rows, *_ = carry
        return (step < limit) & (rows.left > 0).any() & (idle < patience)

    def advance(carry: _Carry) -> _Carry:
        step, idle, rows, kept, output = carry
        logits, kept = _next_logits(llm, rows, kept, places, dtype)
        token, log_prob = draw(logits, sampling, rows.number, rows.drawn, rows.seen)
        busy = rows.left > 0
        token = jnp.where(busy, token, NONE)
        rows = rows._replace(
            last=token,
            left=jnp.where(busy & ~jnp.isin(token, ends), rows.left - 1, 0),
            drawn=rows.drawn + busy.astype(jnp.int32),
            seen=None if rows.seen is None else _marked(rows.seen, token),
        )
        idle += each * (rows.left.reshape(-1, each) == 0).all(1).sum(dtype=jnp.int32)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=1)
        return step + 1, idle, rows, kept, Drawn(put(output.tokens, token), put(output.log_probs, log_prob))

    output = Drawn(*(jnp.full((len(rows.left), room), NONE, kind) for kind in (jnp.int32, jnp.float32)))
    begun = jnp.int32(0), jnp.int32(0), rows._replace(prompts=None, answers=None), kept, output
    _, _, ended, kept, output = jax.lax.while_loop(goes_on, advance, begun)
    if isinstance(kept, list):
        names = {Tokens: "attention", Recurrent: "delta"}
        answers = Cache(**gathered({names[type(own)]: own} for _, own in kept))
    else:
        answers = kept[1]
    rows = ended._replace(prompts=rows.prompts, answers=spread(answers, "batch"))
    return rows, Drawn(*(hint(x, None, None) for x in output))


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


def _next_logits(
    llm: Decoder, rows: Rows, kept: Kept, places: tuple[int, int], dtype: jax.typing.DTypeLike | None
) -> tuple[jax.Array, Kept]:
    """Logits (B, V) behind the last token of each row, and the caches, of `places`, with that token in them."""
    count, place = jnp.arange(len(rows.left)), jnp.maximum(rows.drawn - 1, 0)
    length = jnp.repeat(rows.length, len(count) // len(rows.length))[:, None]
    prompt, own = (jnp.broadcast_to(jnp.arange(room), (len(count), room)) for room in places)
    mask = jnp.concatenate([prompt < length, own <= place[:, None]], 1)[:, None, None]
    positions = length + place[:, None]
    masks = llm.masks(mask, positions, jnp.concatenate([prompt, length + own], 1))
    x = llm.placed(llm.embed(jnp.maximum(rows.last, 0)[:, None], dtype), positions)
    rotary, delta = llm.rotary(positions), llm.config.delta
    chains = None if delta is None else Chains.behind_past(jnp.ones((len(count), 1), bool), delta.taps)

    def body(
        layer: Layer, window: Window, carry: tuple[jax.Array, Kept], number: Parts
    ) -> tuple[tuple[jax.Array, Kept], Parts]:
        # The caches travel in the carry, where that of the answers is written in place; as inputs and outputs of the
        # scan it would be copied whole for every token.
        x, kept = carry
        if isinstance(kept, list):  # this layer's are the first
            (prompt, own), *others = kept
            if isinstance(own, Recurrent):
                x, own = layer.recur(x, chains, own)
            else:
                q, k, v, gate = layer.project(x, rotary[window])
                own = with_token(own, (count,), place, k, v)
                x = layer.combine(x, attend(q, prompt, own, masks[window]), gate)
            return (x, [*others, (prompt, own)]), {}
        prompts, answers = kept
        if layer.attention is None:
            index, own = number["delta"], answers.delta
            x, new = layer.recur(x, chains, jax.tree.map(lambda x: x[index], own))
            answers = answers._replace(delta=jax.tree.map(lambda x, new: x.at[index].set(new), own, new))
            return (x, (prompts, answers)), {}
        index = number["attention"]
        q, k, v, gate = layer.project(x, rotary[window])
        own = with_token(answers.attention, (index, count), place, k, v)
        attended = attend(q, prompts.attention.layer(index), own.layer(index), masks[window])
        return (layer.combine(x, attended, gate), (prompts, answers._replace(attention=own))), {}

    attend = partial(attend_in_groups, scale=llm.scale, softcap=llm.config.attention_cap)
    parts = {} if isinstance(kept, list) else kept[1].parts
    numbers = {name: jnp.arange(len(jax.tree.leaves(part)[0])) for name, part in parts.items()}
    (x, kept), _ = llm.scan_layers(body, (x, kept), numbers)
    return llm.logits(llm.final(x))[:, 0], kept


def _marked(seen: jax.Array, token: jax.Array) -> jax.Array:
    """`seen` (B, V) with the tokens (B,) of rows that drew one."""
    return seen.at[jnp.arange(len(token)), jnp.where(token < 0, seen.shape[1], token)].set(True, mode="drop")
