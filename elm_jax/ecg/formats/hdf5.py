"""HDF5 files of one recording, MATLAB's of version 7.3 too, by h5py: data sets and attributes under their names."""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.ecg.formats.extras import needed
from elm_jax.ecg.formats.named_values import Value, stored_of
from elm_jax.ecg.npy import MAX_BYTES
from elm_jax.ecg.stored import AGAIN, Stored, check_size
from elm_jax.errors import UserError, refused
from elm_jax.folders import check_regular

WHAT = "an HDF5 file with one recording"
_DEEPEST, _MOST_OBJECTS, _MOST_TEXTS = 4, 500, 100


def read_hdf5(path: Path) -> Stored:
    """The recording in a file; see `named_values` for how it is found. Raises UserError."""
    return stored_of(path, hdf5_values(path))


def hdf5_values(path: Path) -> dict[str, Value]:
    """What a file holds, in groups as `group.name`. Raises UserError; what its links name outside is refused."""
    _check_heaps(path)
    h5py = needed(path, "h5py", "HDF5")
    with refused(path, "an unreadable HDF5 file", WHAT, AGAIN, Exception), h5py.File(path, "r") as file:
        return dict(_File(path, h5py).values(file))


def _check_heaps(path: Path) -> None:
    """Raise UserError where a heap of texts is damaged: HDF5's library goes round in it for ever."""
    check_regular(path, WHAT)
    with refused(path, "no readable file", WHAT, "check the path"), path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    start, left = -1, len(data) // 16 + 1  # steps in heaps that do not overlap
    while (start := data.find(b"GCOL\1", start + 1)) >= 0:
        end, at = start + int.from_bytes(data[start + 8 : start + 16], "little"), start + 16
        while at + 16 <= min(end, len(data)):
            size = int.from_bytes(data[at + 8 : at + 16], "little")
            step = 16 + size + -size % 8 if any(data[at : at + 2]) else size  # 0: what is left
            if step < 16 or at + step > end or left == 0:
                raise UserError(path, f"a damaged heap at byte {start}", WHAT, AGAIN)
            at, left = at + step, left - 1


def own_data(path: Path, group: Any, name: str) -> Any:
    """What a group of the file at `path` has under a name, where it lies in that file and its parts can be held.

    Raises:
        UserError: it is a link to elsewhere, stored in other files, or in parts that claim to become far too large.
    """
    h5py = needed(path, "h5py", "HDF5")
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise UserError(path, f"{name[:80]}, a link to elsewhere", "data in this file", "export it whole")
    found = group[name]
    if isinstance(found, h5py.Dataset):
        if found.is_virtual or found.external:
            told = f"{found.name[:80]}, stored in other files"
            raise UserError(path, told, "data in this file", "export it whole")
        part = math.prod(found.chunks or ()) * found.dtype.itemsize
        check_size(path, part, min(found.id.get_storage_size(), path.stat().st_size))
    return found


class _File:
    def __init__(self, path: Path, h5py: Any) -> None:
        self.path, self.h5py, self.objects, self.bytes = path, h5py, 0, 0

    def values(self, group: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Value]]:
        """What a group holds, and those in it."""
        yield from self._attributes(group, prefix)
        for name in group:
            self.objects += 1
            if self.objects > _MOST_OBJECTS or depth > _DEEPEST:
                raise UserError(self.path, "too many groups and data sets", f"at most {_MOST_OBJECTS}", AGAIN)
            found, key = own_data(self.path, group, name), f"{prefix}{name}"
            if name == "#refs#":  # cells of MATLAB, read where they are referred to
                continue
            if isinstance(found, self.h5py.Group):
                yield from self.values(found, f"{key}.", depth + 1)
            elif isinstance(found, self.h5py.Dataset):
                value = self._value(found, group.file)
                yield from [] if value is None else [(key, value)]
                yield from self._attributes(found, f"{key}.")

    def _attributes(self, found: Any, prefix: str) -> Iterator[tuple[str, Value]]:
        for name in list(found.attrs)[:_MOST_OBJECTS]:
            about = found.attrs.get_id(name)
            if about.shape is None or about.get_storage_size() > 1 << 16 or name.startswith("MATLAB_"):
                continue
            value = found.attrs[name]
            texts = [_text(item) for item in np.ravel(value)[:_MOST_TEXTS]]
            if all(text is not None for text in texts) and texts:
                yield f"{prefix}{name}", str(texts[0]) if np.ndim(value) == 0 else [str(text) for text in texts]
            elif np.asarray(value).dtype.kind in "fiu":
                yield f"{prefix}{name}", np.asarray(value)

    def _value(self, found: Any, file: Any, deep: bool = True) -> Value | None:
        """Numbers, a text, or a list of texts; None for what is none of these."""
        if found.is_virtual or found.external:
            told = f"{found.name[:80]}, stored in other files"
            raise UserError(self.path, told, "data in this file", "export it whole")
        if found.shape is None:
            return None
        size = found.size * max(found.dtype.itemsize, 1)
        if found.dtype.kind in "fiu" and (found.ndim > 3 or found.ndim == 3 and found.shape[0] > 1):
            return np.broadcast_to(np.zeros((), found.dtype), found.shape)  # several recordings: only its shape matters
        self.bytes += size
        check_size(self.path, size, min(found.id.get_storage_size(), self.path.stat().st_size))
        if self.bytes > MAX_BYTES:
            raise UserError(self.path, "more data than a recording has", f"at most {MAX_BYTES} bytes", AGAIN)
        if found.dtype.kind in "fiu":
            numbers = found[...]
            if found.attrs.get("MATLAB_class") in (b"char", "char") and numbers.size < 1 << 16:
                rows = np.atleast_2d(numbers.T if numbers.ndim == 2 else numbers).tolist()
                texts = [str(_text("".join(map(chr, row)))).rstrip("\0 ") for row in rows]
                return texts[0] if len(texts) == 1 else texts
            return numbers
        if found.size > _MOST_TEXTS:
            return None
        if self.h5py.check_string_dtype(found.dtype) is not None:
            texts = [_text(item) for item in np.ravel(found[()])]
            return str(texts[0]) if found.shape == () else [str(text) for text in texts]
        if deep and self.h5py.check_ref_dtype(found.dtype) is self.h5py.Reference:
            cells = [file[ref] for ref in np.ravel(found[()]) if ref]
            texts = [self._value(cell, file, deep=False) for cell in cells if isinstance(cell, self.h5py.Dataset)]
            return [text for text in texts if isinstance(text, str)] if texts else None
        return None


def _text(value: Any) -> str | None:
    """Text as such; halves of surrogate pairs, by which h5py gives bytes that are no UTF-8, as question marks."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
