"""Files that PyTorch saved (`.pt`, `.pth`, `.bin`): their tensors, and nothing else.

The file is a pickle, which can hold any program. It is opened with `weights_only`, under which PyTorch builds tensors
and plain values and refuses everything else before it is called.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import jax
import ml_dtypes
import numpy as np
from packaging.version import Version

from elm_jax.errors import UserError, refused, some
from elm_jax.folders import check_regular

SUFFIXES = (".pt", ".pth", ".bin")
# Where checkpoints keep their tensors: the reference, MERL and ECG-Neural-Networks; Lightning; ST-MEM.
STATE_DICTS = ("model_state_dict", "state_dict", "model")
OLDEST = Version("2.6")  # before it a file could run a program in spite of `weights_only` (CVE-2025-32434)
WINDOW = 2**28  # bytes handed out before the file is mapped anew, so that pages already read can go
_ROOM = b"bytearray"  # PyTorch lets a file make one of any size
_LONGEST_NAME = 200  # characters
_OLDER_PICKLES = 5  # one after another, before the values: what PyTorch wrote before it wrote zip files
_REFUSED = re.compile(r"GLOBAL (\S+)")
_RESCUE = (
    "if you trust it, save its tensors alone: torch.save({'model_state_dict': checkpoint['model_state_dict']}, new)"
)


class TorchFile(Mapping[str, np.ndarray]):
    """Tensor name -> read-only array over the mapped file.

    info: the shape and dtype of every tensor. rest: the names of what else is in the file.
    Raises UserError where PyTorch is not installed, and for a file that is damaged or holds more than tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_regular(self.path, "a file that PyTorch saved")
        with refused(self.path, "", "a sound file of tensors only", "save it again", zipfile.BadZipFile):
            self._mapped = zipfile.is_zipfile(self.path)
        self._handed_out = 0
        self._tensors, self.rest = self._load()
        self.info = {name: _described(self.path, name, tensor) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        if self._mapped and self._handed_out > WINDOW:
            self._tensors, _ = self._load()
            self._handed_out = 0
        tensor = self._tensors[name]
        self._handed_out += tensor.numel() * tensor.element_size()
        return _array(tensor, self.info[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def _load(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        content = _read(self.path, self._mapped)
        if not isinstance(content, Mapping):
            _refuse(self.path, f"a {type(content).__name__}")
        key = next((key for key in STATE_DICTS if isinstance(content.get(key), Mapping)), None)
        tensors = content if key is None else content[key]
        others = [str(name) for name, value in tensors.items() if not _is_tensor(value)]
        if not tensors or others:
            _refuse(self.path, f"{some(others)}, no tensor" if others else "no tensors")
        return {str(name): tensor.detach() for name, tensor in tensors.items()}, tuple(
            str(name) for name in content if key is not None and name != key
        )


def _check_claims(path: Path, mapped: bool) -> None:
    """Refuse what PyTorch would make room for before it refuses it: packed parts, and bytes by their number."""
    with refused(path, "", "a sound file of tensors only", "save it again", Exception), path.open("rb") as file:
        if mapped:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                    _refuse(path, "packed parts, which PyTorch does not write")
                if sum(part.file_size for part in parts) > path.stat().st_size:
                    _refuse(path, "parts that are larger than the file")
                pickles = [_content(file, part) for part in parts if part.filename.lower().endswith(".pkl")]
                calls = any(_ROOM in pickle for pickle in pickles)
                names = [name for pickle in pickles for name in _globals(pickle)]
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                calls = content.find(_ROOM) >= 0
                names = [name for _ in range(_OLDER_PICKLES) for name in _globals(content)]
        if longest := max(names, key=len, default="")[_LONGEST_NAME:]:
            _refuse(path, f"the name of a function with {len(longest) + _LONGEST_NAME} characters")
        if calls:
            _refuse(path, f"a {_ROOM.decode()}, which is no tensor")


def _globals(pickle: Any) -> list[str]:
    """What a pickle, bytes or a file, names of Python's, from where it is read up to its end; among long names PyTorch
    looks for words for minutes."""
    return [str(name) for code, name, _ in pickletools.genops(pickle) if code.name in ("GLOBAL", "INST")]


def _content(file: IO[bytes], part: zipfile.ZipInfo) -> bytes:
    """What a part holds that is not packed, whatever its CRC-32: PyTorch can be told to write none."""
    file.seek(part.header_offset)
    lengths = struct.unpack("<26xHH", file.read(30))  # of its name and of its notes, which stand before it
    file.seek(sum(lengths), os.SEEK_CUR)
    return file.read(part.file_size)


def _read(path: Path, mapped: bool) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        fix = "install it with `pip install torch`, or convert the file to .safetensors"
        raise UserError(str(path), "no PyTorch", f"PyTorch, to read a {path.suffix} file", fix) from None
    if Version(torch.__version__) < OLDEST:
        fix = f"update it with `pip install 'torch>={OLDEST}'`"
        raise UserError(str(path), f"PyTorch {torch.__version__}, whose check of files is not safe", str(OLDEST), fix)
    _check_claims(path, mapped)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # PyTorch raises many kinds for a damaged or unsafe file
        refused = _REFUSED.search(str(error))
        found = f"{refused[1]}, which is no tensor" if refused else type(error).__name__
        raise UserError(str(path), found, "a sound file of tensors only", _RESCUE) from None


def _is_tensor(value: Any) -> bool:
    import torch  # pyright: ignore[reportMissingImports]

    return isinstance(value, torch.Tensor)


def _described(path: Path, name: str, tensor: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a tensor whose values lie in the file as they are; UserError for others."""
    import torch  # pyright: ignore[reportMissingImports]

    kinds = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8)
    known = {**{kind: np.dtype(str(kind).removeprefix("torch.")) for kind in (*kinds, torch.uint8, torch.bool)},
             torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    plain = plain and not tensor.is_neg() and not tensor.is_conj()
    # A view may claim to be larger than what it is a view of.
    plain = plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    if not plain or tensor.dtype not in known:
        found = f"{name}, {tensor.dtype} {tensor.layout} on {tensor.device}"
        raise UserError(str(path), found, "plain tensors of floats or whole numbers", "save it as such a tensor")
    return jax.ShapeDtypeStruct(tuple(tensor.shape), known[tensor.dtype])


def _array(tensor: Any, dtype: Any) -> np.ndarray:
    """A view of the tensor's values; NumPy has no bfloat16 that PyTorch knows."""
    import torch  # pyright: ignore[reportMissingImports]

    array = tensor.view(torch.int16).numpy().view(dtype) if tensor.dtype is torch.bfloat16 else tensor.numpy()
    array.flags.writeable = False
    return array


def _refuse(path: Path, found: str) -> NoReturn:
    expected = f"tensors by name, or such a dict under {' or '.join(STATE_DICTS)}"
    raise UserError(str(path), found, expected, "save its state dict with torch.save")
