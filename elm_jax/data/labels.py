"""Recordings with labels, to judge encoders by: of public databases as they are downloaded, and of a user's own table.

A task is a row of TASKS: a name, and how its recordings and labels are read. Classes of the databases that use SNOMED
codes stand in `snomed.csv`: a column for each task, where several codes may be one class.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from elm_jax.data.demo import demo_rhythm, parse_sizes
from elm_jax.data.prepare.physionet import REFERENCE, cpsc_2018
from elm_jax.data.prepare.ptb_xl import entries, read_ptb_xl
from elm_jax.data.prepare.splits import leaks, one_person, split_of
from elm_jax.data.sources import patient_ids, patient_of
from elm_jax.data.table_files import csv_rows
from elm_jax.data.tables import SPLIT_NAMES
from elm_jax.errors import UserError, nearest, refused
from elm_jax.folders import check_regular, read_regular
from elm_jax.json_text import parse_json

SNOMED = Path(__file__).with_name("snomed.csv")
SUFFIXES = (".csv", ".parquet")
VAL, TEST = 0.1, 0.2  # of the patients, where a table says nothing of splits
_FLAG = "--labels"
_DX = re.compile(rb"^#\s*Dx:\s*([\d,\s]*)", re.MULTILINE)
_CPSC = ("NORM", "AF", "I-AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE")  # 1 to 9 in CPSC 2018's REFERENCE.csv
_KNOWN = ("ecg_path", "labels", "patient_id", "split", "strat_fold")


@dataclass(frozen=True)
class Labelled:
    """A recording: its path, whose it is (those who share one are one patient), in which split ("train", "val",
    "test"), and the classes that it shows."""

    path: str
    patient: str
    split: str
    labels: frozenset[str]


@dataclass(frozen=True)
class LabelTable:
    """Labelled recordings. root: what paths are relative to; classes: each with the words that it is called by."""

    root: Path
    classes: Mapping[str, Sequence[str]]
    records: Sequence[Labelled]

    def of_split(self, split: str) -> list[Labelled]:
        return [record for record in self.records if record.split == split]


def read_labels(task: str, labels: str | None, seed: int = 0) -> LabelTable:
    """The recordings of a task, at the place `labels` (a folder or file; of the demo how many).

    Recordings whose split is not said are split by patient, by a hash of (seed, patient): all of them, or, where only
    validation is missing, those of the training part.

    Raises:
        UserError: there is no such task, no recording with a label, a table that cannot be read, or a patient in
            several splits.
    """
    if task not in TASKS:
        fix = nearest(task, TASKS) or "choose one of them"
        raise UserError("--task", repr(task), f"one of {', '.join(TASKS)}", fix)
    table = TASKS[task](labels)
    if not any(record.labels for record in table.records):
        found = f"{labels or task}: {len(table.records)} recordings, none with a class of {task}"
        classes = ", ".join(list(table.classes)[:8]) or "classes"
        raise UserError(_FLAG, found, f"recordings labelled with {classes}", "check the labels, or name another --task")
    records = [replace(r, split=r.split or split_of(r.patient, seed, VAL, TEST)) for r in table.records]
    if not any(record.split == "val" for record in records):
        held = {r.patient for r in records if r.split == "train" and split_of(r.patient, seed, VAL, 0.0) == "val"}
        records = [replace(r, split="val") if r.split == "train" and r.patient in held else r for r in records]
    if both := leaks((record.split, [record.patient]) for record in records):
        patient, splits = next(iter(both.items()))
        found = f"patient {patient} in {' and '.join(splits)}"
        raise UserError(_FLAG, found, "each patient in one split", "split by patient, or leave the splits out")
    return replace(table, records=records)


def _ptb_xl(labels: str | None, family: str) -> LabelTable:
    """PTB-XL by its official folds; recordings without a statement of the family are no part of the task."""
    folder = _folder(labels, "PTB-XL's folder, with ptbxl_database.csv and scp_statements.csv")
    tables = read_ptb_xl(folder)
    classes: dict[str, list[str]] = {}
    for statement in tables.statements:
        if family in statement.families:
            classes.setdefault(statement.families[family], []).append(statement.description)
    of_code = {s.code: s.families[family] for s in tables.statements if family in s.families}
    records = []
    for entry, path in entries(folder):
        codes = tables.truths.get(f"{entry.ecg_id:05d}", frozenset())
        found = frozenset(of_code[code] for code in codes if code in of_code)
        records += [Labelled(path, entry.patient, entry.split, found)] if found else []
    return LabelTable(folder, classes, records)


def _by_codes(labels: str | None, task: str) -> LabelTable:
    """WFDB records whose headers have SNOMED codes behind "# Dx:", as in the PhysioNet/CinC Challenges. Those without
    one of the task's are no part of it; each is its own patient."""
    folder = _folder(labels, "a folder of WFDB records with '# Dx:' in their headers")
    classes, of_code = _snomed(task)
    records = []
    for header in sorted(folder.rglob("*.hea")):
        said = _DX.search(read_regular(header, "a WFDB header", "download it again"))
        codes = re.findall(rb"\d+", said[1]) if said else []
        found = frozenset(of_code[code.decode()] for code in codes if code.decode() in of_code)
        path = header.relative_to(folder).with_suffix("").as_posix()
        records += [Labelled(path, path, "", found)] if found else []
    return LabelTable(folder, classes, records)


