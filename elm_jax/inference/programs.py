"""The programs of `decoding`, compiled: a split model and its placement, and arrays.

Rows and the pool of prefixes are donated: they are written in place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from elm_jax.inference import decoding
from elm_jax.inference.decoding import Cache, Prompts, Rows, Start
from elm_jax.inference.sampling import Sampling
from elm_jax.models import hints

Host = np.ndarray | jax.Array


class Model(NamedTuple):
    """A decoder, split once, and where it lies."""

    graph: nnx.GraphDef
    state: nnx.State
    placement: hints.Placement | None


def make_cache(model: Model, rows: int, places: int, dtype: Any, axis: str | None) -> Cache:
    """An empty cache on the mesh; its rows along the logical `axis`."""
    return _make_cache(model.graph, model.state, rows, places, dtype, axis, model.placement)


def longer(model: Model, cache: Cache, places: int, axis: str | None) -> Cache:
    """The cache with room for so many places."""
    return _longer(cache, places, axis, model.placement)


def remember(model: Model, pool: Cache, prompts: Prompts, source: Host, slot: Host, behind: bool) -> Cache:
    """`decoding.remember`; prefixes are the pool's rows `source` (R,), or with behind=False there are none."""
    return _remember(model.graph, model.state, pool, prompts, source, slot, behind, model.placement)


def begin(
    model: Model, rows: Rows, pool: Cache | None, prompts: Prompts, source: Host, start: Start, sampling: Sampling,
    ends: jax.Array,
) -> tuple[Rows, jax.Array]:  # fmt: skip
    """`decoding.begin`; prefixes are the pool's rows `source` (R,)."""
    return _begin(model.graph, model.state, rows, pool, prompts, source, start, sampling, ends, model.placement)


def go_on(
    model: Model, rows: Rows, sampling: Sampling, ends: jax.Array, room: int, limit: int, patience: int, dtype: Any
) -> tuple[Rows, jax.Array]:
    """`decoding.go_on`."""
    return _go_on(model.graph, model.state, rows, sampling, ends, room, limit, patience, dtype, model.placement)


def score(model: Model, pool: Cache | None, prompts: Prompts, source: Host, ids: Host, told: Host) -> jax.Array:
    """`decoding.log_probabilities`; prefixes are the pool's rows `source` (R,)."""
    return _score(model.graph, model.state, pool, prompts, source, ids, told, model.placement)


_STATIC = ("graph", "placement")


@partial(jax.jit, static_argnames=(*_STATIC, "rows", "places", "dtype", "axis"))
def _make_cache(
    graph: Any, state: Any, rows: int, places: int, dtype: Any, axis: str | None, placement: Any
) -> Cache:
    with hints.placed(placement):
        return decoding.spread(decoding.empty_cache(nnx.merge(graph, state), rows, places, dtype), axis)


@partial(jax.jit, static_argnames=("places", "axis", "placement"))
def _longer(cache: Cache, places: int, axis: str | None, placement: Any) -> Cache:
    with hints.placed(placement):
        return decoding.spread(decoding.longer(cache, places), axis)


@partial(jax.jit, static_argnames=(*_STATIC, "behind"), donate_argnames=("pool",))
def _remember(
    graph: Any, state: Any, pool: Cache, prompts: Prompts, source: Any, slot: Any, behind: bool, placement: Any
) -> Cache:
    with hints.placed(placement):
        prefix = decoding.taken(pool, source) if behind else None
        return decoding.remember(nnx.merge(graph, state), pool, prompts, prefix, slot)


@partial(jax.jit, static_argnames=_STATIC, donate_argnames=("rows",))
def _begin(
    graph: Any, state: Any, rows: Rows, pool: Cache | None, prompts: Prompts, source: Any, start: Start,
    sampling: Sampling, ends: jax.Array, placement: Any,
) -> tuple[Rows, jax.Array]:  # fmt: skip
    with hints.placed(placement):
        prefix = None if pool is None else decoding.taken(pool, source)
        return decoding.begin(nnx.merge(graph, state), rows, prompts, prefix, start, sampling, ends)


@partial(jax.jit, static_argnames=(*_STATIC, "room", "dtype"), donate_argnames=("rows",))
def _go_on(
    graph: Any, state: Any, rows: Rows, sampling: Sampling, ends: jax.Array, room: int, limit: Any, patience: Any,
    dtype: Any, placement: Any,
) -> tuple[Rows, jax.Array]:  # fmt: skip
    with hints.placed(placement):
        return decoding.go_on(nnx.merge(graph, state), rows, sampling, ends, room, limit, patience, dtype)


@partial(jax.jit, static_argnames=_STATIC)
def _score(
    graph: Any, state: Any, pool: Cache | None, prompts: Prompts, source: Any, ids: Any, told: Any, placement: Any
) -> jax.Array:
    with hints.placed(placement):
        prefix = None if pool is None else decoding.taken(pool, source)
        return decoding.log_probabilities(nnx.merge(graph, state), prompts, prefix, ids, told)
