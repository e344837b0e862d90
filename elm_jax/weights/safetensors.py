"""A reader and a writer of safetensors files: 8 bytes of header length, a JSON header, the tensors' bytes.

The reader maps the file and hands out views, so that a slice of a tensor reads only its own pages. It
believes nothing of the header that it has not checked against the file.
"""

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import ml_dtypes
import numpy as np

from elm_jax.errors import UserError
from elm_jax.folders import check_regular

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
        check_regular(self.path, "a readable safetensors file")
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


class SafetensorsWriter:
    """A file whose tensors are written one by one, in any order: no more than one of them is in memory.

    layout: name -> (dtype, shape) of every tensor. Wide dtypes lie first, so that all align. Closing it with a tensor
    that was not written is our own mistake.
    """

    def __init__(
        self, path: str | Path | IO[bytes], layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._layout, self._offsets, end = dict(layout), {}, 0
        for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
            dtype, shape = layout[name]
            self._offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
            offsets = [self._offsets[name], end]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        # Closed by close.
        self._file = Path(path).open("wb") if isinstance(path, str | Path) else path  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Put a tensor, in C order whatever its layout in memory, into its place."""
        assert (tensor.dtype, tensor.shape) == self._layout[name], (name, tensor.dtype, tensor.shape)
        self._file.seek(self._start + self._offsets.pop(name))
        if tensor.size:
            self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def write_pieces(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """`write`, of a tensor whose parts come one by one, in C order."""
        self._file.seek(self._start + self._offsets[name])
        for piece in pieces:
            assert piece.dtype == self._layout[name][0], (name, piece.dtype)
            self._file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        dtype, shape = self._layout[name]
        assert self._file.tell() == self._start + self._offsets.pop(name) + math.prod(shape) * dtype.itemsize, name

    def close(self) -> None:
        self._file.close()
        assert not self._offsets, f"not written: {sorted(self._offsets)[:5]}"


def save_safetensors(
    path: str | Path | IO[bytes], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, which are at hand, to a file."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(path, {name: (x.dtype, x.shape) for name, x in arrays.items()}, metadata)
    for name, array in arrays.items():
        writer.write(name, array)
    writer.close()


def forget(view: np.ndarray) -> None:
    """Give back the memory of the file that `view` is of, as far as it was read: it is read again when needed."""
    base: Any = view
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


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
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _fail(path, "metadata that are no texts by name")
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
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
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
