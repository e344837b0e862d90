"""PTB-XL: its index, its statements, and what it says of each recording."""

import ast
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording
from elm_jax.data.table_files import csv_rows
from elm_jax.errors import UserError, refused

INDEX, STATEMENTS = "ptbxl_database.csv", "scp_statements.csv"
FAMILIES = ("diagnostic", "form", "rhythm", "superclass", "subclass")
_COLUMNS = ("ecg_id", "patient_id", "report", "strat_fold", "filename_lr", "filename_hr")


@dataclass(frozen=True)
class Entry:
    """A row of ptbxl_database.csv."""

    ecg_id: int
    patient: str
    report: str
    strat_fold: int
    filename_lr: str
    filename_hr: str

    @property
    def split(self) -> str:
        """The official recommendation: fold 10 tests, fold 9 validates. Folds keep patients together."""
        return {10: "test", 9: "val"}.get(self.strat_fold, "train")


def read_index(path: Path) -> list[Entry]:
    """ptbxl_database.csv. Raises UserError naming the line that is malformed."""
    rows = csv_rows(path, _COLUMNS, path, "PTB-XL's database", "point --raw at PTB-XL's folder, or download it again")
    return [_entry(path, line, row) for line, row in rows]


def _entry(path: Path, line: int, row: dict[str, str]) -> Entry:
    wrong, expected = (ValueError, TypeError, AttributeError, OverflowError), "numbers as in PTB-XL's database"
    with refused(f"{path}, line {line}", "an unreadable row", expected, "correct the line", *wrong):
        return Entry(
            int(row["ecg_id"]),
            str(int(float(row["patient_id"]))),
            row["report"].strip(),
            int(row["strat_fold"]),
            row["filename_lr"],
            row["filename_hr"],
        )


@dataclass(frozen=True)
class Statement:
    """An SCP statement of PTB-XL: its code, what it means, and which of FAMILIES it is in, by the label there."""

    code: str
    description: str
    families: Mapping[str, str]


@dataclass(frozen=True)
class PtbXl:
    """PTB-XL's tables: the statements, and the codes of each recording by its number, five digits as in its path."""

    statements: list[Statement]
    truths: dict[str, frozenset[str]]


def read_ptb_xl(folder: Path) -> PtbXl:
    """The tables in PTB-XL's folder. Raises UserError where they are not there or not PTB-XL's."""
    return PtbXl(read_statements(folder), read_truths(folder))


def read_statements(folder: Path) -> list[Statement]:
    """The statements in scp_statements.csv. Raises UserError where the file is not there or not PTB-XL's."""
    found = []
    with _of_ptb_xl(folder / STATEMENTS):
        for row in _rows(folder / STATEMENTS, ("description", "diagnostic", "form", "rhythm")):
            code = row.get("") or row.get("code") or ""
            families = {name: code for name in FAMILIES[:3] if row[name] and float(row[name]) == 1}
            if "diagnostic" in families:
                families |= {"superclass": row["diagnostic_class"], "subclass": row["diagnostic_subclass"]}
            found.append(Statement(code, row["description"], families))
    return found


def read_truths(folder: Path) -> dict[str, frozenset[str]]:
    """Record number, five digits as in its path -> the codes of its statements, whatever their likelihood."""
    return {number: frozenset(codes) for number, codes in _read_codes(folder).items()}


def _read_codes(folder: Path) -> dict[str, list[str]]:
    """Record number, five digits as in its path -> the codes of its statements, the likeliest first.

    Likelihoods are percent; 0 is that of statements for which none was told, those of form and rhythm among them.
    """
    rows = _rows(folder / INDEX, ("ecg_id", "scp_codes"))
    with _of_ptb_xl(folder / INDEX):
        codes = ((int(row["ecg_id"]), ast.literal_eval(row["scp_codes"])) for row in rows)
        return {f"{number:05d}": sorted(found, key=lambda c: -float(found[c])) for number, found in codes}


def _of_ptb_xl(path: Path) -> contextlib.AbstractContextManager[None]:
    """Whatever is wrong with a cell of PTB-XL's tables is the file's fault: `literal_eval` raises many kinds."""
    found = "a cell that is not as PTB-XL has it"
    return refused(path, found, f"{path.name} of PTB-XL", "download it again", Exception)


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    rows = [row for _, row in csv_rows(path, needed, path, f"{path.name} of PTB-XL", "give PTB-XL's folder")]
    if not rows:
        raise UserError(path, "a table without rows", f"{path.name} of PTB-XL", "download it again")
    return rows


def entries(raw: Path) -> Iterator[tuple[Entry, str]]:
    """The rows of PTB-XL's database in a folder with the path of each recording there: at 500 Hz where these were
    downloaded, else at 100 Hz."""
    high = (raw / "records500").is_dir()
    for entry in read_index(raw / INDEX):
        yield entry, entry.filename_hr if high else entry.filename_lr


def _recordings(raw: Path) -> Iterator[RawRecording]:
    for entry, path in entries(raw):
        yield RawRecording(path, entry.patient, entry.split, entry.report, fold=entry.strat_fold)


def _named(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """Reports are the English names of the recording's statements, the likeliest first."""
    names = {statement.code: statement.description for statement in read_statements(raw)}
    codes, unknown = _read_codes(raw), dict[str, str]()
    for entry, one in zip(read_index(raw / INDEX), _recordings(raw), strict=True):
        found = codes[f"{entry.ecg_id:05d}"]
        unknown |= {code: one.path for code in found if code not in names and code not in unknown}
        yield replace(one, report=". ".join(names[code] for code in found if code in names))
    for code, path in unknown.items():
        yield LeftOut("unknown_codes", code, f"first in {path}")


PTB_XL = RawDataset("PTB-XL", f"{INDEX}, and WFDB files in records500 or records100", _recordings, named=_named)
