"""A folder of recordings with a table of what is known of them: reports, patients, splits."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from elm_jax.data.labels import table_rows
from elm_jax.data.prepare.raw import LeftOut, RawRecording
from elm_jax.data.sources import patient_ids
from elm_jax.data.tables import SPLIT_NAMES
from elm_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Columns:
    """path: of recordings, below the folder, their ending and folders left out where that is clear; reports: the
    statements of a report, or all of it in one column; patient. A column `split` (train, val, test) is read, too."""

    path: str = "path"
    reports: Sequence[str] = ("report",)
    patient: str = "patient_id"


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
            place = PurePosixPath(path)
            for name in dict.fromkeys((path, path.removesuffix(place.suffix), place.name, place.stem)):
                names.setdefault(name, []).append(path)
        told: dict[str, str] = {}
        for where, row in table_rows(table, "a table of recordings"):
            _check(table, row, columns)
            given = str(row[columns.path] or "").strip().replace("\\", "/").removeprefix("./")
            hits = names.get(given) or names.get(given.removesuffix(PurePosixPath(given).suffix)) or []
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


def _check(table: Path, row: Mapping[str, Any], columns: Columns) -> None:
    for name in (columns.path, *columns.reports):
        if name not in row:
            there = [str(column) for column in row]
            flag = "--path-column" if name == columns.path else "--report-columns"
            fix = nearest(name, there) or f"name it with {flag}"
            raise UserError(table, f"no column {name} among {', '.join(there)}", "the column", fix)


def _described(one: RawRecording, row: Mapping[str, Any], columns: Columns, where: str) -> RawRecording:
    said = tuple(text for name in columns.reports if (text := str(row[name] if row[name] is not None else "").strip()))
    split = str(row.get("split") or "").strip().casefold()
    if split and split not in SPLIT_NAMES:
        raise UserError(where, f"split {split!r}", f"one of {', '.join(SPLIT_NAMES)}", "correct the row")
    patient = "+".join(patient_ids(row.get(columns.patient)))
    return replace(one, report=said, patient=patient, split=SPLIT_NAMES[split] if split else None)
