"""Arrays in folders of their own: those that a run inherited or compares with, and each item of a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_utils

from elm_jax.errors import UserError, one_line
from elm_jax.models.functional import Arrays
from elm_jax.run import verification
from elm_jax.run.fingerprints import summaries
from elm_jax.runtime import distributed


def save_arrays(folder: Path, arrays: Arrays) -> None:
    """Save arrays once, in a folder of their own that must not exist; whole and verified, or not at all. All processes
    call it together.

    Raises:
        UserError: they cannot be written, or do not come back as they are.
    """
    fresh = folder.with_name(f"{folder.name}.tmp")
    if jax.process_index() == 0:
        shutil.rmtree(fresh, ignore_errors=True)
    distributed.gather(None)  # nothing is in the way
    item = folder.name  # the library's processes wait for each other by it
    sums, problem = sums_of({item: arrays}), ""
    try:
        with ocp.StandardCheckpointer() as library:
            library.save((fresh / item).absolute(), arrays)
    except Exception as error:  # the others wait inside the library, until they hear that this process ends
        raise _not_saved(folder, said(error)) from error
    try:
        own = verification.own_checksums(fresh / item)
        problem = verification.wrong_array(fresh, sums)
        if not problem:
            verification.write_list(fresh / item, own)
    except Exception as error:
        problem = said(error)
    if problem := verification.first(distributed.gather(problem)):
        raise _not_saved(folder, problem)
    if jax.process_index() == 0:
        (fresh / item).rename(folder)
        fresh.rmdir()
    distributed.gather(None)  # it is in its place


def _not_saved(folder: Path, problem: str) -> UserError:
    return UserError(
        str(folder), f"arrays that could not be saved: {problem}", "a disk with room that keeps what it is given",
        "make room and run the same command again",
    )  # fmt: skip


class SavedArrays:
    """The arrays in a folder that `save_arrays` or a verified checkpoint left, each read when it is asked for. All
    processes make it together.

    Raises:
        UserError: the folder cannot be read, or is not as `save_arrays` left it.
    """

    def __init__(self, folder: Path) -> None:
        verification.check_files(folder)
        self.where, self.folder = str(folder), folder.absolute()
        with ocp.PyTreeCheckpointer() as checkpointer, named(folder):
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
        with ocp.PyTreeCheckpointer() as checkpointer, named(self.folder):
            return checkpointer.restore(self.folder, args)


def sums_of(items: Mapping[str, Any]) -> dict[str, str]:
    """`item/name` of each array -> its `verification.summary`, made on the devices. Names are those on disk."""
    arrays = {
        f"{item}/{'.'.join(path)}": x
        for item, tree in items.items() for path, x in ocp.tree.to_flat_dict(tree).items()
    }  # fmt: skip
    return {name: verification.summary(arrays[name].dtype, found) for name, found in summaries(arrays).items()}


def said(error: Exception) -> str:
    """The beginning of what an error says."""
    text = f"{error.where}: {error.found}" if isinstance(error, UserError) else str(error)
    return one_line(text or type(error).__name__)[:300]


class named:
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
