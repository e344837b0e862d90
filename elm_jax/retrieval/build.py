"""Building an index: features of recordings, with their reports and patients, part by part."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash
from tqdm import tqdm

import elm_jax
from elm_jax import compat as behaviours
from elm_jax import stopping
from elm_jax.config import DataConfig
from elm_jax.data.prepare.work import in_order
from elm_jax.data.represent import FLATLINE, NOISE, SignalSpec
from elm_jax.data.sources import Record, Split, load_records
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.features import ALL_BANDS, NAMES, ecg_features
from elm_jax.errors import UserError, printable
from elm_jax.folders import (
    another,
    claim_folder,
    file_checksum,
    json_if_whole,
    leave_folder,
    seal,
    write_atomic,
    write_json,
)
from elm_jax.retrieval.index import (
    COLUMNS,
    INDEX,
    MOST_TEXT,
    SCALE,
    TEXTS,
    VECTORS,
    VERSION,
    Facts,
    bytes_of,
    deciding,
    hash_of,
    part_name,
    study_of,
)
from elm_jax.text.turns import to_turns
from elm_jax.weights.safetensors import Safetensors, SafetensorsWriter, save_safetensors

SPLITS = ("train", "val", "test")
_PART, _LEAST_PART, _MOST_BYTES = 16_384, 256, 1 << 28  # entries of a part, at most and at least, and its bytes
_GROUP = 128  # rows of a Parquet file that are read at a time
_NAMED = 20  # recordings left out that index.json names
_SETTINGS = "settings.json"
_REPORT = "report"  # the name of prepare's conversations whose answer is the report


class Item(NamedTuple):
    """A recording that is to be an entry."""

    path: str
    patient: str
    report: str


@dataclass(frozen=True)
class _Maker:
    """Computes the vectors of an item: by the arrays' names, or what is wrong with it."""

    spec: SignalSpec
    signals: bool

    def __call__(self, item: Item) -> dict[str, np.ndarray] | str:
        if (size := len(item.report.encode(errors="replace"))) > MOST_TEXT:
            return f"{item.path}: a report of {size} bytes, more than {MOST_TEXT}"
        try:
            raw = self.spec.load_raw(item.path, 0)
        except UserError as error:
            return str(error)
        found = {"features": ecg_features(raw, self.spec.sampling_rate, self.spec.compat).astype(np.float32)}
        found |= {"signals": raw.reshape(-1).astype(np.float32)} if self.signals else {}
        bad = [name for name, x in found.items() if not np.isfinite(x).all()]
        return f"{item.path}: {bad[0]} that are not finite" if bad else found


