"""The folder of an index of recordings, as `retrieval.build` leaves it.

index.json: how it was made, and its parts, each with a checksum of its files. part-00000.safetensors: features (n, F)
and, where they were asked for, signals (n, C * L), float32; whom its entries are about, as hashes, with their rows.
part-00000.parquet: ecg_path, patient_id, study and report of each. scale.safetensors: means and deviations of the
columns, float64. index.json has the sizes of a part's files, and the checksum of the scale. What a file claims is held
against what it should be before it is believed; arrays are mapped into memory, and texts read when they are asked for.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from elm_jax import compat as behaviours
from elm_jax.ecg.features import NAMES, PER_LEAD
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError, refused
from elm_jax.folders import check_regular, file_checksum, read_json, sealed
from elm_jax.weights.safetensors import Safetensors

INDEX, SCALE, KEY = "index.json", "scale.safetensors", "retrieval.index"
VERSION = 1
COLUMNS = ("ecg_path", "patient_id", "study", "report")
MOST_TEXT = 1 << 20  # bytes of a report
VECTORS, TEXTS = ".safetensors", ".parquet"  # the files of a part
DECIDING = ("lead_order", "spline_resampling", "feature_windows")  # compat names that make other vectors
_FIX = "build it again with python -m elm_jax.index, or name another"
_EXPECTED = "an index that python -m elm_jax.index has left"
_PTB_XL = re.compile(r"records(?:100|500)[_/]\d{5}[_/](\d{5})_[hl]r")
_MIMIC = re.compile(r"(?:^|[_/])s(\d{6,})(?=[_/.]|$)")
_SEGMENT = re.compile(r"_\d+\.npy$")
_ENDING = re.compile(r"\.\w{1,5}$")


@dataclass(frozen=True)
class Entry:
    """One recording of an index; `patients` are as a record has them, `features` (F,) float32."""

    row: int
    path: str
    patients: tuple[str, ...]
    study: str
    report: str
    features: np.ndarray


@dataclass(frozen=True)
class Facts:
    """What index.json says of how the vectors were made: samples, Hz, whether there are signals, by which compat names
    of DECIDING."""

    length: int
    sampling_rate: float
    signals: bool
    compat: tuple[str, ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        """The columns of each array."""
        return {"features": len(LEADS) * PER_LEAD} | ({"signals": len(LEADS) * self.length} if self.signals else {})


def deciding(compat: Iterable[str]) -> tuple[str, ...]:
    """Which of DECIDING are asked for."""
    return tuple(name for name in DECIDING if behaviours.enabled(name, compat))


def study_of(path: str) -> str:
    """What all segments and copies of one recording are called: PTB-XL's and MIMIC's numbers; of prepare's segments the
    name without their number; else the path without the ending. Of a generated one all of it."""
    if found := _PTB_XL.search(path):
        return f"ptb_xl {found[1]}"
    if found := _MIMIC.findall(path):
        return f"mimic {found[-1]}"
    if "preprocessed" in path:
        return _SEGMENT.sub("", path).rpartition("/")[2]
    return _ENDING.sub("", posixpath.normpath(path))


def hash_of(kind: str, name: str) -> int:
    """Of a patient or a study, as parts have it."""
    return xxhash.xxh3_64_intdigest(f"{kind} {name}".encode(errors="surrogatepass"))


class Index:
    """N recordings with their vectors, patients and reports.

    Raises:
        UserError: the folder is none, is damaged, or claims what it does not hold; names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            found = f"{folder} without {INDEX}" if self.folder.is_dir() else f"no folder {folder}"
            raise UserError(KEY, found, _EXPECTED, "build it, or correct the path")
        said = read_json(path, _FIX)
        if not sealed(said) or said.get("format") != VERSION or said.get("names") != list(NAMES):
            raise UserError(path, "other content than was written, or of another version", _EXPECTED, _FIX)
        match said:
            case {"segment_len": int(length), "sampling_rate": int(rate) | float(rate), "parts": [_, *_] as parts,
                  "compat": list(names), "signals": bool(signals)}:  # fmt: skip
                by = tuple(name for name in DECIDING if name in names)
                self.facts, self.reports = Facts(length, rate, signals, by), said.get("reports", 0)
            case _:
                raise UserError(path, "an index without parts, or without what they are", _EXPECTED, _FIX)
        self.fingerprint = str(said["checksum"])
        self.sizes = np.array([self._size(path, number, part) for number, part in enumerate(parts)])
        self.starts = np.append(0, np.cumsum(self.sizes))
        scale = self.folder / SCALE
        with refused(scale, "", _EXPECTED, _FIX, OSError):
            if not scale.is_file() or file_checksum(scale) != said.get("scale"):
                raise UserError(scale, "other content than was written", _EXPECTED, _FIX)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _size(self, path: Path, number: int, part: Any) -> int:
        match part:
            case {"name": str(name), "entries": int(entries), "bytes": [int(vectors), int(texts)]} if (
                name == part_name(number) and 0 < entries < 1 << 31
            ):
                said, found = (vectors, texts), bytes_of(path.parent, number)
                for ending, size, real in zip((VECTORS, TEXTS), said, found, strict=True):
                    if size != real:
                        raise UserError(
                            path.with_name(name + ending), f"{real} bytes", f"{size}, as {INDEX} says", _FIX
                        )
                return entries
        raise UserError(path, f"part {number} as {str(part)[:60]}", f"{part_name(number)} and its entries", _FIX)

    def blocks(self, names: Sequence[str]) -> Iterable[tuple[int, list[np.ndarray]]]:
        """For each part its first row and its arrays of these names, mapped."""
        for number, start in enumerate(self.starts[:-1].tolist()):
            yield start, [self._arrays(number)[name] for name in names]

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """These rows (n,) of an array: (n, columns), in their order."""
        found = np.empty((len(rows), self.facts.widths[name]), np.float32)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(which).tolist():
            places = np.flatnonzero(which == number)
            found[places] = self._arrays(number)[name][rows[places] - self.starts[number]]
        return found

    @cached_property
    def scale(self) -> Mapping[str, np.ndarray]:
        """Mean and deviation of the columns, as `features_mean` and so on."""
        found = Safetensors(self.folder / SCALE)
        for name, width in self.facts.widths.items():
            for what in ("mean", "deviation"):
                self._check(found, f"{name}_{what}", np.float64, (width,))
                if not np.isfinite(found[f"{name}_{what}"]).all():
                    raise UserError(found.path, f"{name}_{what} that is not finite", "finite numbers", _FIX)
        return found

    @cached_property
    def _owners(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of patients and studies, sorted, and the row of each."""
        hashes, rows = [], []
        for start, (one, row) in self.blocks(("owners", "owned")):
            hashes.append(one)
            rows.append(row.astype(np.int64) + start)
        order = np.argsort(found := np.concatenate(hashes), kind="stable")
        return found[order], np.concatenate(rows)[order]

    def owned(self, owners: Iterable[int]) -> np.ndarray:
        """The rows that are about one of these hashes, sorted."""
        hashes, rows = self._owners
        spans = (np.searchsorted(hashes, np.uint64(owner), side) for owner in owners for side in ("left", "right"))
        ends = list(map(int, spans))
        return np.unique(np.concatenate([rows[:0], *(rows[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True))]))

    def about(self, rows: Iterable[int]) -> set[int]:
        """The hashes of those whom these rows are about."""
        found = set[int]()
        for row in rows:
            number = int(np.searchsorted(self.starts, row, side="right")) - 1
            part = self._arrays(number)
            place = np.int32(row - self.starts[number])
            first, last = (int(np.searchsorted(part["owned"], place, side)) for side in ("left", "right"))
            found.update(part["owners"][first:last].tolist())
        return found

    def entry(self, row: int) -> Entry:
        """What is known of a row. Raises UserError where its texts are not as they should be."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        place = row - int(self.starts[number])
        file = self._texts(number)
        path = self.folder / f"{part_name(number)}{TEXTS}"
        with refused(path, "", "the texts of the part's recordings", _FIX, Exception):  # Arrow has errors of its own
            group = 0
            while place >= (size := file.metadata.row_group(group).num_rows):
                place, group = place - size, group + 1
            told = file.read_row_group(group, columns=list(COLUMNS)).slice(place, 1).to_pylist()[0]
        if not all(isinstance(told[name], str) for name in COLUMNS) or len(told["report"].encode()) > MOST_TEXT:
            raise UserError(path, f"row {row} with other texts", ", ".join(COLUMNS), _FIX)
        patients = tuple(filter(None, told["patient_id"].split("+")))
        features = self.rows("features", np.array([row]))[0]
        return Entry(row, told["ecg_path"], patients, told["study"], told["report"], features)

    @lru_cache(4096)  # noqa: B019 (an index lives as long as the process)
    def _arrays(self, number: int) -> Safetensors:
        found = Safetensors(self.folder / f"{part_name(number)}{VECTORS}")
        size = int(self.sizes[number])
        for name, width in self.facts.widths.items():
            self._check(found, name, np.float32, (size, width))
        count = found.info["owners"].shape if "owners" in found.info else None
        self._check(found, "owners", np.uint64, count)
        self._check(found, "owned", np.int32, count)
        rows = found["owned"]
        if len(rows) and not (0 <= rows[0] <= rows[-1] < size and (rows[:-1] <= rows[1:]).all()):
            raise UserError(found.path, "owners of other rows", f"rows below {size}, in their order", _FIX)
        return found

    @lru_cache(4096)  # noqa: B019
    def _texts(self, number: int) -> Any:
        import pyarrow.parquet as pq

        path = self.folder / f"{part_name(number)}{TEXTS}"
        check_regular(path, "a Parquet file", _FIX)
        with refused(path, "", "a Parquet file of texts", _FIX, Exception):
            file = pq.ParquetFile(path, memory_map=True)
            schema = {field.name: str(field.type) for field in file.schema_arrow}
            metadata = file.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        large = max((group.total_byte_size for group in groups), default=0)
        fits = large <= 1 << 28 and sum(group.num_rows for group in groups) == self.sizes[number]
        if not fits or any(schema.get(name) != "string" for name in COLUMNS):
            raise UserError(path, f"{metadata.num_rows} rows of {', '.join(schema)}", "the part's recordings", _FIX)
        return file

    def _check(self, found: Safetensors, name: str, dtype: Any, shape: tuple[int, ...] | None) -> None:
        info = found.info.get(name)
        if info is None or info.dtype != dtype or info.shape != shape or len(info.shape) > 2:
            seen = "no such array" if info is None else f"{info.dtype} {info.shape}"
            raise UserError(found.path, f"{name}: {seen}", f"{np.dtype(dtype)} {shape}", _FIX)


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def bytes_of(folder: Path, number: int) -> list[int]:
    """The sizes of a part's files: of its vectors and its texts, 0 where there is none."""
    files = (folder / f"{part_name(number)}{ending}" for ending in (VECTORS, TEXTS))
    return [os.path.getsize(file) if file.is_file() else 0 for file in files]


@lru_cache(8)
def opened(folder: str) -> Index:
    """The index in a folder, opened once."""
    return Index(folder)
