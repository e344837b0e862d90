"""A reader and a writer of safetensors files: 8 bytes of header length, a JSON header, the tensors' bytes.

The reader maps the file and hands out views, so that a slice of a tensor reads only its own pages. It
believes nothing of the header that it has not checked against the file.
"""

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from elm_jax.errors import UserError

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` in bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Safetensors(Mapping[str, np.ndarray]):
    """Tensor name -> read-only array over the mapped file. UserError if the file is not sound."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise UserError(str(path), str(error), "a readable safetensors file", "check the path") from None
        self.info, self.metadata = _read_header(self.path, self._bytes)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.info[name]
        count = math.prod(info.shape)
        return np.frombuffer(self._bytes, info.dtype, count, info.offset).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, in C order whatever their layout in memory; wide dtypes first, so that all align."""
    ordered = sorted(tensors, key=lambda name: (-np.asarray(tensors[name]).dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in ordered:
        tensor = np.asarray(tensors[name])
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


def _read_header(path: Path, content: mmap.mmap) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = len(content)
    length = int.from_bytes(content[:8], "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        _fail(path, f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        _fail(path, f"a header that is no JSON ({error})")
    if not isinstance(header, dict):
        _fail(path, "a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    expected_begin = 0
    for begin, end, name in spans:
        if begin != expected_begin:
            _fail(path, f"tensor {name} at byte {begin} instead of {expected_begin}")
        expected_begin = end
    if expected_begin != size - 8 - length:
        _fail(path, f"{size - 8 - length} bytes of tensors where the header describes {expected_begin}")
    start = 8 + length
    info = {
        name: TensorInfo(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]), start + begin)
        for begin, _, name in spans
    }
    return info, metadata


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """(begin, end, name) of a header entry whose dtype, shape and offsets agree with each other."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            _fail(path, f"tensor {name} described as {str(entry)[:80]}")
    if dtype not in DTYPES:
        _fail(path, f"tensor {name} of dtype {dtype}")
    if not all(type(n) is int and n >= 0 for n in shape):
        _fail(path, f"tensor {name} of shape {shape}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if begin < 0 or end - begin != expected:
        _fail(path, f"tensor {name} in bytes {begin} to {end} where its shape {shape} needs {expected} bytes")
    return begin, end, name


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _fail(path: Path, found: str) -> NoReturn:
    raise UserError(str(path), found, "a sound safetensors file", "download or export it again")
