"""Outputs of a frozen encoder, kept on disk: written once, read in place of recordings. No jax here.

A folder belongs to one encoder and one way of preparing signals. It holds parts: an array `<part>.npy` (n, N, E), and
`<part>.json` with the name of each row, which is written last, so that a part is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elm_jax.data.batch import ArraySpec
from elm_jax.json_text import parse_json

_log = logging.getLogger(__name__)
_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}  # .npy knows no bfloat16


@dataclass(frozen=True)
class Features:
    """The outputs (N, E) in `folder`, by name. Picklable: worker processes open the files themselves."""

    folder: str
    shape: tuple[int, int]
    dtype: str  # float32 or bfloat16

    @property
    def layout(self) -> ArraySpec:
        return ArraySpec(self.shape, np.dtype(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else np.dtype(self.dtype))

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def load(self, name: str) -> np.ndarray | None:
        """One output (N, E), or None where there is none of this name."""
        place = self._rows.get(name)
        return None if place is None else np.array(self._parts[place[0]][1][place[1]]).view(self.layout.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.shape, self.dtype)

    @cached_property
    def _rows(self) -> dict[str, tuple[str, int]]:
        named = [(part, row, name) for part, (names, _) in self._parts.items() for row, name in enumerate(names)]
        return {name: (part, row) for part, row, name in named if name is not None}

    @cached_property
    def _parts(self) -> dict[str, tuple[list[str | None], np.ndarray]]:
        """Of each part its names and its array; a damaged one counts as not there, and is written again."""
        found = {}
        for path in sorted(Path(self.folder).glob("*.json")):
            try:
                names, array = parse_json(path.read_bytes()), np.load(path.with_suffix(".npy"), mmap_mode="r")
            except (ValueError, EOFError, OSError):
                names, array = None, None
            if isinstance(names, list) and array is not None and array.shape == (len(names), *self.shape):
                found[path.stem] = names, array
            else:
                _log.warning("%s or its array is damaged: what it held is computed again", path)
        return found


class FeatureWriter:
    """Writes one part of `features`: rows in the order of `names`. As a context it leaves the part, or, where an
    exception ends it, nothing."""

    def __init__(self, features: Features, names: Sequence[str]) -> None:
        folder = Path(features.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._names, self._layout, self._stored = list(names), features.layout, _STORED[features.dtype]
        # Runs with a common disk may write the same part each; the last one to finish leaves it.
        self._part = folder / hashlib.sha256("\0".join(names).encode()).hexdigest()[:32]
        self._half = self._part.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
        self._file = self._half.open("wb")
        shape = (len(names), *features.shape)
        header = {"descr": np.lib.format.dtype_to_descr(self._stored), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def put(self, rows: np.ndarray) -> None:
        """Write the next rows (n, N, E)."""
        self._file.write(np.ascontiguousarray(rows.astype(self._layout.dtype)).view(self._stored).tobytes())

    def leave_out(self, names: Collection[str]) -> None:
        """These have no row after all."""
        self._names = [None if name in names else name for name in self._names]

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._file.close()
            if kind is None:
                self._half.replace(self._part.with_suffix(".npy"))
                self._half.write_text(json.dumps(self._names), encoding="utf-8")
                self._half.replace(self._part.with_suffix(".json"))
        finally:
            self._half.unlink(missing_ok=True)
