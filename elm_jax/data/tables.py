"""Where records come from: dataset names of the Hugging Face hub, local files and folders, the demo.

A Source gives, per split, parts: rows of one table. Tables stay what they are (memory-mapped Arrow, or a
sequence of dictionaries); nothing here turns rows into Python objects before they are asked for.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from elm_jax.errors import UserError, nearest
from elm_jax.json_text import parse_json

_log = logging.getLogger(__name__)

OWNERS = ("ELM-Research", "willxxy")
FOLDS = 5  # of the datasets on the hub
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "test": "test",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}
KINDS = ("question_type", "attribute_type", "attribute", "template_id")  # of ECG-QA, to score by
COLUMNS = ("ecg_path", "text", "name", "patient_id", "split", *KINDS)
_CHUNK = 100_000
SUFFIXES = (".parquet", ".json", ".jsonl")

# The families of dataset names: (pattern, an example to show).
_LENGTHS = r"250-(500|1250|2500)"
_PAIRS = "(ecg-flatline|ecg-noise|noise-flatline)"
FAMILIES = (
    (rf"ecg-qa-(ptbxl|mimic-iv-ecg)-{_LENGTHS}", "ecg-qa-ptbxl-250-2500"),
    (rf"pretrain-mimic-{_LENGTHS}", "pretrain-mimic-250-2500"),
    (rf"ecg-instruct-45k-{_LENGTHS}", "ecg-instruct-45k-250-2500"),
    (rf"ecg-instruct-pulse-{_LENGTHS}", "ecg-instruct-pulse-250-2500"),
    (rf"ecg-bench-pulse-{_LENGTHS}", "ecg-bench-pulse-250-2500"),
    (r"ecg-grounding-250-2500", "ecg-grounding-250-2500"),
    (r"ecg-comp-ecg-noise-flatline-(20|40|60)000-250-2500", "ecg-comp-ecg-noise-flatline-20000-250-2500"),
    (rf"ecg-comp-{_PAIRS}-(30|40|60|80|90|120)000-250-2500", "ecg-comp-ecg-noise-30000-250-2500"),
    (
        r"ecg-comprehension-(r-peak-count|bpm-int|bpm-float)-[123]00000-250-2500",
        "ecg-comprehension-bpm-int-100000-250-2500",
    ),
    (
        r"ecg-comprehension-r-peak-count-789480-(5|10|20)000-250-2500",
        "ecg-comprehension-r-peak-count-789480-5000-250-2500",
    ),
    (r"ecg-qa-cot(-not-cot)?", "ecg-qa-cot"),
    (r"(base|rl|ecg-instruct)-ecg-r1|ecg-r1-no-rl", "base-ecg-r1"),
    (r"pretrain-agh(8|9|10)", "pretrain-agh8"),
)


class Table(Protocol):
    """Rows by number, each a dictionary with some of COLUMNS."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Part:
    """The rows of a table that belong to a split. A row's id is `label` followed by `offset` + row.

    Ids differ within a dataset, between its splits too.
    """

    table: Table
    rows: np.ndarray
    offset: int
    label: str

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self.table, self.rows, self.offset, self.label)

    def row(self, index: int) -> Mapping[str, Any]:
        """The row number `index` of the part: at least those of COLUMNS that the table has."""
        number, columns = int(self.rows[index]), self._columns
        return self.table[number] if columns is None else {name: c[number].as_py() for name, c in columns.items()}

    @cached_property
    def _columns(self) -> dict[str, Any] | None:
        """Arrow's own columns where they hold plain values: ten times as fast as a row of the library; else None."""
        table: Any = self.table
        features = getattr(table, "features", None)
        if features is None or getattr(table, "_indices", None) is not None:
            return None
        present = [name for name in COLUMNS if name in features]
        plain = all(type(features[name]).__name__ == "Value" for name in present)
        return {name: table.data.column(name) for name in present} if plain else None


