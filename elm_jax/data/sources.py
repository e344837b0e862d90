"""Records of a split: which rows of which datasets, opened lazily; validation by patient out of train."""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from elm_jax.config import DataConfig
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.data.table_files import KINDS, REPORT
from elm_jax.data.tables import Lazy, Part, Source, Table, open_source
from elm_jax.errors import UserError
from elm_jax.json_text import parse_json
from elm_jax.text.turns import Turn, decode_text, to_turns

Split = Literal["train", "val", "test"]
KEPT_RECORDS = 16_384  # a few kilobytes each at most; what is asked under each control is built once
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One conversation: its ECGs' paths in order, its decoded text, and where it comes from.

    patient: who it is about ("a+b" for two); id: "<dataset>:<row>", or "<dataset>:<split>:<row>"
    where rows are numbered per split; dataset: index into data.names; problem: what is wrong with the record
    itself, where no conversation can be made of it; fields: what of `table_files.KINDS` it says about its question;
    ecgs_of: the id of the record whose ECGs it has, where a control gave it another's; sought: the ECGs for which
    others are retrieved, where a control gave it other ones than its own; rejected: of a pair of answers
    the one that is not preferred, a text or turns of which the last is it; report: what was written of the ECG;
    label: its class, as the row has it.
    """

    ecg_paths: tuple[str, ...]
    text: Any
    name: str
    patient: str
    id: str
    dataset: int
    problem: UserError | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    ecgs_of: str = ""
    sought: tuple[str, ...] = ()
    rejected: Any = None
    report: str = ""
    label: Any = None


@dataclass(frozen=True)
class _Rows:
    """A part of the dataset `name`, number `dataset` of data.names."""

    dataset: int
    name: str
    part: Part

    def row_id(self, index: int) -> str:
        return f"{self.part.label}{self.part.offset + int(self.part.rows[index])}"

    def take(self, chosen: np.ndarray) -> "_Rows":
        part = Part(self.part.table, self.part.rows[chosen], self.part.offset, self.part.label)
        return _Rows(self.dataset, self.name, part)

    def record(self, index: int, row: Mapping[str, Any] | None = None) -> Record:
        """The record number `index`, of its `row` where that has been read."""
        row = self.part.row(index) if row is None else row
        row_id = self.row_id(index)
        paths, problem = ecg_paths(row["ecg_path"], row_id)
        return Record(
            paths,
            _text_of(row),
            str(row.get("name") or ""),
            "+".join(patient_ids(row.get("patient_id")) or _recorded(paths, row_id)),
            row_id,
            self.dataset,
            problem,
            {key: str(row[key]) for key in KINDS if row.get(key) not in (None, "")},
            rejected=_as_answer(decode_text(_without_nulls(row.get("rejected")))),
            report=_report_of(row),
            label=row.get("label"),
        )

    def said(self) -> list[tuple[str, ...]]:
        """Who each row says that it is about."""
        return list(map(patient_ids, self.part.values("patient_id")))

    def told(self) -> list[tuple[str, ...]]:
        """Whom the recordings of each row tell."""
        told = enumerate(self.part.values("ecg_path"))
        return [_recorded(ecg_paths(value, row_id := self.row_id(n))[0], row_id) for n, value in told]


class Records(Lazy[Record]):
    """Records by number, each built when asked for; the latest are kept: a step asks for each several times.

    Pickling keeps references to files where it can.
    """

    def __init__(self, rows: Sequence[_Rows]) -> None:
        self._rows = list(rows)
        self._ends = np.array(list(accumulate(len(r.part.rows) for r in self._rows)), dtype=np.int64)
        self.make = lru_cache(KEPT_RECORDS)(self.make)

    def __reduce__(self) -> tuple[Any, ...]:
        return Records, (self._rows,)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._rows else 0

    @cached_property
    def content(self) -> str:
        """Changes with what the records hold, their ids and their order."""
        return repr([(rows.dataset, rows.name, rows.part.content) for rows in self._rows])

    def each(self, first: int = 0, last: int | None = None) -> Iterator[Record]:
        """The records `first` to `last` - 1, read in bulk; none of them is kept."""
        last, start = len(self) if last is None else last, 0
        for rows, end in zip(self._rows, self._ends.tolist(), strict=True):
            low, high = max(first, start) - start, min(last, end) - start
            if low < high:
                yield from map(rows.record, range(low, high), rows.part.each(low, high))
            start = end

    __iter__ = each

    def make(self, index: int) -> Record:
        which = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        return self._rows[which].record(index - start)


def records_of(name: str, table: Table) -> Iterator[Record]:
    """Every row of a table that is called `name` as a record, whatever its split."""
    rows = _Rows(0, name, Part(table, np.arange(len(table)), 0, f"{name}:"))
    return map(rows.record, range(len(table)), rows.part.each(0, len(table)))


def load_records(data: DataConfig, split: Split, seed: int) -> Records:
    """The records of a split of all `data.names`, in their order.

    Validation records: those of a dataset's own split "val" where it has one, else about `val_fraction` of
    its train split (none where that is 0), whole patients chosen by a hash of (seed, patient); a record about
    patients of both sides (two ECGs) is left out. `subset` keeps the first floor(subset * n) of each dataset's
    train records in an order shuffled by `seed`. Raises UserError for unknown names, unreadable files, and a split
    without records, but for validation that `val_fraction` 0 does not ask for.
    """
    if not data.names:
        raise UserError("data.names", "no dataset", "at least one", "name a dataset, a file or demo")
    if len(set(data.names)) < len(data.names):
        raise UserError(
            "data.names", ", ".join(data.names), "each dataset once", "use data.weights to repeat one"
        )
    sources = [open_source(name, data.root, data.fold, data.remote_gb) for name in data.names]
    rows = _test_rows(data, sources) if split == "test" else _train_or_val(data, sources, split, seed)
    if split == "train":
        rows = _subset(rows, data.subset, seed)
    for index, name in enumerate(data.names):
        if not any(r.dataset == index and len(r.part.rows) for r in rows):
            if split == "val" and data.val_fraction == 0:
                continue
            if split == "train" or len(data.names) == 1:
                raise _empty(name, split)
            _log.warning("dataset %s has no %s records", name, split)
    if not rows and (split != "val" or data.val_fraction > 0):
        raise _empty(", ".join(data.names), split)
    return Records(rows)


def _empty(name: str, split: str) -> UserError:
    fix = {
        "train": "check data.subset, data.fold and the column split",
        "val": "raise data.val_fraction, give the dataset a split val, or set data.val_fraction=0 to validate nothing",
        "test": "add a column split, or a file whose name begins with test to a folder",
    }[split]
    return UserError(f"data.names: {name}", f"no {split} records", "at least one", fix)


def _rows_of(data: DataConfig, source: Source, index: int, split: str) -> list[_Rows]:
    return [_Rows(index, data.names[index], part) for part in source.parts(split)]


def _test_rows(data: DataConfig, sources: Sequence[Source]) -> list[_Rows]:
    return [rows for index, source in enumerate(sources) for rows in _rows_of(data, source, index, "test")]


def _train_or_val(data: DataConfig, sources: Sequence[Source], split: Split, seed: int) -> list[_Rows]:
    """Train and validation together decide who is held out, over all datasets at once."""
    found: list[_Rows] = []
    shared: list[_Rows] = []  # train parts out of which validation is taken
    for index, source in enumerate(sources):
        own = _rows_of(data, source, index, "val")
        if own:
            found += own if split == "val" else _rows_of(data, source, index, "train")
        else:
            shared += _rows_of(data, source, index, "train")
    if data.val_fraction == 0:
        return found + shared if split == "train" else found
    people = _people(shared)
    held_out = _held_out([who for part in people for who in part], data.val_fraction, seed)
    for rows, part in zip(shared, people, strict=True):
        share = {who: sum(p in held_out for p in who) / len(who) for who in set(part)}
        inside = np.array([share[who] for who in part])
        both = int(np.count_nonzero((inside > 0) & (inside < 1)))
        if both and split == "train":
            _log.info("%s: %d records left out, about patients of both train and val", rows.name, both)
        chosen = np.flatnonzero(inside == (1 if split == "val" else 0))
        if len(chosen):
            found.append(rows.take(chosen))
    return sorted(found, key=lambda rows: rows.dataset)


def _people(parts: Sequence[_Rows]) -> list[list[tuple[str, ...]]]:
    """Who the rows of each part are about. A row that does not say is about whom other rows name for its recordings:
    those that have no other recording, where there are such."""
    said = [rows.said() for rows in parts]
    if all(map(all, said)):
        return said
    both = [list(zip(own, rows.told(), strict=True)) for own, rows in zip(said, parts, strict=True)]
    saying = sorted((row for part in both for row in part if row[0]), key=lambda row: -len(row[1]))
    named = {one: said for said, told in saying for one in told}

    def about(said: tuple[str, ...], told: tuple[str, ...]) -> tuple[str, ...]:
        return said or tuple(sorted({one for patient in told for one in named.get(patient, (patient,))}))

    return [[about(*row) for row in part] for part in both]


def _held_out(people: Iterable[tuple[str, ...]], fraction: float, seed: int) -> set[str]:
    """Patients, in the order of their hashes, until they make up `fraction` of the records.

    Who alone makes up more than that stays in train; if that is everybody, the one with the fewest records
    is taken; the only patient never is.
    """
    sizes: dict[str, int] = {}
    total = 0
    for who in people:
        total += 1
        for patient in who:
            sizes[patient] = sizes.get(patient, 0) + 1
    if len(sizes) < 2:
        return set()
    order = sorted(sizes, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
    target, taken, chosen = fraction * total, 0, set()
    for patient in order:
        if taken >= target:
            break
        if sizes[patient] <= target:
            chosen.add(patient)
            taken += sizes[patient]
    return chosen or {min(order, key=sizes.__getitem__)}


def _subset(rows: list[_Rows], subset: float | None, seed: int) -> list[_Rows]:
    if subset is None:
        return rows
    kept: list[_Rows] = []
    for dataset in sorted({r.dataset for r in rows}):
        parts = [r for r in rows if r.dataset == dataset]
        starts = np.cumsum([0] + [len(r.part.rows) for r in parts])
        # The generator of the datasets library, so that a subset is the one that the reference draws.
        order = np.random.default_rng(seed).permutation(starts[-1])[: int(subset * starts[-1])]
        for part, start, end in zip(parts, starts, starts[1:], strict=False):
            chosen = order[(order >= start) & (order < end)] - start
            if len(chosen):
                kept.append(part.take(chosen))
    return kept


def _text_of(row: Mapping[str, Any]) -> Any:
    """A row's text; of a pair of answers its prompt with the chosen one; else its report."""
    text, prompt, chosen = (decode_text(_without_nulls(row.get(name))) for name in ("text", "prompt", "chosen"))
    if text is not None:
        return text
    if prompt is None or chosen is None:
        return _report_of(row) or None
    asked = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
    try:
        return [*to_turns(asked), to_turns(_as_answer(chosen))[-1]]
    except UserError:
        return [asked, chosen]  # what is wrong is said where the conversation is made


