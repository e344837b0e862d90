"""Files -> tables of the `datasets` library: Parquet, JSON, JSON lines, and what the library has saved.

A table has those of COLUMNS that the file has, as text and numbers; nothing that a row names is looked at or fetched.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from elm_jax.errors import UserError, nearest, refused
from elm_jax.folders import check_regular, keep, kept, read_json
from elm_jax.json_text import parse_json

KINDS = ("question_type", "attribute_type", "attribute", "template_id")  # of ECG-QA, to score by
PAIR = ("prompt", "chosen", "rejected")  # of preferences: in place of text, or rejected alone beside it
REPORT = "report"  # what ECGs are held against; in place of text, or beside it
LABEL = "label"  # the number of a class, for which ECGs are generated
COLUMNS = ("ecg_path", "text", "name", "patient_id", "split", *KINDS, *PAIR, REPORT, LABEL)
SUFFIXES = (".parquet", ".json", ".jsonl")
SMALL = 16 << 20  # bytes of JSON up to which a table is held in memory
_ROWS = 8192  # of JSON that are made columns at a time
_SPLITS, _STATE = "dataset_dict.json", "state.json"  # of a dataset that the library has saved

_SPLIT_IN_NAME = re.compile(r"^((?:fold\d+_)?(?:train|valid|validation|val|dev|test))(?=$|[-_.])")


def file_tables(path: Path) -> Iterator[tuple[str, str | None, Any]]:
    """(where, split in the name, table) of every file."""
    if (path / _SPLITS).is_file() or (path / _STATE).is_file():
        import datasets

        _check_saved(path)
        with _unreadable(path, "a saved dataset"):
            saved: Any = datasets.load_from_disk(str(path))
            for table in saved.values() if isinstance(saved, dict) else [saved]:
                whole = table.data.table
                used = [name for name in dict.fromkeys(whole.column_names) if name in COLUMNS]
                whole.select(used).validate(full=True)  # Arrow believes its files: a wrong offset would end the process
        for split, table in saved.items() if isinstance(saved, dict) else [(None, saved)]:
            where = f"{path}{f'/{split}' if split else ''}"
            yield where, split, plain(where, table)
        return
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    for file in files:
        yield str(file), split_in_name(file.stem), _open(file)


def split_in_name(stem: str) -> str | None:
    """The split that the name of a file begins with, if it does."""
    match = _SPLIT_IN_NAME.match(stem)
    return match[1] if match else None


def _check_saved(path: Path) -> None:
    """Raise UserError where a dataset that the library has saved names files that are not its own, or no files."""
    folders = [path]
    if (path / _SPLITS).is_file():
        folders = [path / name for name in _own(path, read_json(path / _SPLITS).get("splits"))]
    for folder in folders:
        parts = read_json(folder / _STATE).get("_data_files")
        rows = parts if isinstance(parts, list) else [parts]
        named = [row.get("filename") if isinstance(row, dict) else row for row in rows]
        for name in ("dataset_info.json", *_own(folder, named)):
            check_regular(folder / name, "a file of a saved dataset")


def _own(folder: Path, names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(folder, f"a saved dataset of {str(names)[:80]}", "names of files in it", "save it again")
    return names


def _open(file: Path) -> Any:
    import datasets
    import pyarrow as pa

    check_regular(file, "a table")
    if file.suffix == ".parquet":
        return _as_arrow(file)
    with refused(file, "an unreadable file", "UTF-8 text", "check the file"):
        small = file.stat().st_size <= SMALL
    if small:
        _copy_json(file, held := io.BytesIO())
        return datasets.Dataset(pa.ipc.open_stream(held.getbuffer()).read_all())
    stem = _kept_as(file)
    whole = kept(stem, ".arrow") or _keep_rows(stem, file, functools.partial(_copy_json, file, folder=str(stem.parent)))
    return datasets.Dataset.from_file(str(whole))


def _kept_as(file: Path) -> Path:
    """What a table is kept as, by its content and its kind."""
    from datasets import config

    with refused(file, "an unreadable file", "a table", "check the file"), file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(repr(COLUMNS).encode(), digest_size=16))
    return Path(config.HF_DATASETS_CACHE, "elm_jax", f"{digest.hexdigest()}{file.suffix}")


def _keep_rows(stem: Path, file: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    fix = "make room there, or set HF_DATASETS_CACHE to a folder that can be written"
    return keep(stem, ".arrow", write, f"a place for the rows of {file}", fix)


def _as_arrow(file: Path) -> Any:
    """A Parquet file's COLUMNS as a table mapped into memory, of an Arrow file that is kept by the file's content.

    What the file says of its columns beyond their types (`datasets` features, pandas' metadata) is left out: a
    feature may have what a row names fetched.
    """
    import datasets
    import pyarrow.parquet as pq

    with _unreadable(file, "a parquet file"):
        stem = _kept_as(file)
        with pq.ParquetFile(file) as table:
            if not table.metadata.num_rows:
                raise UserError(str(file), "no records", "rows of ecg_path and text", "check the file")
            if (whole := kept(stem, ".arrow")) is not None:
                return datasets.Dataset.from_file(str(whole))
            copy = functools.partial(_copy_parquet, plain_schema(str(file), table.schema_arrow), file, table)
            whole = _keep_rows(stem, file, copy)
        return datasets.Dataset.from_file(str(whole))


def plain_schema(where: str, schema: Any) -> Any:
    """The COLUMNS of a Parquet file's schema, which must be text and numbers, without what else is said of them."""
    import datasets
    import pyarrow as pa

    fields = [schema.field(i) for i in range(len(schema))]
    _check_columns(where, [field.name for field in fields])
    types = {f.name: f.type for f in fields if f.name in COLUMNS}
    types = {n: t.value_type if pa.types.is_dictionary(t) else t for n, t in types.items()}
    known = pa.schema([(name, types[name]) for name in _looked_at(where, types, _is_known)])
    features = datasets.Features.from_arrow_schema(known)
    return pa.schema([known.field(name) for name in _plain_columns(where, features)])


def _copy_parquet(schema: Any, file: Path, table: Any, sink: IO[bytes]) -> None:
    """Write the columns of `schema` of an open Parquet file as Arrow."""
    import pyarrow as pa

    with pa.ipc.new_stream(sink, schema) as writer, _unreadable(file, "a parquet file"):
        for batch in table.iter_batches(columns=schema.names):
            batch = batch.select(schema.names).cast(schema)
            batch.validate(full=True)  # Parquet promises nothing of its texts
            writer.write_batch(batch)


def _unreadable(path: Path, expected: str) -> contextlib.AbstractContextManager[None]:
    """Errors of the libraries that read `path`, pyarrow's and their own, are the user's."""
    return refused(path, "an unreadable file", expected, "write it again", Exception)


def csv_rows(
    path: Path, needed: Sequence[str], where: str | Path, expected: str, fix: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the line, row) of a CSV file. UserError, naming `where`, unless it can be read and has the columns."""
    check_regular(path, expected, fix)
    if not os.path.exists(path):  # which raises nothing, however long the name is
        raise UserError(where, f"no {path.name}", expected, fix)
    told = refused(where, "an unreadable file", expected, fix, OSError, ValueError, csv.Error)
    with told, path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            near = nearest(missing[0], reader.fieldnames or ()) or "download it again"
            raise UserError(path, f"no column {', '.join(missing)}", expected, near)
        yield from ((reader.line_num, row) for row in reader)


def plain(where: str, table: Any) -> Any:
    """The COLUMNS of a table of the `datasets` library, which must be text and numbers.

    Its other features (Image, Audio, ...) read, or fetch, what a row names as soon as the row is asked for.
    """
    _check_columns(where, table.column_names)
    return table.select_columns(_plain_columns(where, table.features))


def _plain_columns(where: str, features: Mapping[str, Any]) -> list[str]:
    return _looked_at(where, features, lambda name, kind: _is_plain(kind, name == "ecg_path"))


def _looked_at(where: str, kinds: Mapping[str, Any], is_plain: Callable[[str, Any], bool]) -> list[str]:
    """Those of COLUMNS that a table has. A pair's, a report or a label that are not plain are none where there is a
    text. Raises UserError for others that are not plain."""
    found = []
    for name in (name for name in COLUMNS if name in kinds):
        if is_plain(name, kinds[name]):
            found.append(name)
        elif name not in (*PAIR, REPORT, LABEL) or "text" not in kinds:
            expected = "text: paths of recordings" if name == "ecg_path" else "text or numbers"
            raise UserError(f"{where}, column {name}", f"the type {kinds[name]}", expected, "write the column as text")
    return found


def _is_known(name: str, kind: Any) -> bool:
    """Whether the library has a feature for an Arrow type."""
    import datasets
    import pyarrow as pa

    try:
        datasets.Features.from_arrow_schema(pa.schema([(name, kind)]))
    except (ValueError, NotImplementedError):
        return False
    return True


def _is_plain(feature: Any, flat: bool) -> bool:
    """Whether a feature is made of texts and numbers alone; `flat`: of one, or of a list of them."""
    if isinstance(feature, Mapping):
        return not flat and all(_is_plain(item, flat) for item in feature.values())
    if isinstance(feature, list):
        return all(_is_plain(item, flat) for item in feature)
    kind = type(feature).__name__
    if kind == "Value":
        return "binary" not in feature.dtype
    return kind == "ClassLabel" or (kind in ("List", "LargeList") and _is_plain(feature.feature, flat))


def _copy_json(file: Path, sink: IO[bytes], folder: str | None = None) -> None:
    """Write a table of strings as Arrow; what is not a string (nested text, lists of paths) is kept as JSON.

    Which columns there are only the last row tells: until then all of them lie in a file in `folder`.
    """
    import pyarrow as pa

    rows, present, text = _json_rows(file), set[str](), pa.large_string()
    with tempfile.SpooledTemporaryFile(SMALL, dir=folder) as all_columns:
        with pa.ipc.new_stream(all_columns, pa.schema([(column, text) for column in COLUMNS])) as writer:
            while some := list(islice(rows, _ROWS)):
                present.update(*some)
                values = [
                    pa.array([_as_string(row.get(column)) for row in some], text)
                    if column in present else pa.nulls(len(some), text) for column in COLUMNS
                ]  # fmt: skip
                writer.write_batch(pa.record_batch(values, COLUMNS))
        if not present:
            raise UserError(str(file), "no records", "a list of records, or one per line", "check the file")
        all_columns.seek(0)
        used = [column for column in COLUMNS if column in present]
        with pa.ipc.new_stream(sink, pa.schema([(column, text) for column in used])) as writer:
            for batch in pa.ipc.open_stream(all_columns):
                writer.write_batch(batch.select(used))


def _json_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    is_lines = file.suffix == ".jsonl"
    numbered = _json_lines(file) if is_lines else enumerate(_json_list(file), 1)
    for number, row in numbered:
        missing = missing_columns(row if isinstance(row, dict) else ())
        if missing:
            found = f"no {' and no '.join(missing)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            where = f"{file}, {'line' if is_lines else 'record'} {number}"
            raise UserError(where, found, "a record with ecg_path and text", "correct it")
        yield row


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    told = refused(file, "an unreadable file", "UTF-8 text", "check the file")
    with told, file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parse_json(file, line.removesuffix("\n"), number)


def _json_list(file: Path) -> list[Any]:
    with refused(file, "an unreadable file", "UTF-8 text", "check the file"):
        text = file.read_text(encoding="utf-8-sig")
    value = _parse_json(file, text, 1)
    if not isinstance(value, list):
        raise UserError(str(file), f"a JSON {type(value).__name__}", "a list of records", "wrap it in a list")
    return value


def missing_columns(columns: Collection[str]) -> list[str]:
    """What a record cannot do without, and is not among these."""
    instead = ("prompt" in columns and "chosen" in columns) or REPORT in columns
    return [column for column in ("ecg_path", "text") if column not in columns and not (column == "text" and instead)]


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
    missing = missing_columns(columns)
    if missing:
        raise UserError(
            where,
            f"columns {', '.join(columns)}",
            f"the column {' and '.join(missing)}",
            nearest(missing[0], columns) or "rename the column",
        )
