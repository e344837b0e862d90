"""What is on disk is what was saved: checksums of the files of a folder, and of the arrays in it.

A list `checksums-<i>-of-<n>.json` has the size and the checksum of each n-th file of its folder; a folder is verified
when all n lists are there. They are written after the arrays were read back and found equal to those on the devices.
Checksums guard against disks, file systems and half copies, not against somebody who writes new ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
import xxhash

from elm_jax import stopping
from elm_jax.errors import UserError, one_line
from elm_jax.folders import seal, sealed, write_json
from elm_jax.json_text import parse_json
from elm_jax.run.fingerprints import summary_of
from elm_jax.runtime import distributed

_LIST = re.compile(r"checksums-(\d+)-of-(\d+)\.json")
_PIECE = 2**22  # bytes of a file that are read at once


def own_checksums(folder: Path) -> dict[str, list[Any]]:
    """Size in bytes and checksum of this process's share of the files below `folder`.

    Raises:
        OSError: one cannot be read; says which.
    """
    found = {}
    for name in _share(_files(folder)):
        try:
            found[name] = _size_and_checksum(folder / name)
        except OSError as error:
            raise OSError(_unread(name, error)) from error
    return found


def write_list(folder: Path, checksums: Mapping[str, list[Any]]) -> None:
    """Leave this process's list in `folder`. Raises UserError where it cannot be written."""
    name = f"checksums-{jax.process_index()}-of-{jax.process_count()}.json"
    write_json(folder / name, seal({"files": checksums}))


def listed(folder: Path) -> dict[str, list[Any]]:
    """The files of a verified folder, with size and checksum; none where a list is missing or damaged."""
    parts: dict[int, dict[int, dict[str, list[Any]]]] = {}
    for path in folder.glob("checksums-*.json"):
        found = _LIST.fullmatch(path.name)
        if found and (files := _read_list(path)) is not None:
            parts.setdefault(int(found[2]), {})[int(found[1])] = files
    whole = [part.values() for count, part in parts.items() if len(part) == count and max(part) < count]
    return {name: facts for part in whole[:1] for files in part for name, facts in files.items()}


def _read_list(path: Path) -> dict[str, list[Any]] | None:
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = facts.get("files") if isinstance(facts, dict) and sealed(facts) else None
    return files if isinstance(files, dict) and all(map(_is_listed, files, files.values())) else None


def _is_listed(name: str, facts: Any) -> bool:
    """Whether a list says it so: a file below its folder, with size and checksum."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(facts, list) and [type(fact) for fact in facts] == [int, str]


def wrong_file(folder: Path, files: Mapping[str, list[Any]]) -> str:
    """The first of this process's share of `files` that is not as it was listed, and why; empty if all are."""
    for name in _share(sorted(files)):
        stopping.goes_on()
        path, (size, checksum) = folder / name, files[name]
        try:
            if not path.is_file():
                return f"{name} is gone"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes in place of {size:,}"
            if _size_and_checksum(path)[1] != checksum:
                return f"{name} has other content than was written"
        except OSError as error:
            return _unread(name, error)
    return ""


def _unread(name: str, error: OSError) -> str:
    return f"{name} cannot be read: {error.strerror}"


def wrong_array(folder: Path, arrays: Mapping[str, str | None]) -> str:
    """The first of this process's share of arrays below `folder` that does not come back as it was, and why.

    Args:
        arrays: `item/name` -> the `summary` of what was saved; None: whatever can be read is right.
    """
    for name in _share(sorted(arrays)):
        stopping.goes_on()
        try:
            found = _read_back(folder, name, arrays[name])
        except Exception as error:  # whatever a library says of damaged files
            return f"{name} cannot be read: {one_line(str(error))[:200]}"
        if found is not None and found != arrays[name]:
            return f"{name} comes back with other values than were saved"
    return ""


def _read_back(folder: Path, name: str, expected: str | None) -> str | None:
    """The summary of an array on disk, which is in memory alone; what it claims to be is looked at before."""
    store = _open(folder / name.partition("/")[0], name.partition("/")[2])
    claimed = summary(store.dtype.numpy_dtype, f"{tuple(store.shape)}:")
    if expected is not None and not expected.startswith(claimed):
        return claimed
    array = store.read().result()
    return None if expected is None else summary(array.dtype, summary_of(array, array.dtype))


def summary(dtype: Any, of_values: str) -> str:
    """What a checkpoint keeps of an array: its dtype before the `summaries` of its shape and values."""
    return f"{dtype}:{of_values}"


def _open(item: Path, name: str) -> Any:
    """An array as the checkpoint library lays it out; read without it, for it has its processes wait for each other."""
    store = {"driver": "ocdbt", "base": f"file://{item.absolute()}/", "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()


def wrong_layout(folder: Path, arrays: Iterable[str]) -> str:
    """What the checkpoint library would stumble over: its own notes of the arrays `item/name`; empty if nothing."""
    expected: dict[str, set[str]] = {}
    for name in arrays:
        expected.setdefault(name.partition("/")[0], set()).add(name.partition("/")[2])
    for item, names in expected.items():
        try:
            with ocp.PyTreeCheckpointer() as library:
                tree = library.metadata(folder.absolute() / item).item_metadata.tree
            found = {".".join(path) for path in ocp.tree.to_flat_dict(tree)}
            for notes in (folder / item / "array_metadatas").glob("*"):
                for entry in parse_json(notes.read_bytes())["array_metadatas"]:
                    itemgetter("param_name", "write_shape", "chunk_shape")(entry["array_metadata"])
        except Exception as error:
            return f"{item} cannot be read: {one_line(str(error))[:200]}"
        if found != names:
            return f"{item} has other arrays than were saved"
    return ""


def unreadable(folder: Path, items: Iterable[str]) -> str:
    """The first of the arrays of these items that cannot be read, where nobody kept how they were; empty if none."""
    names: list[str] = []
    for item in items:
        if (folder / item).is_dir():
            try:
                store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{(folder / item).absolute()}/"})
                keys = [key.decode() for key in store.result().list().result()]
            except Exception as error:
                return f"{item} cannot be read: {one_line(str(error))[:200]}"
            names += [f"{item}/{key.removesuffix('/.zarray')}" for key in keys if key.endswith("/.zarray")]
    return wrong_array(folder, dict.fromkeys(names))


def check_files(folder: Path) -> None:
    """Hold a folder of arrays against its lists, where it has them. All processes call it together.

    Raises:
        UserError: a file is not as it was written.
    """
    if problem := first(distributed.gather(wrong_file(folder, listed(folder)))):
        raise UserError(
            str(folder), problem, "the arrays as they were saved",
            "put the folder back from a copy, or begin the run anew in another workdir",
        )  # fmt: skip


def first(problems: Iterable[str]) -> str:
    """The first that is one."""
    return next(filter(None, problems), "")


def _share(names: Sequence[str]) -> Sequence[str]:
    return names[jax.process_index() :: jax.process_count()]


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(p.relative_to(folder)) for p in paths if not _LIST.fullmatch(p.name))


def _size_and_checksum(path: Path) -> list[Any]:
    # XXH3 reads as fast as memory does: a third of a second for what takes SHA-256 five.
    size, checksum = 0, xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            stopping.goes_on()
            size += len(piece)
            checksum.update(piece)
    return [size, checksum.hexdigest()]
