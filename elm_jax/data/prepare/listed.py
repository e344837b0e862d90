"""A folder of recordings with a table of what is known of them: reports, patients, splits."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from elm_jax.data.labels import table_rows
from elm_jax.data.prepare.raw import LeftOut, RawRecording
from elm_jax.data.sources import patient_ids
from elm_jax.data.tables import SPLIT_NAMES
from elm_jax.ecg.formats import READERS
from elm_jax.errors import UserError, nearest, refused
from elm_jax.folders import check_regular, file_checksum

_ENDINGS = (".hea", ".dat", ".npy", *READERS)  # of recordings' files: what else stands behind a dot belongs to the name


@dataclass(frozen=True)
class Columns:
    """path: of recordings, below the folder, their ending and folders left out where that is clear; reports: the
    statements of a report, or all of it in one column; patient. None: `report` and `patient_id`, where they are there.
    A column `split` (train, val, test) is read, too."""

    path: str = "path"
    reports: Sequence[str] | None = None
    patient: str | None = None


def listed(
    recordings: Callable[[Path], Iterable[RawRecording | LeftOut]], table: Path, columns: Columns
) -> Callable[[Path], Iterator[RawRecording | LeftOut]]:
    """`recordings` with what the `table` (.csv, .parquet) says of each; rows of which there is no recording are listed.

    Raises:
        UserError: where the table cannot be read, or lacks a column; or names two recordings, or another split.
    """

    def known(raw: Path) -> Iterator[RawRecording | LeftOut]:
        found: dict[str, RawRecording] = {}
        for one in recordings(raw):
            if isinstance(one, LeftOut):
                yield one
            elif (raw / one.path).resolve() != table.resolve():  # which may be a .csv there, and so a recording's
                found[one.path] = one
        names: dict[str, list[str]] = {}
        for path in found:
            last = PurePosixPath(path).name
            for name in dict.fromkeys((path, _bare(path), last, _bare(last))):
                names.setdefault(name, []).append(path)
        told: dict[str, str] = {}
        for where, row in table_rows(table, "a table of recordings"):
            _check(table, row, columns)
            given = str(row[columns.path] or "").strip().replace("\\", "/").removeprefix("./")
            hits = names.get(given) or names.get(_bare(given)) or []
            hits = [given] if given in found else hits
            if len(hits) > 1:
                fix = "write the path below the folder"
                raise UserError(where, f"{given!r}, which may be {' or '.join(hits[:2])}", "one recording", fix)
            if not hits:
                yield LeftOut("missing", given or where, f"{where}: no recording of this name")
            elif hits[0] in told:
                yield LeftOut("listed_twice", where, f"{hits[0]} is told of in {told[hits[0]]}")
            else:
                told[hits[0]] = where
                found[hits[0]] = _described(found[hits[0]], row, columns, where)
        yield from found.values()

    return known


def content(table: Path, columns: Columns) -> str:
    """Changes with what `listed` makes of a table. Raises UserError where it cannot be read."""
    check_regular(table, "a table of recordings")
    with refused(table, "", "a table of recordings", "correct the path"):
        return xxhash.xxh3_64_hexdigest(repr((file_checksum(table), columns)).encode())


def _bare(name: str) -> str:
    """What a file is called without the ending of its format."""
    ending = max((one for one in _ENDINGS if name.casefold().endswith(one)), key=len, default="")
    return name[: len(name) - len(ending)]


def _check(table: Path, row: Mapping[str, Any], columns: Columns) -> None:
    named = {"path": [columns.path], "report": columns.reports or (), "patient": filter(None, [columns.patient])}
    for what, names in named.items():
        for name in names:
            if name not in row:
                there = [str(column) for column in row]
                fix = nearest(name, there) or f"name it with --{what}-column{'s' * (what == 'report')}"
                raise UserError(table, f"no column {name} among {', '.join(there)}", "the column", fix)


def _described(one: RawRecording, row: Mapping[str, Any], columns: Columns, where: str) -> RawRecording:
    cells = [row.get(name) for name in (("report",) if columns.reports is None else columns.reports)]
    said = tuple(text for cell in cells if (text := str("" if cell is None else cell).strip()))
    split = str(row.get("split") or "").strip().casefold()
    if split and split not in SPLIT_NAMES:
        raise UserError(where, f"split {split!r}", f"one of {', '.join(SPLIT_NAMES)}", "correct the row")
    patient = "+".join(patient_ids(row.get("patient_id" if columns.patient is None else columns.patient)))
    return replace(one, report=said, patient=patient, split=SPLIT_NAMES[split] if split else None)