def identities(part: Part) -> Iterator[tuple[Any, Any]]:
    """(ecg_path, patient_id or None) of every row, without its text."""
    table: Any = part.table
    if not hasattr(table, "select_columns"):
        rows = (part.table[int(row)] for row in part.rows)
        yield from ((row["ecg_path"], row.get("patient_id")) for row in rows)
        return
    known = "patient_id" in table.column_names
    columns = table.select_columns(["ecg_path", "patient_id"] if known else ["ecg_path"])
    for start in range(0, len(part.rows), _CHUNK):
        values = columns[part.rows[start : start + _CHUNK]]
        paths = values["ecg_path"]
        yield from zip(paths, values["patient_id"] if known else [None] * len(paths), strict=True)


class Source(Protocol):
    """One dataset."""

    def parts(self, split: str) -> list[Part]:
        """The rows of "train", "val" or "test"; [] when the dataset has no such split."""
        ...


def open_source(name: str, root: str, fold: int) -> Source:
    """The dataset called `name`: the demo, a file or folder (under `root` or as given), or a name on the hub.

    Raises UserError for a name that is none of these, a missing file, or a file that holds no records.
    """
    if name == "demo" or name.startswith("demo:"):
        return _Demo(name)
    path = _local(name, root)
    if path is not None:
        return _Files(name, path, fold)
    if any(re.fullmatch(pattern, name) for pattern, _ in FAMILIES):
        return _Hub(name, fold)
    if name.endswith(SUFFIXES) or "/" in name:
        raise UserError(
            "data.names", f"no file or folder {name}", f"one below data.root ({root})", _fix(name, root)
        )
    examples = [example for _, example in FAMILIES] + ["demo"]
    raise UserError(
        "data.names",
        f"the unknown dataset {name}",
        f"a .parquet, .json or .jsonl file, a folder of them, or a name like {', '.join(examples)}",
        nearest(name, examples) or "give the path of a local file",
    )


def _fix(name: str, root: str) -> str:
    """What to do about a path that is not there, and may be meant for a URL or an id of the hub."""
    owner, _, last = name.rpartition("/")
    if "://" in name:
        return "download it, and give its path: nothing is fetched from a URL"
    if owner in OWNERS and any(re.fullmatch(pattern, last) for pattern, _ in FAMILIES):
        return f"give its name alone, --config.data.names={last}, to read it from the hub"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(SUFFIXES):
        command = f"hf download {name} --repo-type dataset --local-dir {Path(root, name)}"
        return f"correct the path; if it is a dataset of the hub, download it: {command}"
    return "correct the path"


def _local(name: str, root: str) -> Path | None:
    return next((path for path in (Path(root, name), Path(name)) if path.exists()), None)


class _Demo:
    def __init__(self, name: str) -> None:
        self.name = name

    def parts(self, split: str) -> list[Part]:
        from elm_jax.data.demo import demo_records

        table = demo_records(split, self.name)
        return [Part(table, np.arange(len(table)), 0, f"{self.name}:{split}:")] if len(table) else []


class _Hub:
    """`fold{k}_train` and `fold{k}_test` of a dataset on the Hugging Face hub; it has no validation split."""

    def __init__(self, name: str, fold: int) -> None:
        if not 1 <= fold <= FOLDS:
            raise UserError("data.fold", str(fold), f"1 to {FOLDS}", "correct it")
        self.name, self.fold = name, fold

    def parts(self, split: str) -> list[Part]:
        if split == "val":
            return []
        fold = f"fold{self.fold}_{split}"
        table = _plain(self.name, self._load(fold))
        return [Part(table, np.arange(len(table)), 0, f"{self.name}:{fold}:")]

    def _load(self, split: str) -> Any:
        import datasets
        from datasets.exceptions import DatasetNotFoundError

        problem: Exception | None = None
        for owner in OWNERS:
            try:
                return datasets.load_dataset(f"{owner}/{self.name}", split=split)
            except DatasetNotFoundError as error:
                problem = error
            except Exception as error:  # the hub's clients raise errors of many libraries
                problem = error
                break
        raise UserError(
            f"data.names: {self.name}",
            f"no dataset to download ({problem})",
            f"{' or '.join(f'{owner}/{self.name}' for owner in OWNERS)} on the hub, with split {split}",
            f"put its parquet files into the folder {self.name} under data.root to use it without the hub",
        )


