"""Fingerprints of arrays: a few digits that change with each bit of them, the same on every mesh and on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.models.functional import Arrays

_PRIME, _PIECE = 2654435761, 2**22  # by which places are spread; values that are summed together


def fingerprint(arrays: Mapping[str, jax.Array]) -> str:
    """32 bits that change with the bytes, names or shapes of these arrays; equal on every mesh. Empty if none."""
    return joined(summaries(arrays)) if arrays else ""


def summaries(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """What changes with the bytes or the shape of each array, in 32 bits; equal on every mesh, and on the host."""
    found, by_devices = {}, {}
    for name, x in arrays.items():
        if isinstance(x, np.ndarray):
            found[name] = summary_of(x, x.dtype)
        else:
            by_devices.setdefault(frozenset(x.sharding.device_set), {})[name] = x
    # One program each, and one after the other: fake devices wait for ever where collectives overtake each other.
    for mine in by_devices.values():
        found |= {name: _summary(mine[name].shape, total) for name, total in jax.device_get(_sums(mine)).items()}
    return {name: found[name] for name in arrays}


def summary_of(array: np.ndarray, dtype: Any) -> str:
    """What `joined` takes of one array, as it would be in `dtype`: on the host, a piece at a time."""
    rows = max(1, _PIECE * len(array) // max(1, array.size)) if array.ndim else 1
    pieces = (array[i : i + rows] for i in range(0, len(array), rows)) if array.ndim else iter([array])
    total = place = 0
    for piece in pieces:
        flat = np.ascontiguousarray(piece.astype(dtype, copy=False)).reshape(-1)
        words = flat.view(f"uint{8 * flat.dtype.itemsize}").astype(np.uint32)
        places = np.arange(place, place + len(words), dtype=np.uint64).astype(np.uint32)
        total += int(_mixed(words, places, np.uint32).sum(dtype=np.uint32))
        place += len(words)
    return _summary(array.shape, total & 0xFFFFFFFF)


def _summary(shape: tuple[int, ...], words: Any) -> str:
    return f"{tuple(shape)}:{int(words)}"


def joined(summaries: Mapping[str, str]) -> str:
    """The `fingerprint` of arrays from their summaries."""
    total = 0
    for name in sorted(summaries):
        for byte in f"{name}:{summaries[name]}".encode():
            total = (total * 16777619 ^ byte) & 0xFFFFFFFF
    return f"{total:08x}"


@jax.jit
def _sums(arrays: Arrays) -> dict[str, jax.Array]:
    """Wrapping sum of the words of each array, each mixed with its place."""

    def one(x: jax.Array) -> jax.Array:
        bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return _mixed(words, place, jnp.uint32).sum(dtype=jnp.uint32)

    return {name: one(x) for name, x in arrays.items()}


def _mixed(words: Any, place: Any, uint32: Any) -> Any:
    """Every bit of a word and of its place bears on every bit of this, so that no two changes cancel as signs would."""
    h = words + place * uint32(_PRIME)
    h = (h ^ h >> uint32(16)) * uint32(0x7FEB352D)
    h = (h ^ h >> uint32(15)) * uint32(0x846CA68B)
    return h ^ h >> uint32(16)
