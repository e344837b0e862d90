"""What `prepare` leaves: segments, in a file each as the reference has them or many in a shard, and tables.

A file appears whole or not at all.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from elm_jax.ecg import shards
from elm_jax.ecg.names import LEADS
from elm_jax.folders import write_atomic

SHARD = 32 << 20  # bytes from which on a shard is full
_SEGMENT = re.compile(r"(.+)_(\d+)\.npy")
_GROUP = 50_000  # rows that are in memory at a time


class NpyFiles:
    """A `.npy` file for each segment, with the reference's pickled dictionary, float64, and the leads' names besides.

    What bears the name is whole, also after a loss of power: its bytes are on the disk before it is called so. Readable
    by `numpy.load(path, allow_pickle=True).item()`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def counts(self) -> dict[str, int]:
        """Stem -> number of segments, for the recordings that are complete: segment 0 is written last."""
        found: dict[str, set[int]] = {}
        for file in self.folder.glob("*.npy"):
            match = _SEGMENT.fullmatch(file.name)
            if match:
                found.setdefault(match[1], set()).add(int(match[2]))
        return {stem: len(numbers) for stem, numbers in found.items() if 0 in numbers}

    def pack(
        self, stem: str, windows: np.ndarray, said: dict[str, Any], root: Path, gains: Any
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """What `leave` takes of the windows (n, 12, L) of a recording. Raises UserError for what cannot be kept so."""
        for number in reversed(range(len(windows))):  # the first is last: where it is, all are
            path = self.folder / f"{stem}_{number}.npy"
            yield path, {"ecg": windows[number].astype(np.float64), **_said(said, path, root)}

    def leave(self, packed: Any) -> None:
        """Have there what `pack` returned, in whatever process. Raises UserError where it cannot be written."""
        for path, facts in packed:
            content = np.empty((), object)
            content[()] = facts

            def write(file: IO[bytes], content: np.ndarray = content) -> None:
                np.save(file, content, allow_pickle=True)
                file.flush()
                os.fsync(file.fileno())

            write_atomic(path, write)

    def keep(self, stem: str, made: None) -> None:
        """Of what `leave` returns, in the order of the recordings, in one process."""

    def finish(self) -> dict[str, Any]:
        """What the report says of how they are kept."""
        return {}

    def place(self, stem: str, number: int) -> dict[str, Any]:
        """What the table of records says of where a segment lies, besides its path."""
        return {}


class Shards:
    """Many recordings to a file, as `ecg.shards` says, in their order: the same files from any number of processes.

    A shard is written when SHARD bytes of recordings have come, and counts when the list beside it is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._there: dict[str, shards.Listed] = {one.stem: one for one in shards.listed(folder)}
        taken = {one.shard for one in self._there.values()}
        self._numbers = (number for number in count() if number not in taken)
        self._waiting: list[tuple[str, float, Sequence[bytes]]] = []
        self._bytes = 0  # of what is waiting

    def counts(self) -> dict[str, int]:
        return {stem: len(one.records) for stem, one in self._there.items()}

    def pack(
        self, stem: str, windows: np.ndarray, said: dict[str, Any], root: Path, gains: Any
    ) -> tuple[float, list[bytes]]:
        paths = (self.folder / f"{stem}_{number}.npy" for number in range(len(windows)))
        packed = [
            shards.pack(window, gains, _said(said, path, root)) for window, path in zip(windows, paths, strict=True)
        ]
        return max(error for _, error in packed), [record for record, _ in packed]

    def leave(self, packed: Any) -> tuple[float, list[bytes]]:
        return packed

    def keep(self, stem: str, made: tuple[float, list[bytes]]) -> None:
        self._waiting.append((stem, *made))
        self._bytes += sum(map(len, made[1]))
        if self._bytes >= SHARD:
            self._write()

    def _write(self) -> None:
        shards.write_shard(self.folder, next(self._numbers), self._waiting)
        self._waiting, self._bytes = [], 0

    def finish(self) -> dict[str, Any]:
        if self._waiting:
            self._write()
        self._there = {one.stem: one for one in shards.listed(self.folder)}
        rows = (
            (f"{one.stem}_{n}", offset, size, one.shard, one.first + n)
            for one in self._there.values()
            for n, (offset, size) in enumerate(one.records)
        )
        write_atomic(self.folder / shards.INDEX, lambda file: shards.write_index(file, rows), lasting=True)
        used = {one.shard for one in self._there.values()}
        return {
            "shards": len(used),
            "bytes": sum((self.folder / shards.shard_name(number)).stat().st_size for number in used),
            "largest_error_mv": max(one.error for one in self._there.values()),
        }

    def place(self, stem: str, number: int) -> dict[str, Any]:
        one = self._there[stem]
        return {"shard": shards.shard_name(one.shard), "index": one.first + number}


FORMATS: dict[str, type[NpyFiles] | type[Shards]] = {"npy": NpyFiles, "shards": Shards}


def segment_counts(folder: Path) -> dict[str, int]:
    """Stem -> number of segments, for the recordings that are complete in a folder, in whichever format.

    Raises UserError for shards without their index.
    """
    shards.check_index(folder)
    return FORMATS["shards" if (folder / shards.INDEX).is_file() else "npy"](folder).counts()


def _said(said: dict[str, Any], path: Path, root: Path) -> dict[str, Any]:
    return {**said, "npy_path": path.relative_to(root).as_posix(), "leads": LEADS}


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    write_atomic(path, lambda file: pq.write_table(table, file))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows of texts and whole numbers, with the same keys, as a parquet file, some at a time in memory; no file for no
    rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = iter(rows)
    first = next(left, None)
    if first is None:
        return
    schema = pa.schema([(key, pa.int64() if isinstance(value, int) else pa.string()) for key, value in first.items()])

    def groups() -> Iterator[list[dict[str, Any]]]:
        every = chain([first], left)
        while group := list(islice(every, _GROUP)):
            yield group

    def write(file: IO[bytes]) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            for group in groups():
                writer.write_table(pa.Table.from_pylist(group, schema))

    write_atomic(path, write, lasting=True)


def compact(value: Any) -> str:
    """JSON as it is stored in the column `text`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