def _cpsc(labels: str | None) -> LabelTable:
    """CPSC 2018: with its own REFERENCE.csv, or as the Challenges have it."""
    folder = _folder(labels, "CPSC 2018's folder, with REFERENCE.csv or WFDB headers")
    if not (folder / REFERENCE).is_file():
        return _by_codes(labels, "cpsc")
    records = [
        Labelled(path, stem, "", frozenset(_CPSC[number - 1] for number in numbers))
        for stem, path, numbers in cpsc_2018(folder)
    ]
    return LabelTable(folder, _snomed("cpsc")[0], records)


def _demo(labels: str | None) -> LabelTable:
    """Synthetic recordings, by their rhythm: irregular, slow (below 60 beats per minute), fast (above 100)."""
    sizes = parse_sizes(labels or "demo:train=400,val=100,test=300")
    records = []
    for split, count in vars(sizes).items():
        for path in (f"demo:{split}:{number}" for number in range(count)):
            rhythm = demo_rhythm(path)
            rate = rhythm.heart_rate
            held = {"irregular": not rhythm.regular, "slow": rate < 60, "fast": rate > 100}
            records.append(Labelled(path, path, split, frozenset(name for name, holds in held.items() if holds)))
    meant = {"irregular": "atrial fibrillation", "slow": "sinus bradycardia", "fast": "sinus tachycardia"}
    return LabelTable(Path(), {name: [words] for name, words in meant.items()}, records)


def _table(labels: str | None) -> LabelTable:
    """A user's own table. A row is a recording; one without labels shows none of the classes."""
    if labels is None or not (path := Path(labels)).is_file() or path.suffix not in SUFFIXES:
        expected = f"a table of recordings with labels: {', '.join(SUFFIXES)}"
        raise UserError(_FLAG, str(labels), expected, "give its path, or name the database with --task")
    rows = list(table_rows(path, "a table of recordings with labels"))
    columns = list(dict.fromkeys(name for _, row in rows for name in row if name))
    binary = [] if "labels" in columns else _binary(columns, [row for _, row in rows])
    if "ecg_path" not in columns or not ("labels" in columns or binary):
        expected = "columns ecg_path and labels (names with ';' between), or ecg_path and a column of 0 and 1 for each"
        raise UserError(path, f"columns {', '.join(columns) or 'none'}", expected, "add them")
    records, people = [], one_person(patient_ids(row.get("patient_id")) for _, row in rows)
    for where, row in rows:
        said = _said(row.get("labels")) if "labels" in columns else [name for name in binary if _number(row[name])]
        ecg = str(row.get("ecg_path") or "")
        if not ecg:
            raise UserError(where, "no ecg_path", "the path of a recording", "correct the row")
        patient = next(iter(patient_ids(row.get("patient_id"))), "") or patient_of(ecg, where)
        records.append(Labelled(ecg, people.get(patient, patient), _split(row, where), frozenset(said)))
    classes = binary or sorted({label for record in records for label in record.labels})
    return LabelTable(path.parent, {name: [name] for name in classes}, records)


def table_rows(path: Path, what: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of a table, a .csv or .parquet file. Raises UserError, for which it is `what` was expected."""
    fix = "write it again" if path.exists() else "correct the path"
    if path.suffix == ".csv":
        yield from ((f"{path}, line {line}", row) for line, row in csv_rows(path, (), path, what, fix))
        return
    import pyarrow.parquet as pq

    check_regular(path, what, fix)
    with refused(path, "an unreadable file", what, fix, Exception):
        table = pq.read_table(path)
        table.validate(full=True)  # Parquet promises nothing of its texts
        rows = table.to_pylist()
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _binary(columns: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold 0 and 1 alone, of which both occur."""
    found = []
    for name in columns:
        if name not in _KNOWN and {_number(row.get(name)) for row in rows} == {0.0, 1.0}:
            found.append(name)
    return found


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _said(value: Any) -> list[str]:
    """The labels in a cell: a list, JSON of one, or names with ";" between."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with refused("labels", repr(value)[:80], "a JSON list of names", "correct the cell", ValueError):
            value = parse_json(value)
    parts = value if isinstance(value, list | tuple) else str("" if value is None else value).split(";")
    return [text for part in parts if (text := str(part).strip())]


def _split(row: Mapping[str, Any], where: str) -> str:
    """By `split`, else by PTB-XL's fold: 10 tests, 9 validates."""
    name = str(row.get("split") or "").strip().casefold()
    if name and name not in SPLIT_NAMES:
        raise UserError(where, f"split {name!r}", f"one of {', '.join(SPLIT_NAMES)}", "correct the row")
    fold = _number(row.get("strat_fold"))
    return SPLIT_NAMES[name] if name else "" if fold is None else {10.0: "test", 9.0: "val"}.get(fold, "train")


def _snomed(task: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The classes of a task, and the class of each code."""
    with SNOMED.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[task]]
    return {row[task]: [row["meaning"]] for row in rows}, {row["snomed"]: row[task] for row in rows}


def _folder(labels: str | None, expected: str) -> Path:
    if labels is None or not Path(labels).is_dir():
        raise UserError(_FLAG, str(labels), expected, "give its path")
    return Path(labels)


TASKS: dict[str, Callable[[str | None], LabelTable]] = {
    "ptbxl_super": partial(_ptb_xl, family="superclass"),
    "ptbxl_sub": partial(_ptb_xl, family="subclass"),
    "ptbxl_form": partial(_ptb_xl, family="form"),
    "ptbxl_rhythm": partial(_ptb_xl, family="rhythm"),
    "cpsc": _cpsc,
    "csn": partial(_by_codes, task="csn"),
    "georgia": partial(_by_codes, task="georgia"),
    "demo": _demo,
    "table": _table,
}