class _Files:
    """A file, a folder of files, or a saved Hugging Face dataset.

    A row belongs to the split that its `split` column names (train, val, test, or fold{k}_train ... for
    data.fold); without the column, to the split in its file's name (train.jsonl, fold1_test-00000.parquet);
    else to train.
    """

    def __init__(self, name: str, path: Path, fold: int) -> None:
        self.name, self.fold = name, fold
        self.tables = list(_tables(path))
        if not self.tables:
            raise UserError(str(path), "no records", f"files {', '.join(SUFFIXES)}", "check the folder")

    def parts(self, split: str) -> list[Part]:
        parts, offset = [], 0
        for where, default, table in self.tables:
            rows = self._rows(table, split, default, where)
            if len(rows):
                parts.append(Part(table, rows, offset, f"{self.name}:"))
            offset += len(table)
        return parts

    def _rows(self, table: Any, split: str, default: str | None, where: str) -> np.ndarray:
        if "split" not in table.column_names:
            chosen = split == self._split_of(default, where) if default else split == "train"
            return np.arange(len(table) if chosen else 0)
        labels = table["split"][:]
        chosen = {label for label in set(labels) if self._split_of(label, where) == split}
        return np.flatnonzero([label in chosen for label in labels])

    def _split_of(self, value: str, where: str) -> str | None:
        """The split that a label means for this fold; None for another fold's."""
        match = re.fullmatch(r"(?:fold(\d+)_)?(\w+)", str(value))
        name = SPLIT_NAMES.get(match[2].lower()) if match else None
        if match is None or name is None:
            raise UserError(
                where, f"split {value!r}", "train, val, test or fold1_train ...", "correct the column split"
            )
        return name if match[1] in (None, str(self.fold)) else None


_SPLIT_IN_NAME = re.compile(r"^((?:fold\d+_)?(?:train|valid|validation|val|dev|test))(?=$|[-_.])")


def _tables(path: Path) -> Iterator[tuple[str, str | None, Any]]:
    """(where, split in the name, table) of every file."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        with _unreadable(path, "a saved dataset"):
            saved: Any = datasets.load_from_disk(str(path))
        for split, table in saved.items() if isinstance(saved, dict) else [(None, saved)]:
            where = f"{path}{f'/{split}' if split else ''}"
            yield where, split, _plain(where, table)
        return
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    for file in files:
        match = _SPLIT_IN_NAME.match(file.stem)
        yield str(file), match[1] if match else None, _open(file)


def _open(file: Path) -> Any:
    import datasets

    if file.suffix != ".parquet":
        return datasets.Dataset(_json_table(file))
    return _plain(str(file), _as_arrow(file))


def _as_arrow(file: Path) -> Any:
    """A Parquet file's COLUMNS as a table mapped into memory, of an Arrow file that is kept by the file's content.

    One that is damaged is written again.

    What the file says of its columns beyond their types (`datasets` features, pandas' metadata) is left out: a
    feature may have what a row names fetched.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import config

    with _unreadable(file, "a parquet file"):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(repr(COLUMNS).encode(), digest_size=16))
        kept = Path(config.HF_DATASETS_CACHE, "elm_jax", f"{digest.hexdigest()}.arrow")
        with pq.ParquetFile(file) as table:
            if not table.metadata.num_rows:
                raise UserError(str(file), "no records", "rows of ecg_path and text", "check the file")
            if kept.is_file():
                with contextlib.suppress(Exception):  # whatever is wrong with it
                    known = datasets.Dataset.from_file(str(kept))
                    if len(known) == table.metadata.num_rows:
                        return known
                _log.warning("%s is damaged: it is written again", kept)
            fields = [table.schema_arrow.field(i) for i in range(len(table.schema_arrow))]
            _check_columns(str(file), [field.name for field in fields])
            types = {f.name: f.type for f in fields if f.name in COLUMNS}
            plain = {n: t.value_type if pa.types.is_dictionary(t) else t for n, t in types.items()}
            for name, kind in plain.items():
                try:
                    datasets.Features.from_arrow_schema(pa.schema([(name, kind)]))
                except (ValueError, NotImplementedError):
                    raise _not_plain(str(file), name, kind) from None
            _write_arrow(kept, pa.schema(list(plain.items())), file, table)
        return datasets.Dataset.from_file(str(kept))


