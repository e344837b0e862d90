"""Numpy files, read without running what they hold: plain arrays, and the reference's pickled dictionaries.

`np.load` is not used: it parses the header with `ast` (slow under threads, and racy on Python 3.11) and
unpickles objects without restriction.
"""

import os
import re
from functools import lru_cache
from math import prod
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import numpy as np

from elm_jax.ecg.pickled import MAX_AXES, NUMBERS, ORDERS, read_pickle, shaped
from elm_jax.errors import UserError

MAX_BYTES = 1 << 30  # far above any recording: what is larger is not an ECG
_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000  # bytes, as numpy has it
_LONGEST_SIZE = 18  # digits
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']+)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([0-9,\s]*)\)\s*,?\s*\}"
)


def read_npy(path: str | Path) -> np.ndarray | dict[str, Any]:
    """The numeric array of a `.npy` file (any shape, native byte order), or the dictionary pickled in it.

    Raises UserError when the file is missing, truncated, not numeric, or holds anything but arrays and
    plain Python values (such a file is refused before anything in it runs).
    """
    data = read_bytes(path)
    descr, fortran, shape, start = _parse(path, data)
    if descr in ("|O", "O"):
        return _unpickle(path, data, start)
    order, kind = (descr[0], descr[1:]) if descr[0] in ORDERS else ("=", descr)
    if kind not in NUMBERS or kind == "b1":
        raise UserError(path, f"dtype {descr}", "real numbers", "save the signal as float32")
    dtype = np.dtype(order + kind)
    expected = prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        kind = "a truncated file" if len(data) - start < expected else "a file with trailing bytes"
        raise UserError(
            path,
            f"{kind} ({len(data) - start} bytes of samples)",
            f"{expected} bytes for shape {shape}",
            "write or download the file again",
        )
    try:
        values = shaped(memoryview(data)[start:], dtype, shape, fortran)
    except ValueError:  # of no samples, along axes that numpy does not have
        raise UserError(path, f"shape {shape}", "(leads, samples)", "save the signal so") from None
    return values.astype(dtype.newbyteorder("="), copy=False)


def read_bytes(path: str | Path, what: str = "a .npy file", start: int = 0, length: int | None = None) -> bytes:
    """What a regular file holds, or `length` bytes of it from `start` on. UserError, also where it ends before."""
    try:
        # Not `open`, which costs as much as all the rest; a pipe must not be waited for.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(file)
            if not S_ISREG(status.st_mode):
                found = "a directory" if S_ISDIR(status.st_mode) else "no regular file"
                raise UserError(path, found, what, "check the path (and data.root)")
            size = status.st_size if length is None else length
            if size > MAX_BYTES:
                raise UserError(path, f"{size} bytes", f"at most {MAX_BYTES}", "give one recording per file")
            if start + size > status.st_size:
                raise UserError(path, f"{status.st_size} bytes", f"at least {start + size}", "make the file again")
            if start:
                if hasattr(os, "posix_fadvise"):  # what lies behind is of others: not to be read ahead
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
                os.lseek(file, start, os.SEEK_SET)
            data = os.read(file, size)
            while len(data) < size and (more := os.read(file, size - len(data))):
                data += more
            return data
        finally:
            os.close(file)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: of a path that no file can have
        found = getattr(error, "strerror", None) or str(error)
        raise UserError(path, found, f"{what} that can be read", "check the path (and data.root)") from None


def _parse(path: str | Path, data: bytes) -> tuple[str, bool, tuple[int, ...], int]:
    """(descr, fortran_order, shape, offset of the samples)."""
    if data[:6] != _MAGIC:
        raise UserError(path, "no numpy header", "a .npy file", "save the signal with numpy.save")
    width = 2 if data[6:7] == b"\x01" else 4
    length = int.from_bytes(data[8 : 8 + width], "little")
    start = 8 + width + length
    parsed = _header(data[8 + width : start]) if len(data) >= start and length <= _LONGEST_HEADER else None
    if parsed is None:
        raise UserError(
            path,
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
    sizes = [size for size in match[3].replace(" ", "").split(",") if size]
    if len(sizes) > MAX_AXES or not all(size.isdecimal() and len(size) <= _LONGEST_SIZE for size in sizes):
        return None
    return match[1], match[2] == "True", tuple(map(int, sizes))


def _unpickle(path: str | Path, data: bytes, start: int) -> dict[str, Any]:
    try:  # not `errors.refused`: a loader reads thousands a second, and a context costs a tenth of the pickle
        value = read_pickle(data, start)
    except ValueError as error:
        raise UserError(
            path,
            f"a pickle that is refused or broken ({error})",
            "only numpy arrays and plain values, whole",
            "use a file you trust, or save the array alone",
        ) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(
            path,
            f"a pickled {type(value).__name__}",
            "a dictionary with the keys ecg and report",
            "save the array alone, or the reference's dictionary",
        )
    return value