def build_index(
    data: DataConfig, out: Path, splits: Sequence[str] = ("train",), signals: bool = False, workers: int = 1,
    compat: tuple[str, ...] = (), progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Leave in `out` an index of the recordings of `data.names` in these splits; returns (and writes) what it holds.

    Each ECG of a record with one ECG is an entry once: at `data.sampling_rate`, `data.segment_len` samples, with the
    record's report: its column, a text without a question, or the answer of a conversation called report. What a
    stopped build has left whole is kept; files do not depend on `workers`. At most a part is in memory. Recordings
    that cannot be read are named on stderr and left out.

    Raises:
        UserError: no such records, none that can be read, or a folder that holds another index.
    """
    behaviours.check(compat)
    for split in splits:
        if split not in SPLITS:
            raise UserError("--splits", repr(split), f"some of {', '.join(SPLITS)}", "correct it")
    facts = Facts(data.segment_len, data.sampling_rate, signals, deciding(compat))
    if "feature_windows" in facts.compat and facts.length < ALL_BANDS:
        found = f"{facts.length} with compat feature_windows, which then has fewer numbers"
        raise UserError("--segment-len", found, f"{ALL_BANDS} or more", "lengthen it, or leave feature_windows out")
    settings = {
        "format": VERSION, "names": list(NAMES), "datasets": list(data.names), "splits": list(splits),
        "segment_len": facts.length, "sampling_rate": facts.sampling_rate, "signals": signals,
        "compat": list(facts.compat),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    if other := claim_folder(out, "build into it once at a time"):
        raise UserError("--out", f"{out}, into which {other} builds", "one at a time", "wait, or give another")
    try:
        _check_settings(out, settings)
        for left in out.glob(".*.*.????????"):  # a write that was cut off
            left.unlink()
        write_json(out / _SETTINGS, settings)
        return _build(data, out, splits, facts, settings, workers, compat, progress)
    finally:
        leave_folder(out)


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    before = json_if_whole(out / _SETTINGS)
    for key, value in settings.items() if before else ():
        if before.get(key) != value:
            found = f"an index with {key} {before.get(key)}"
            raise UserError("--out", f"{out}, {found}", f"{key} {value}", "give another folder")
    if not before and any(path.name != ".lock" for path in out.iterdir()):
        raise UserError("--out", f"{out}, which holds other files", "a folder for the index alone", "give another")


def _build(
    data: DataConfig, out: Path, splits: Sequence[str], facts: Facts, settings: dict[str, Any], workers: int,
    compat: tuple[str, ...], progress: bool,
) -> dict[str, Any]:  # fmt: skip
    spec = replace(signal_spec(data, 0, compat=compat), leads=tuple(range(12)))
    size = max(_LEAST_PART, min(_PART, _MOST_BYTES // (4 * sum(facts.widths.values()))))
    parts, left_out, moments = list[dict[str, Any]](), dict[str, str](), dict[str, _Moments]()
    number = patients = reports = 0
    with tqdm(desc="reading recordings", unit="ECG", disable=not progress, mininterval=1) as bar:
        for items in _chunks(stopping.each(_items(data, splits), "recording"), size):
            stem = out / part_name(number)
            made = hashlib.sha256(repr((settings, items, [spec.stamp(item.path) for item in items])).encode())
            part = _kept(stem, made.hexdigest())
            if part is None:
                (out / INDEX).unlink(missing_ok=True)  # of an index that is no more
                part = _write_part(stem, items, _Maker(spec, facts.signals), facts, workers, made.hexdigest(), bar)
                for why in part["left_out"].values():
                    print(printable(f"left out: {why}"), file=sys.stderr)
            else:
                bar.update(len(items))
            left_out |= part["left_out"]
            if part["entries"]:
                arrays = Safetensors(stem.with_suffix(VECTORS))
                for name in facts.widths:
                    moments[name] = moments.get(name, _Moments()).with_rows(arrays[name])
                told = {name: part[name] for name in ("entries", "vectors", "texts")}
                parts.append({"name": part_name(number), "bytes": bytes_of(out, number), **told})
                patients, reports = patients + part["patients"], reports + part["reports"]
                number += 1
    if not parts:
        first = next(iter(left_out.values()), "")
        found = f"no recording that can be read ({first})" if left_out else "no record with one ECG"
        raise UserError(", ".join(data.names), found, "at least one", "correct the datasets, or data.root")
    scale = {f"{name}_{what}": x for name, one in moments.items() for what, x in one.scale.items()}
    write_atomic(out / SCALE, lambda file: save_safetensors(another(file), scale), lasting=True)
    said = {
        **settings, "made_by": f"elm_jax {elm_jax.__version__}", "entries": sum(part["entries"] for part in parts),
        "reports": reports, "left_out": len(left_out), "such_as": dict(itertools.islice(left_out.items(), _NAMED)),
        "scale": file_checksum(out / SCALE), "parts": parts,
    }  # fmt: skip
    write_json(out / INDEX, seal(said))
    return said


def _items(data: DataConfig, splits: Sequence[str]) -> Iterator[Item]:
    """The recordings, each once: what its first record says."""
    seen = set[int]()
    for split in splits:
        for record in load_records(replace(data, val_fraction=0.0, subset=None), cast(Split, split), 0):
            path, *others = record.ecg_paths or ("",)
            hashed = xxhash.xxh3_64_intdigest(path.encode(errors="surrogatepass"))
            if others or path in ("", NOISE, FLATLINE) or hashed in seen:
                continue
            seen.add(hashed)
            yield Item(path, record.patient, _report_of(record))


def _report_of(record: Record) -> str:
    if record.report:
        return record.report
    if isinstance(record.text, str):
        return record.text.strip()
    if record.name != _REPORT:
        return ""
    return " ".join(turn.text for turn in to_turns(record.text) if turn.role == "assistant").strip()


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _kept(stem: Path, made: str) -> dict[str, Any] | None:
    """What a part says of itself, where it is whole and made of the same."""
    part = json_if_whole(stem.with_suffix(".json"))
    if part.get("made") != made:
        return None
    files = {"vectors": stem.with_suffix(VECTORS), "texts": stem.with_suffix(TEXTS)}
    whole = all(path.is_file() and file_checksum(path) == part.get(what) for what, path in files.items())
    return part if whole or not part.get("entries") else None


def _write_part(
    stem: Path, items: Sequence[Item], maker: _Maker, facts: Facts, workers: int, made: str, bar: Any
) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept, left_out, arrays = list[Item](), dict[str, str](), {name: list[np.ndarray]() for name in facts.widths}
    for item, found in zip(items, in_order(maker, items, workers), strict=True):
        bar.update()
        if isinstance(found, str):
            left_out[item.path] = found
            continue
        kept.append(item)
        for name, row in found.items():
            arrays[name].append(row)
    said = {"made": made, "entries": len(kept), "left_out": left_out}
    said |= {"patients": len({item.patient for item in kept}), "reports": sum(bool(item.report) for item in kept)}
    if kept:
        owners = [(hash_of(*owner), row) for row, item in enumerate(kept) for owner in owners_of(item)]
        hashes, rows = zip(*owners, strict=True)
        layout = {name: (np.dtype(np.float32), (len(kept), width)) for name, width in facts.widths.items()}
        small = {"owners": np.array(hashes, np.uint64), "owned": np.array(rows, np.int32)}
        layout |= {name: (x.dtype, x.shape) for name, x in small.items()}

        def vectors(file: Any) -> None:
            writer = SafetensorsWriter(another(file), layout)
            for name, rows in arrays.items():
                writer.write_pieces(name, rows)
            for name, x in small.items():
                writer.write(name, x)
            writer.close()

        columns = [[x.path, x.patient, study_of(x.path), x.report] for x in kept]
        table = pa.table(dict(zip(COLUMNS, zip(*columns, strict=True), strict=True)))
        write_atomic(stem.with_suffix(VECTORS), vectors, lasting=True)
        write_atomic(
            stem.with_suffix(TEXTS), lambda file: pq.write_table(table, file, row_group_size=_GROUP), lasting=True
        )
        said |= {"vectors": file_checksum(stem.with_suffix(VECTORS))}
        said |= {"texts": file_checksum(stem.with_suffix(TEXTS))}
    write_json(stem.with_suffix(".json"), said)
    return said


def owners_of(item: Item) -> Iterator[tuple[str, str]]:
    """Whom an entry is about: its patients and its study."""
    yield from (("patient", one) for one in item.patient.split("+"))
    yield "study", study_of(item.path)


class _Moments(NamedTuple):
    """Number, mean and sum of squared differences of rows, in float64, whatever the order of parts has them rounded to
    (Chan et al. 1979)."""

    count: int = 0
    mean: Any = 0.0
    squares: Any = 0.0

    def with_rows(self, rows: np.ndarray) -> _Moments:
        count, mean = len(rows), rows.mean(0, dtype=np.float64)
        squares = np.zeros_like(mean)
        for first in range(0, count, 256):
            away = rows[first : first + 256] - mean
            squares += np.einsum("nd,nd->d", away, away)
        total, away = self.count + count, mean - self.mean
        squares = self.squares + squares + away**2 * (self.count * count / total)
        return _Moments(total, self.mean + away * (count / total), squares)

    @property
    def scale(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "deviation": np.sqrt(self.squares / self.count)}
