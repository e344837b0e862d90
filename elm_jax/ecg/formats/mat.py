"""MATLAB files, version 4 and 5 (5 to 7.2): arrays of numbers, texts, cells of texts, and structures of these.

Read here, by MathWorks' "MAT-File Format": scipy's reader makes room for what a file claims. Version 7.3 is HDF5.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from elm_jax.ecg.formats.hdf5 import hdf5_values
from elm_jax.ecg.formats.named_values import Value, stored_of
from elm_jax.ecg.npy import MAX_BYTES
from elm_jax.ecg.stored import AGAIN, GROWTH, UNPACKED, Stored, inflate, read_file
from elm_jax.errors import UserError

WHAT = "a MATLAB file of version 4, 5 or 7.3"
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_CELL, _STRUCT, _CHAR, _MATRIX, _PACKED = 1, 2, 4, 14, 15
_OLD_TYPES = ("f8", "f4", "i4", "i2", "u2", "u1")  # of version 4
_DEEPEST, _MOST_FIELDS, _MOST_CELLS = 4, 200, 10_000


def read_mat(path: Path) -> Stored:
    """The recording in a MATLAB file; see `named_values` for how it is found. Raises UserError."""
    return stored_of(path, mat_values(path))


def mat_values(path: Path) -> dict[str, Value]:
    """What a MATLAB file holds, fields of structures as `structure.field`. Raises UserError."""
    data = read_file(path, WHAT)
    if data[:8] == b"\x89HDF\r\n\x1a\n" or data[512:520] == b"\x89HDF\r\n\x1a\n":
        return hdf5_values(path)
    try:
        return _File(path, data).values()
    except (struct.error, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(path, f"a damaged file ({error})", WHAT, AGAIN) from None


class _File:
    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.order = path, data, "<"
        self.most = self.left = min(MAX_BYTES, max(UNPACKED, GROWTH * len(data)))

    def values(self) -> dict[str, Value]:
        if len(self.data) >= 128 and self.data[126:128] in (b"IM", b"MI"):
            self.order = "<" if self.data[126:128] == b"IM" else ">"
            return dict(self._variables())
        return dict(self._old())

    def _make(self, size: int) -> None:
        """Count bytes of which the file holds fewer; all of them together may become no more than a recording has."""
        self.left -= size
        if self.left < 0:
            found = f"{len(self.data)} bytes that become more than {self.most}"
            raise UserError(self.path, found, "no more than a recording has", AGAIN)

    def _old(self) -> Iterator[tuple[str, Value]]:
        """Version 4: a header of five numbers for each array."""
        self.order = "<" if self.data[:4] and struct.unpack("<I", self.data[:4])[0] < 5000 else ">"
        at = 0
        while at < len(self.data):
            kind, rows, columns, imaginary, length = struct.unpack_from(f"{self.order}5I", self.data, at)
            machine, _, dtype, text = (kind // 1000 % 10, kind // 100 % 10, kind // 10 % 10, kind % 10)
            if machine > 1 or kind >= 5000 or dtype > 5 or text > 1 or imaginary or not 1 < length <= 100:
                raise UserError(self.path, f"an array of kind {kind}", f"{WHAT}: real numbers or a text", AGAIN)
            number = np.dtype(self.order + _OLD_TYPES[dtype])
            start = at + 20 + length
            at = start + rows * columns * number.itemsize
            if at > len(self.data):
                raise ValueError(f"{rows} x {columns} numbers, of which the file holds {len(self.data) - start} bytes")
            name = self.data[start - length : start].rstrip(b"\0").decode("latin-1")
            values = np.frombuffer(self.data, number, rows * columns, start).reshape(rows, columns, order="F")
            yield name, _texts(values.astype(np.uint32)) if text else values

    def _variables(self) -> Iterator[tuple[str, Value]]:
        at = 128
        while at < len(self.data):
            kind, body, at = self._element(self.data, at)
            if kind == _PACKED:
                unpacked = inflate(self.path, body)
                self._make(len(unpacked))
                kind, body, _ = self._element(unpacked, 0)
            if kind == _MATRIX:
                yield from self._matrix(body, "", 0)

    def _element(self, data: bytes | memoryview, at: int) -> tuple[int, memoryview, int]:
        """Type and body of the element at `at`, and where the next one begins."""
        kind, size = struct.unpack_from(f"{self.order}2I", data, at)
        if kind >> 16:  # of up to four bytes, in the tag itself
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError("a small element of more than four bytes")
        else:
            start = at + 8
            end = start + size + (0 if kind == _PACKED else -size % 8)
        if start + size > len(data):
            raise ValueError(f"{size} bytes of which there are {len(data) - start}")
        return kind, memoryview(data)[start : start + size], end

    def _matrix(self, body: memoryview, prefix: str, depth: int) -> Iterator[tuple[str, Value]]:
        """The values of an array: one, or those of a structure with the names of its fields."""
        if not len(body):
            return
        _, flags, at = self._element(body, 0)
        _, sizes, at = self._element(body, at)
        _, called, at = self._element(body, at)
        word = struct.unpack_from(f"{self.order}I", flags)[0]
        shape = tuple(np.frombuffer(sizes, self.order + "i4").tolist())
        name = f"{prefix}{bytes(called).decode('utf-8', 'replace')}"
        if not 2 <= len(shape) <= 8 or min(shape) < 0 or max(shape) > 1 << 30 or depth > _DEEPEST:
            raise ValueError(f"an array of shape {shape[:8]}, {depth} deep")
        count, kind = int(np.prod(np.array(shape, object))), word & 0xFF
        if kind == _STRUCT and count == 1:
            yield from self._fields(body, at, name, depth)
        elif kind == _CELL and count <= _MOST_CELLS:
            found = [value for _ in range(count) for value in [self._cell(body, at, depth)] if (at := value[1])]
            if found and all(isinstance(text, str) for text, _ in found):
                yield name, [str(text) for text, _ in found]
        elif kind == _CHAR:
            code, text, _ = self._element(body, at)
            encoding = _TEXTS.get(code, "")
            if not encoding:
                raise ValueError(f"texts of type {code}")
            self._make(4 * len(text))
            order = "" if encoding in ("latin-1", "utf-8") else "-le" if self.order == "<" else "-be"
            letters = np.array([ord(letter) for letter in bytes(text).decode(encoding + order)], np.uint32)
            if letters.size == count and len(shape) == 2:
                yield name, _texts(letters.reshape(shape, order="F"))
        elif kind in _CLASSES and not word & 0x800:  # no complex numbers
            code, numbers, _ = self._element(body, at)
            if code not in _TYPES:
                raise ValueError(f"numbers of type {code}")
            stored = np.frombuffer(numbers, self.order + _TYPES[code])
            if stored.size != count:
                raise ValueError(f"{stored.size} numbers for shape {shape}")
            if stored.dtype.kind != _CLASSES[kind][0]:
                self._make(count * np.dtype(_CLASSES[kind]).itemsize)
                stored = stored.astype(_CLASSES[kind])
            yield name, stored.reshape(shape, order="F")

    def _fields(self, body: memoryview, at: int, name: str, depth: int) -> Iterator[tuple[str, Value]]:
        _, width, at = self._element(body, at)
        _, names, at = self._element(body, at)
        size = struct.unpack_from(f"{self.order}i", width)[0]
        if not 1 <= size <= 64 or len(names) % size or len(names) // size > _MOST_FIELDS:
            raise ValueError(f"names of {size} bytes")
        for start in range(0, len(names), size):
            field = bytes(names[start : start + size]).split(b"\0")[0].decode("latin-1")
            _, value, at = self._element(body, at)
            yield from self._matrix(value, f"{name}.{field}", depth + 1)

    def _cell(self, body: memoryview, at: int, depth: int) -> tuple[Value | None, int]:
        _, value, at = self._element(body, at)
        return next((found for _, found in self._matrix(value, "", depth + 1)), None), at


def _texts(letters: np.ndarray) -> Value:
    """Rows of code points as texts: one, or a list of them without the blanks that fill them up."""
    rows = ["".join(map(chr, row)).rstrip("\0 ") for row in letters.tolist()]
    "".join(rows).encode()  # raises ValueError for halves of surrogate pairs
    return rows[0] if len(rows) == 1 else rows
