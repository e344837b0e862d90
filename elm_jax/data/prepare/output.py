"""Files that appear whole or not at all, in the forms of the reference."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from elm_jax.data.ecg import LEADS, Recording
from elm_jax.errors import UserError

PTB_XL_FOLDER, PTB_XL_REPORTS = "ptb_xl", "ptb_xl_reports.parquet"


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """`write` into a file beside `path`, then rename it: nobody ever sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(
            str(path), error.strerror or str(error), "a place to write to", "give another --out"
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def compact(value: Any) -> str:
    """JSON as it is stored in the column `text`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