def _report_of(row: Mapping[str, Any]) -> str:
    return row[REPORT].strip() if isinstance(row.get(REPORT), str) else ""


def _as_answer(value: Any) -> Any:
    """An answer as text or turns: a table may have it as one turn, or as a number."""
    return [value] if isinstance(value, Mapping) else str(value) if isinstance(value, int | float) else value


def ecg_paths(value: Any, row_id: str) -> tuple[tuple[str, ...], UserError | None]:
    """The paths of an ecg_path, or none and what is wrong with it."""
    paths = _listed(value)
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) and p for p in paths):
        expected = "a path or a list of paths"
        return (), UserError(f"record {row_id}", f"ecg_path {value!r}", expected, "correct the record")
    return tuple(paths), None


def _listed(value: Any) -> Any:
    """The list that JSON text stands for; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    return value


def _without_nulls(value: Any) -> Any:
    """Nested Arrow columns give every turn the keys of all turns; those it lacks are null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_PTB_XL = re.compile(r"records(?:100|500)[_/]\d{5}[_/](\d{5})_[hl]r")
_MIMIC = re.compile(r"(?:^|[_/])(p\d+)(?=[_/.]|$)")
_SEGMENT = re.compile(r"_\d+\.npy$")


_NO_ID = ("", "nan", "none", "null", "<na>")
_ONE_ID = re.compile(r"\s*\d(?:\.\d+)?[eE]\+\d\d\s*(?=\+|$)|[^+]+")  # 1e+07 is a number, a+b two ids
_NUMBER = re.compile(r"[+-]?\d{1,99}(?:\.\d*)?(?:[eE]\+\d\d)?")


