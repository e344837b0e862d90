"""Our own arrays in a safetensors file, which an import writes piece by piece, read straight into their shards.

Neither side ever holds the model: a piece is on its way to the file, or to a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.errors import UserError, some
from elm_jax.weights.safetensors import Safetensors, SafetensorsWriter

FILE = "arrays.safetensors"


def write_arrays(
    path: Path, specs: Mapping[str, jax.ShapeDtypeStruct], pieces: Callable[[str], Iterable[np.ndarray]]
) -> None:
    """Write arrays of these shapes and dtypes; `pieces(name)` are the parts of one in C order, whatever their shape."""
    writer = SafetensorsWriter(path, {name: (np.dtype(spec.dtype), spec.shape) for name, spec in specs.items()})
    for name in specs:
        writer.write_pieces(name, pieces(name))
    writer.close()


def load_arrays(path: Path, like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """All arrays of a file, in the dtypes and places of the entries of `like` that have their names.

    Raises UserError for names or shapes that `like` has not.
    """
    tensors = Safetensors(path)
    unknown = [name for name in tensors if name not in like]
    found = f"arrays unknown to this model: {some(unknown)}" if unknown else ""
    for name in () if unknown else tensors:
        if tensors.info[name].shape != like[name].shape:
            found = f"{name} {list(tensors.info[name].shape)}, here {list(like[name].shape)}"
    if found:
        raise UserError(str(path), found, "a run of the same model", "check config.init_from and the model's keys")

    def placed(name: str) -> jax.Array:
        spec, array = like[name], tensors[name]
        return jax.make_array_from_callback(
            spec.shape, spec.sharding, lambda index: array[index].astype(jnp.dtype(spec.dtype))
        )

    return {name: placed(name) for name in tensors}
