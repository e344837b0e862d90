"""Files that appear whole or not at all, in the forms of the reference."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from elm_jax.ecg.recording import LEADS, Recording
from elm_jax.folders import write_atomic

_GROUP = 50_000  # rows that are in memory at a time


def write_segment(path: Path, root: Path, window: np.ndarray, source: Recording, ecg_path: str, rate: float) -> None:
    """One segment (12, L) as the reference's pickled dictionary, float64, with the leads' names besides.

    What bears the name is whole, also after a loss of power: its bytes are on the disk before it is called so. Readable
    by `numpy.load(path, allow_pickle=True).item()`.
    """
    record = {
        "ecg": window.astype(np.float64),
        "report": source.report,
        "ecg_path": ecg_path,
        "original_sf": source.sampling_rate,
        "target_sf": rate,
        "segment_len": window.shape[1],
        "npy_path": path.relative_to(root).as_posix(),
        "leads": LEADS,
    }
    content = np.empty((), object)
    content[()] = record

    def write(file: IO[bytes]) -> None:
        np.save(file, content, allow_pickle=True)
        file.flush()
        os.fsync(file.fileno())

    write_atomic(path, write)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    write_atomic(path, lambda file: pq.write_table(table, file))


def write_texts(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Rows of texts with the same keys as a parquet file, some at a time in memory; no file for no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = iter(rows)
    first = next(left, None)
    if first is None:
        return
    schema = pa.schema([(key, pa.string()) for key in first])

    def groups() -> Iterator[list[dict[str, str]]]:
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
