"""Tables of records looked through for leaks: a patient, or a recording under another name, in more than one split.

A copy is a window that goes up and down with another: the same recording at another gain, rate, resolution or through
another filter, from the same moment on. Copies are found among windows of the same duration.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax.data.prepare.raw import unlike_a_path
from elm_jax.data.prepare.splits import leaks
from elm_jax.data.prepare.work import in_order
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.data.sources import patient_ids, patient_of
from elm_jax.ecg.recording import read_ecg
from elm_jax.errors import UserError, refused
from elm_jax.json_text import parse_json

# Correlation of what two windows do from part to part, from which on they are copies. Of 253 real recordings two of
# other patients have up to 0.68, and one at 100 and at 500 Hz has 0.91 and more.
ALIKE = 0.9
_STEPS, _NUMBERS = 100, 24  # parts of a window; numbers that stand for it in the search
_NEAR = 0.55  # distance of these numbers, up to which two windows are compared
_BATCH = 100_000


@dataclass(frozen=True)
class _Row:
    paths: tuple[str, ...]
    patients: tuple[str, ...]
    split: str


def check_tables(tables: Sequence[Path], root: Path, workers: int = 1, progress: bool = True) -> dict[str, Any]:
    """Counts, `patients_in_several_splits`, `copies` (path: path, correlation) and those of them that are in several
    splits, `copies_in_several_splits`; recordings are below `root`. Recordings that cannot be read are listed.

    Raises:
        UserError: a table cannot be read, or lacks a column.
    """
    rows = [row for table in tables for row in _rows(table)]
    where: dict[str, set[str]] = {}
    for row in rows:
        for path in row.paths:
            where.setdefault(path, set()).add(row.split)
    paths = sorted(where.keys() - {NOISE, FLATLINE})
    found = in_order(partial(_signature, root), paths, workers)
    listed = tqdm(found, "signals", len(paths), unit="window", disable=not progress)
    signatures, unreadable = [], {}
    for path, (numbers, problem) in zip(paths, listed, strict=True):
        signatures.append(numbers)
        if problem:
            unreadable[path] = problem
    copies, across = {}, {}
    for one, other, alike in _copies(root, paths, np.array(signatures, np.float32).reshape(len(paths), -1)):
        pair = f"{one} and {other}"
        copies[pair] = f"{alike:.3f}"
        for splits in leaks((split, (pair,)) for split in where[one] | where[other]).values():
            across[pair] = f"{alike:.3f}, {', '.join(splits)}"
    return {
        "rows": len(rows),
        "recordings": len(paths),
        "patients_in_several_splits": {
            patient: ", ".join(splits) for patient, splits in leaks((row.split, row.patients) for row in rows).items()
        },
        "copies": copies,
        "copies_in_several_splits": across,
        "unreadable": unreadable,
    }


def _rows(table: Path) -> Iterator[_Row]:
    import pyarrow.parquet as pq

    fix = "give a table that prepare wrote"
    with refused(table, "an unreadable table", "a parquet file of records", fix, Exception):
        file = pq.ParquetFile(table)
        names = file.schema_arrow.names
        lacking = [name for name in ("ecg_path", "split") if name not in names]
        if lacking:
            raise UserError(table, f"no column {' and '.join(lacking)}", "records with their splits", fix)
        columns = [name for name in ("ecg_path", "patient_id", "split") if name in names]
        for batch in file.iter_batches(_BATCH, columns=columns):
            for row in batch.to_pylist():
                path = str(row["ecg_path"])
                paths = tuple(map(str, parse_json(path))) if path.startswith("[") else (path,)
                known = patient_ids(row.get("patient_id"))
                yield _Row(paths, known or tuple(patient_of(path, path) for path in paths), str(row["split"]))


def _signature(root: Path, path: str) -> tuple[np.ndarray, str]:
    """Numbers that are near each other for copies, and their duration in s; NaN and the reason where there are none."""
    try:
        if problem := unlike_a_path(path):
            raise UserError(path, problem, f"a recording in {root}", "correct the table")
        changes, seconds = _changes(root / path)
    except UserError as error:
        return np.full(_NUMBERS + 1, np.nan), str(error)
    if not changes.any():
        return np.full(_NUMBERS + 1, np.nan), ""  # flat throughout: no copy of any other
    return np.append(_directions(changes.size) @ changes, seconds), ""


@lru_cache(maxsize=4)
def _directions(size: int) -> np.ndarray:
    """What keeps distances, by and large: (_NUMBERS, size)."""
    return np.random.default_rng(0).normal(size=(_NUMBERS, size)) / _NUMBERS**0.5


def _changes(path: Path) -> tuple[np.ndarray, float]:
    """What all leads do from each part of a window to the next: of unit length, whatever the gain; the window's s."""
    recording = read_ecg(path)
    signal = recording.signal.astype(np.float64)
    edges = np.linspace(0, signal.shape[1], _STEPS + 1).astype(int)
    sums = np.cumsum(np.pad(signal, ((0, 0), (1, 0))), axis=1)[:, edges]
    changes = np.diff(np.diff(sums, axis=1) / np.maximum(np.diff(edges), 1), axis=1).ravel()
    size = np.linalg.norm(changes)
    return changes / size if size > 1e-9 else np.zeros_like(changes), signal.shape[1] / recording.sampling_rate


def _copies(root: Path, paths: Sequence[str], signatures: np.ndarray) -> Iterator[tuple[str, str, float]]:
    """Pairs of copies, with their correlation."""
    from scipy.spatial import KDTree

    usable = np.flatnonzero(np.isfinite(signatures).all(1)) if len(signatures) else np.zeros(0, int)
    for seconds in np.unique(signatures[usable, -1]):
        rows = usable[signatures[usable, -1] == seconds]
        pairs = KDTree(signatures[rows, :-1]).query_pairs(_NEAR, output_type="ndarray")
        for one, other in sorted((int(one), int(other)) for one, other in rows[pairs]):
            alike = float(_changes(root / paths[one])[0] @ _changes(root / paths[other])[0])
            if alike >= ALIKE:
                yield paths[one], paths[other], alike
