"""Where records come from: dataset names of the Hugging Face hub, local files and folders, the demo.

A Source gives, per split, parts: rows of one table. Tables stay what they are (memory-mapped Arrow, or a
sequence of dictionaries); nothing here turns rows into Python objects before they are asked for.
"""

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import xxhash

from elm_jax.data.remote import RemoteTable, is_remote, remote_tables
from elm_jax.data.table_files import COLUMNS, SUFFIXES, file_tables, plain
from elm_jax.errors import UserError, nearest

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
_HUB = re.compile(r"(?:(?P<owner>[\w.-]+)/)?(?P<name>[\w.-]+)(?::(?P<splits>.+))?")
_DECODED = 4096  # rows that are decoded at a time
Item = TypeVar("Item")

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


class Lazy(ABC, Sequence[Item]):
    """A sequence whose items are made when they are asked for."""

    @abstractmethod
    def make(self, index: int) -> Item:
        """The item at `index`, from 0 up to the length."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.make(index % len(self))


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

    @cached_property
    def content(self) -> str:
        """Changes with the rows and their ids: a digest of what they lie in. Of a large table it costs milliseconds."""
        digest = xxhash.xxh3_128(repr((self.offset, self.label)).encode())
        digest.update(np.ascontiguousarray(self.rows).data)
        table: Any = self.table
        if not hasattr(table, "data"):
            told = getattr(table, "content", None) or repr([table[int(row)] for row in self.rows])
            digest.update(told.encode())
            return digest.hexdigest()
        for part in filter(None, (table.data, table._indices)):
            for name, column in zip(part.column_names, part.columns, strict=True):
                for chunk in column.chunks:
                    digest.update(repr((name, str(chunk.type), chunk.offset, len(chunk))).encode())
                    for buffer in filter(None, chunk.buffers()):
                        digest.update(buffer)
        return digest.hexdigest()

    def row(self, index: int) -> Mapping[str, Any]:
        """The row number `index` of the part: at least those of COLUMNS that the table has."""
        number, columns = int(self.rows[index]), self._columns
        return self.table[number] if columns is None else {name: c[number].as_py() for name, c in columns.items()}

    def each(self, first: int, last: int) -> Iterator[Mapping[str, Any]]:
        """The rows `first` to `last` - 1 of the part, many decoded at a time."""
        names = self._names
        for columns in self._decoded(first, last, names):
            yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))

    def values(self, name: str) -> Iterator[Any]:
        """What the rows have in a column, None where there is none; the others are not read."""
        if name not in self._names:
            return itertools.repeat(None, len(self.rows))
        if isinstance(self.table, RemoteTable):
            column = self.table[name]
            return (column[row] for row in self.rows)
        return itertools.chain.from_iterable(c for (c,) in self._decoded(0, len(self.rows), [name]))

    def _decoded(self, first: int, last: int, names: list[str]) -> Iterator[list[list[Any]]]:
        """Columns of rows, some rows at a time."""
        table: Any = self.table
        for start in range(first, last, _DECODED):
            numbers = self.rows[start : min(start + _DECODED, last)]
            if not hasattr(table, "select_columns"):
                rows = [table[int(number)] for number in numbers]
                yield [[row.get(name) for row in rows] for name in names]
                continue
            low, high = int(numbers.min()), int(numbers.max()) + 1
            if self._columns is None or high - low > 4 * len(numbers):  # few of those between
                found = table.select_columns(names)[numbers]
                yield [found[name] for name in names]
                continue
            columns = [self._columns[name].slice(low, high - low).to_pylist() for name in names]
            places = None if high - low == len(numbers) and (np.diff(numbers) == 1).all() else (numbers - low).tolist()
            yield columns if places is None else [[c[place] for place in places] for c in columns]

    @property
    def _names(self) -> list[str]:
        return [name for name in COLUMNS if name in getattr(self.table, "column_names", COLUMNS)]

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


class Source(Protocol):
    """One dataset."""

    def parts(self, split: str) -> list[Part]:
        """The rows of "train", "val" or "test"; [] when the dataset has no such split."""
        ...


def open_source(name: str, root: str, fold: int, remote_gb: float = 16) -> Source:
    """The dataset called `name`: the demo, a file or folder (under `root` or as given), a URL, of whose rows
    `remote_gb` are kept on disk at most, or a dataset on the hub: a name that the reference has, or OWNER/NAME, with
    ":" and the names of its splits behind it where they are others.

    Raises UserError for a name that is none of these, a missing file, or a file that holds no records.
    """
    if name == "demo" or name.startswith("demo:"):
        return _Demo(name)
    path = _local(name, root)
    if path is not None:
        return _Files(name, file_tables(path), fold, str(path))
    if is_remote(name):
        return _Files(name, remote_tables(name, remote_gb * 1e9), fold, name)
    if (found := _HUB.fullmatch(name)) and not found["name"].endswith(SUFFIXES):
        owner, known = found["owner"], any(re.fullmatch(pattern, found["name"]) for pattern, _ in FAMILIES)
        if owner or known:
            repositories = [f"{each}/{found['name']}" for each in ([owner] if owner else OWNERS)]
            return _Hub(name, repositories, fold, _named_splits(name, found["splits"], known, fold))
    if name.endswith(SUFFIXES) or "/" in name:
        raise UserError(
            "data.names", f"no file or folder {name}", f"one below data.root ({root})", "correct the path"
        )
    examples = [example for _, example in FAMILIES] + ["demo"]
    fix = nearest(name, examples) or "give the path of a local file"
    if part := re.fullmatch(r"(train|val|test)=([\w.-]+)", name):  # of a name that was split at its commas
        whole = "demo" if part[2].isdecimal() else "owner/name"
        fix = f"""quote it: --config.data.names="('{whole}:...,{name}',)\""""
    raise UserError(
        "data.names",
        f"the unknown dataset {name}",
        f"a .parquet, .json or .jsonl file, a folder of them, or a name like {', '.join(examples)}",
        fix,
    )


