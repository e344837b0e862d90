"""Checkpoints of a run: what is trained, the optimizer, and a JSON of what belongs to the step.

`checkpoints/<step>/` holds the items `trained`, `statistics` (running statistics that move), `optimizer` and
`meta`. Frozen parts are not saved: `meta` holds a fingerprint of them, so that a resume on other weights is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from elm_jax.errors import UserError
from elm_jax.models.functional import Arrays

MODEL_ITEMS = ("trained", "statistics")  # flat dictionaries of the model's arrays
ITEMS = (*MODEL_ITEMS, "optimizer")
_PRIME, _PIECE = 2654435761, 2**22  # of fingerprints: by which places are spread; values that are summed together


class Checkpoints:
    """The checkpoints of one run folder; saving is asynchronous.

    Args:
        folder: the run's folder.
        count: how many of the latest are kept, the best aside.
    """

    def __init__(self, folder: Path, count: int = 1, read_only: bool = False) -> None:
        absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax reports each file, and that read-only is read-only
        self.folder = folder / "checkpoints"
        self._kept = _LatestAndBest(count)
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept, read_only=read_only, create=not read_only
            ),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in ITEMS},
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def save(
        self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any], best: int | None = None
    ) -> None:
        """Begin to save trees of arrays under names of ITEMS; returns once they are copied from the devices.

        `meta` is a JSON object; `best` is the best step so far, whose checkpoint is kept.
        """
        saves: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree}
        names = {name: sorted(items[name]) for name in MODEL_ITEMS if items.get(name)}
        facts = {**meta, "step": step, "best_step": best, "arrays": names}
        saves["meta"] = ocp.args.JsonSave(copy.deepcopy(facts))  # written later, when the caller's has changed
        self._kept.best = best
        self._manager.save(step, args=ocp.args.Composite(**saves), force=True)

    def find(self, which: str = "latest") -> int | None:
        """The step of `latest`, `best` (else latest) or a number; None where the run has none.

        Raises:
            UserError: no checkpoint of that step.
        """
        steps = [s for s in self._manager.all_steps() if (self.folder / str(s) / "meta").is_dir()]
        if not steps:
            return None
        if which == "latest":
            return max(steps)
        if which == "best":
            best = self.meta(max(steps)).get("best_step")
            return best if best in steps else max(steps)
        if not which.isdecimal() or int(which) not in steps:
            raise UserError(
                "--step", repr(which), f"latest, best or one of {sorted(steps)}", "name one of these"
            )
        return int(which)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step."""
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return restored["meta"]

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """The items of a step, laid out as `like` (arrays, or ShapeDtypeStructs with shardings) are.

        Raises:
            UserError: the saved trees have other names or shapes.
        """
        args = {
            n: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for n, tree in like.items() if tree
        }
        with _named(self.folder / str(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] if tree else tree for name, tree in like.items()}

    def items(self, step: int) -> dict[str, Path]:
        """The name of each of the model's arrays that a step has -> the folder of its `SavedArrays`."""
        names = self.meta(step)["arrays"]
        return {name: self.folder / str(step) / item for item in names for name in names[item]}

    def reached_preemption(self, step: int) -> bool:
        """Whether all of several hosts have agreed to stop at this step."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Until what was begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class _LatestAndBest(keep.PreservationPolicy):
    """Keeps the latest `count` checkpoints, and the best. (The library forgets metrics when it is reopened.)"""

    def __init__(self, count: int) -> None:
        self.count = count
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in steps[-self.count :] or step == self.best for step in steps]


def save_arrays(folder: Path, arrays: Arrays) -> None:
    """Save arrays once, in a folder of their own that must not exist; whole or not at all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), arrays)


class SavedArrays:
    """The arrays in a folder that `save_arrays` or a checkpoint left, each read when it is asked for.

    Raises:
        UserError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.where, self.folder = str(folder), folder.absolute()
        with ocp.PyTreeCheckpointer() as checkpointer, _named(folder):
            self._tree = checkpointer.metadata(self.folder).item_metadata.tree
        self.shapes = {name: tuple(entry.shape) for name, entry in self._tree.items()}

    def dtype(self, name: str) -> np.dtype:
        """The one that an array was saved in."""
        return np.dtype(self._tree[name].dtype)

    def arrays(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """These arrays in the host's memory: no device and none of the others is touched."""
        return self._restore({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})

    def place(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> Arrays:
        """These arrays in the dtypes and places that `like` says, which has their shapes."""
        return self._restore(checkpoint_utils.construct_restore_args(dict(like)))

    def _restore(self, how: Mapping[str, Any]) -> dict[str, Any]:
        args = ocp.args.PyTreeRestore({name: self._tree[name] for name in how}, restore_args=how, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer, _named(self.folder):
            return checkpointer.restore(self.folder, args)


def fingerprint(arrays: Mapping[str, jax.Array]) -> str:
    """32 bits that change with the bytes, names or shapes of these arrays; equal on every mesh. Empty if none."""
    return joined(summaries(arrays)) if arrays else ""


def summaries(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """What changes with the bytes or the shape of each array, in 32 bits; equal on every mesh."""
    sums = jax.device_get(_sums(dict(arrays)))
    return {name: _summary(x.shape, sums[name]) for name, x in arrays.items()}


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


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=x.sharding)


class _named:
    """Turn what the checkpoint library says of a misfit into an error that names the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, KeyError, FileNotFoundError)) and not isinstance(error, UserError):
            raise UserError(
                str(self.folder), str(error).split("\n")[0][:200], "a checkpoint of this model",
                "use the run's own config, or another workdir",
            ) from error  # fmt: skip