def patient_ids(value: Any) -> tuple[str, ...]:
    """The patients that a record's `patient_id` names ("a+b" and lists name several), in order; () where it names none.

    Ids are the same however a table holds them: 17, 17.0, "17", " 017 " and "1.7e+01" are one patient. None, NaN and
    blanks name nobody.
    """
    return _ids_in(value) if isinstance(value, str) else _ids_of(value)


def _ids_of(value: Any) -> tuple[str, ...]:
    value = _listed(value)
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(sorted({_one_id(part) for item in values for part in _ONE_ID.findall(str(item))} - {""}))


_ids_in = lru_cache(1 << 14)(_ids_of)  # records of one patient mostly stand together


def _one_id(text: str) -> str:
    text = text.strip()
    if text.casefold() in _NO_ID:
        return ""
    number = Decimal(text) if _NUMBER.fullmatch(text) else None
    return str(int(number)) if number is not None and number == number.to_integral_value() else text


def _recorded(paths: tuple[str, ...], row_id: str) -> tuple[str, ...]:
    """Whom the recordings of a record tell; without any the record is nobody's but its own."""
    return tuple(sorted({patient_of(path, row_id) for path in paths})) or (row_id,)


def patient_of(path: str, row_id: str) -> str:
    """MIMIC's subject (the longest p<digits>), PTB-XL's record number, else the recording itself.

    A record without a recording ("noise", "flatline") is nobody's but its own.
    """
    if path in (NOISE, FLATLINE):
        return row_id
    record = _PTB_XL.search(path)
    if record:
        return record[1]
    subjects = _MIMIC.findall(path)
    if subjects:
        return max(subjects, key=len)
    return _SEGMENT.sub("", path) if "preprocessed" in path else path