def _named_splits(name: str, said: str | None, known: bool, fold: int) -> Mapping[str, str] | None:
    """Ours -> the hub's, as a dataset's name tells them: "train=stage1,test=held_out", or "stage1" alone, which is
    trained on where it is no usual name of another split. None: those that the dataset has."""
    if said is None:
        if known and not 1 <= fold <= FOLDS:
            raise UserError("data.fold", str(fold), f"1 to {FOLDS}", "correct it")
        return {split: f"fold{fold}_{split}" for split in ("train", "test")} if known else None
    splits = {}
    for part in said.split(","):
        ours, has, theirs = part.rpartition("=")
        ours = ours if has else SPLIT_NAMES.get(theirs.rpartition("_")[2].lower(), "train")
        if ours not in ("train", "val", "test") or ours in splits or not re.fullmatch(r"[\w.-]+", theirs):
            example = "owner/name:train=stage1,test=held_out"
            raise UserError("data.names", name, f"splits as {example}", "correct what stands behind the colon")
        splits[ours] = theirs
    return splits


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
    """A dataset on the Hugging Face hub, the first of `repositories` that is there.

    splits: train, val and test -> what the hub calls them; None: those that it has, of this fold where there are folds.
    """

    def __init__(self, name: str, repositories: Sequence[str], fold: int, splits: Mapping[str, str] | None) -> None:
        self.name, self.repositories, self.fold, self._splits = name, repositories, fold, splits

    def parts(self, split: str) -> list[Part]:
        import datasets

        if (theirs := self.splits.get(split)) is None:
            return []
        table = plain(self.name, self._fetched(partial(datasets.load_dataset, split=theirs), theirs))
        label = self.name if self.name.endswith(f":{theirs}") else f"{self.name}:{theirs}"
        return [Part(table, np.arange(len(table)), 0, f"{label}:")]

    @cached_property
    def splits(self) -> Mapping[str, str]:
        import datasets

        if self._splits is not None:
            return self._splits
        names = self._fetched(datasets.get_dataset_split_names, "train")
        found = {ours: theirs for theirs in names if (ours := _split_of(theirs, self.fold))}
        if not found:
            fix = f"name them: {self.name}:train=..., with test=... behind it"
            raise UserError(f"data.names: {self.name}", "no split train, val or test", "one of these", fix)
        return found

    def _fetched(self, ask: Callable[[str], Any], split: str) -> Any:
        from datasets.exceptions import DatasetNotFoundError

        problem: Exception | None = None
        for repository in self.repositories:
            try:
                return ask(repository)
            except DatasetNotFoundError as error:
                problem = error
            except Exception as error:  # the hub's clients raise errors of many libraries
                problem = error
                break
        raise UserError(
            f"data.names: {self.name}",
            f"no file or folder, and no dataset to download ({problem})",
            f"{' or '.join(self.repositories)} on the hub, with split {split}",
            f"put its parquet files into the folder {self.name.partition(':')[0]} under data.root to use it without "
            "the hub",
        )


class _Files:
    """A file, a folder of files, a saved Hugging Face dataset, or what a URL names.

    A row belongs to the split that its `split` column names (train, val, test, or fold{k}_train ... for
    data.fold); without the column, to the split in its file's name (train.jsonl, fold1_test-00000.parquet);
    else to train.
    """

    def __init__(self, name: str, tables: Iterable[tuple[str, str | None, Any]], fold: int, where: str) -> None:
        self.name, self.fold = name, fold
        self.tables = list(tables)
        if not self.tables:
            raise UserError(where, "no records", f"files {', '.join(SUFFIXES)}", "check the folder")

    def parts(self, split: str) -> list[Part]:
        parts, offset = [], 0
        for where, default, table in self.tables:
            rows = self._rows(table, split, default, where)
            if len(rows):
                parts.append(Part(table, rows, offset, f"{self.name}:"))
            offset += len(table)
        return parts

    def _rows(self, table: Any, split: str, default: str | None, where: str) -> np.ndarray:
        import pyarrow as pa

        if "split" not in table.column_names:
            chosen = split == self._meant(default, where) if default else split == "train"
            return np.arange(len(table) if chosen else 0)
        if hasattr(table, "select_columns"):
            labels = table.select_columns(["split"]).with_format("arrow")[:].column(0)
        else:
            labels = pa.chunked_array([table["split"]])
        if labels.null_count:  # of which no dictionaries of several chunks can be made one
            self._meant(None, where)
        coded = labels.dictionary_encode("encode").unify_dictionaries().combine_chunks()
        known = [self._meant(label, where) == split for label in coded.dictionary.to_pylist()]
        return np.flatnonzero(np.array(known)[coded.indices.to_numpy()])

    def _meant(self, label: str | None, where: str) -> str:
        if (split := _split_of(str(label), self.fold)) is None:
            expected = "train, val, test or fold1_train ..."
            raise UserError(where, f"split {label!r}", expected, "correct the column split")
        return split


def _split_of(label: str, fold: int) -> str | None:
    """The split that a label means for this fold: "" for another fold's, None for what is none."""
    match = re.fullmatch(r"(?:fold(\d+)_)?(\w+)", label)
    name = SPLIT_NAMES.get(match[2].lower()) if match else None
    return name if match is None or name is None or match[1] in (None, str(fold)) else ""