def _write_arrow(kept: Path, schema: Any, file: Path, table: Any) -> None:
    """The columns of `schema` of an open Parquet file as an Arrow file; whole, or not at all."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with _unreadable(file, "a parquet file"):
            for batch in table.iter_batches(columns=schema.names):
                batch = batch.select(schema.names).cast(schema)
                batch.validate(full=True)  # Parquet promises nothing of its texts
                yield batch

    temporary = kept.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches():
                writer.write_batch(batch)
        temporary.replace(kept)
    except OSError as error:
        fix = "make room there, or set HF_DATASETS_CACHE to a folder that can be written"
        raise UserError(str(kept.parent), str(error), f"a place for the rows of {file}", fix) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _unreadable(path: Path, expected: str) -> Iterator[None]:
    """Errors of the libraries that read `path` are the user's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # pyarrow's and the library's own
        found = f"an unreadable file ({error.__cause__ or error})"
        raise UserError(str(path), found, expected, "write it again") from None


def _plain(where: str, table: Any) -> Any:
    """The COLUMNS of a table of the `datasets` library, which must be text and numbers.

    Its other features (Image, Audio, ...) read, or fetch, what a row names as soon as the row is asked for.
    """
    _check_columns(where, table.column_names)
    for name in COLUMNS:
        feature = table.features.get(name)
        if feature is not None and not _is_plain(feature, name == "ecg_path"):
            raise _not_plain(where, name, feature)
    return table.select_columns([name for name in COLUMNS if name in table.column_names])


def _not_plain(where: str, column: str, kind: Any) -> UserError:
    expected = "text: paths of recordings" if column == "ecg_path" else "text or numbers"
    return UserError(f"{where}, column {column}", f"the type {kind}", expected, "write the column as text")


def _is_plain(feature: Any, flat: bool) -> bool:
    """Whether a feature is made of values alone; `flat`: of one, or of a list of them."""
    if isinstance(feature, Mapping):
        return not flat and all(_is_plain(item, flat) for item in feature.values())
    if isinstance(feature, list):
        return all(_is_plain(item, flat) for item in feature)
    kind = type(feature).__name__
    return kind in ("Value", "ClassLabel") or (kind in ("List", "LargeList") and _is_plain(feature.feature, flat))


def _json_table(file: Path) -> Any:
    """A table of strings; what is not a string (nested text, lists of paths) is kept as JSON."""
    import pyarrow as pa

    rows = list(_json_rows(file))
    if not rows:
        raise UserError(str(file), "no records", "a list of records, or one per line", "check the file")
    present = [column for column in COLUMNS if any(column in row for row in rows)]
    columns = {column: [_as_string(row.get(column)) for row in rows] for column in present}
    return pa.table({column: pa.array(values, pa.large_string()) for column, values in columns.items()})


def _json_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    text = _read_text(file)
    if file.suffix == ".jsonl":
        entries = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        numbered = ((n, _parse_json(file, line, n)) for n, line in entries)
    else:
        value = _parse_json(file, text, 1)
        if not isinstance(value, list):
            raise UserError(
                str(file), f"a JSON {type(value).__name__}", "a list of records", "wrap it in a list"
            )
        numbered = enumerate(value, 1)
    kind = "line" if file.suffix == ".jsonl" else "record"
    for number, row in numbered:
        missing = (
            [key for key in COLUMNS[:2] if key not in row] if isinstance(row, dict) else list(COLUMNS[:2])
        )
        if missing:
            found = f"no {' and no '.join(missing)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UserError(
                f"{file}, {kind} {number}", found, "a record with ecg_path and text", "correct it"
            )
        yield row


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"an unreadable file ({error})", "UTF-8 text", "check the file") from None


def _parse_json(file: Path, text: str, first_line: int) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        line, said = getattr(error, "lineno", 1), getattr(error, "msg", str(error))
        raise UserError(
            f"{file}, line {first_line + line - 1}", f"malformed JSON ({said})", "JSON", "correct the line"
        ) from None


def _as_string(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _check_columns(where: str, columns: Sequence[str]) -> None:
    missing = [column for column in ("ecg_path", "text") if column not in columns]
    if missing:
        raise UserError(
            where,
            f"columns {', '.join(columns)}",
            f"the column {' and '.join(missing)}",
            nearest(missing[0], columns) or "rename the column",
        )
