"""Numpy files, read without running what they hold: plain arrays, and the reference's pickled dictionaries.

`np.load` is not used: it parses the header with `ast` (slow under threads, and racy on Python 3.11) and
unpickles objects without restriction.
"""

import io
import os
import pickle
import re
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct, scalar
from numpy._core.numeric import _frombuffer  # pyright: ignore[reportAttributeAccessIssue]

from elm_jax.errors import UserError

MAX_BYTES = 1 << 30  # far above any recording: what is larger is not an ECG
_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']+)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d,\s]*)\)\s*,?\s*\}"
)
_NUMERIC = re.compile(r"[<>|=]?[fiu](1|2|4|8|16)")


def read_npy(path: str | Path) -> np.ndarray | dict[str, Any]:
    """The numeric array of a `.npy` file (any shape, native byte order), or the dictionary pickled in it.

    Raises UserError when the file is missing, truncated, not numeric, or holds anything but arrays and
    plain Python values (such a file is refused before anything in it runs).
    """
    data = _read_bytes(path)
    descr, fortran, shape, start = _parse(path, data)
    if descr in ("|O", "O"):
        return _unpickle(path, data, start)
    if not _NUMERIC.fullmatch(descr):
        raise UserError(str(path), f"dtype {descr}", "real numbers", "save the signal as float32")
    dtype = np.dtype(descr)
    expected = prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        kind = "a truncated file" if len(data) - start < expected else "a file with trailing bytes"
        raise UserError(
            str(path),
            f"{kind} ({len(data) - start} bytes of samples)",
            f"{expected} bytes for shape {shape}",
            "write or download the file again",
        )
    values = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)


def _read_bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise UserError(str(path), f"{size} bytes", f"at most {MAX_BYTES}", "give one recording per file")
            return file.readall()
    except OSError as error:
        raise UserError(
            str(path), error.strerror or "no file", "a readable .npy file", "check the path (and data.root)"
        ) from None


def _parse(path: str | Path, data: bytes) -> tuple[str, bool, tuple[int, ...], int]:
    """(descr, fortran_order, shape, offset of the samples)."""
    if data[:6] != _MAGIC:
        raise UserError(str(path), "no numpy header", "a .npy file", "save the signal with numpy.save")
    width = 2 if data[6:7] == b"\x01" else 4
    length = int.from_bytes(data[8 : 8 + width], "little")
    start = 8 + width + length
    parsed = _header(data[8 + width : start]) if len(data) >= start else None
    if parsed is None:
        raise UserError(
            str(path),
            "an unreadable numpy header",
            "a simple numeric array or a record of the reference",
            "write or download the file again",
        )
    return *parsed, start


@lru_cache(maxsize=1024)
def _header(text: bytes) -> tuple[str, bool, tuple[int, ...]] | None:
    match = _HEADER.fullmatch(text.decode("latin-1").strip())
    if match is None:
        return None
    sizes = match[3].replace(" ", "").split(",")
    return match[1], match[2] == "True", tuple(int(size) for size in sizes if size)


def _plain_scalar(dtype: np.dtype, *data: Any) -> Any:
    if dtype.hasobject:
        raise pickle.UnpicklingError("a numpy scalar of Python objects")
    return scalar(dtype, *data)


def _encode(text: str, encoding: str) -> bytes:
    # How pickle protocols 0 to 2 spell bytes; other codecs are none of our business.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode(encoding)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **{("builtins", kind.__name__): kind for kind in (list, dict, tuple, set, frozenset)},
    **{("builtins", kind.__name__): kind for kind in (str, bytes, bytearray, int, float, bool, complex)},
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _plain_scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    """Rebuilds arrays and plain values; every other name in the stream is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name}") from None


def _unpickle(path: str | Path, data: bytes, start: int) -> dict[str, Any]:
    stream = io.BytesIO(data)
    stream.seek(start)
    try:
        value = _Unpickler(stream).load()
    except Exception as error:  # a malformed stream can raise almost anything
        raise UserError(
            str(path),
            f"a pickle that is refused or broken ({error})",
            "only numpy arrays and plain values, whole",
            "use a file you trust, or save the array alone",
        ) from None
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value.item()
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(
            str(path),
            f"a pickled {type(value).__name__}",
            "a dictionary with the keys ecg and report",
            "save the array alone, or the reference's dictionary",
        )
    return value
