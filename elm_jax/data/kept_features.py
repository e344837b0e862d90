"""Outputs of a frozen encoder, kept on disk: written once, read in place of recordings. No jax here.

A folder belongs to one encoder and one way of preparing signals. It holds parts: the rows (N, E) of an array in
`<part>.rows`, and, written last, so that a part is whole or not there, a list with the name and the checksum of each
row (`folders.keep`). A row is held against its checksum each time that it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elm_jax.data.batch import ArraySpec
from elm_jax.errors import Absent
from elm_jax.folders import keep, kept_in
from elm_jax.json_text import parse_json

_log = logging.getLogger(__name__)
_ROWS, _NAMES = ".rows", ".json"


@dataclass(frozen=True)
class Features:
    """The outputs (N, E) in `folder`, by name. Picklable: worker processes open the files themselves."""

    folder: str
    shape: tuple[int, int]
    dtype: str  # float32 or bfloat16
    names: Mapping[str, str] = field(default_factory=dict, repr=False)  # what a run asks for -> the name, as it started

    @property
    def layout(self) -> ArraySpec:
        return ArraySpec(self.shape, np.dtype(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else np.dtype(self.dtype))

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def load(self, name: str) -> np.ndarray | None:
        """One output (N, E), or None where there is none of this name.

        Raises:
            Absent: it is damaged. Its part is removed, so that the next start computes it again.
        """
        if (place := self._rows.get(name)) is None:
            return None
        part, row, checksum = place
        values = np.array(self._parts[part][1][row])
        if zlib.crc32(values.data) != checksum:
            found, fix = "an output of the encoder that is damaged", "start the run again: it is computed anew"
            raise Absent(part, found, "what was kept", fix if _removed(part) else f"remove that file, and {fix}")
        return values.view(self.layout.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.shape, self.dtype, self.names)

    @cached_property
    def _rows(self) -> dict[str, tuple[Path, int, int]]:
        named = [(part, i, *row) for part, (rows, _) in self._parts.items() for i, row in enumerate(rows) if row]
        return {name: (part, i, checksum) for part, i, name, checksum in named}

    @cached_property
    def _parts(self) -> dict[Path, tuple[list[Any], np.ndarray]]:
        """Of each part its rows' names and checksums, and its array; a damaged one counts as not there."""
        found = {}
        for path in kept_in(Path(self.folder), _NAMES):
            try:
                rows = parse_json(path.read_bytes())
                array = np.memmap(path.with_name(f"{path.name.partition('-')[0]}{_ROWS}"), self._stored, "r")
                found[path] = rows, array.reshape(len(rows), *self.shape)
            except (ValueError, OSError):
                _log.warning("the array of %s is damaged: what it held is computed again", path)
                _removed(path)
        return found

    @property
    def _stored(self) -> np.dtype:
        return np.dtype(f"u{self.layout.dtype.itemsize}")


def _removed(part: Path) -> bool:
    """Remove a part; whether that can be done: a cache that many share may not be written by all."""
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
        return True
    return False


class FeatureWriter:
    """Writes one part of `features`: rows in the order of `names`. As a context it leaves the part, or, where an
    exception ends it, nothing."""

    def __init__(self, features: Features, names: Sequence[str]) -> None:
        folder = Path(features.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._names, self._dtype, self._checksums = list(names), features.layout.dtype, list[int]()
        # Runs with a common disk may write the same part each; the last one to finish leaves it.
        self._part = folder / hashlib.sha256("\0".join(names).encode()).hexdigest()[:32]
        self._half = self._part.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
        self._file = self._half.open("wb")

    def put(self, rows: np.ndarray) -> None:
        """Write the next rows (n, N, E)."""
        for row in np.ascontiguousarray(rows.astype(self._dtype)):
            data = row.tobytes()
            self._checksums.append(zlib.crc32(data))
            self._file.write(data)

    def leave_out(self, names: Collection[str]) -> None:
        """These have no row after all."""
        self._names = [None if name in names else name for name in self._names]

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._file.close()
            if kind is None:
                self._half.replace(self._part.with_suffix(_ROWS))
                rows = [name and (name, sum_) for name, sum_ in zip(self._names, self._checksums, strict=True)]
                keep(self._part, _NAMES, lambda file: file.write(json.dumps(rows).encode()))
        finally:
            self._half.unlink(missing_ok=True)
