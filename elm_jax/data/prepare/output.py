"""Files that appear whole or not at all, in the forms of the reference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.ecg.recording import LEADS, Recording
from elm_jax.folders import write_atomic


def write_segment(
    path: Path, root: Path, window: np.ndarray, source: Recording, ecg_path: str, rate: float
) -> None:
    """One segment (12, L) as the reference's pickled dictionary, float64, with the leads' names besides.

    Readable by `numpy.load(path, allow_pickle=True).item()`.
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
    write_atomic(path, lambda file: np.save(file, content, allow_pickle=True))


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    write_atomic(path, lambda file: pq.write_table(table, file))


def compact(value: Any) -> str:
    """JSON as it is stored in the column `text`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
