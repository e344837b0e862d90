"""PTB-XL: its index, and what it says of each recording."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elm_jax.data.prepare.runner import RawDataset, RawRecording
from elm_jax.data.table_files import csv_rows
from elm_jax.errors import refused

INDEX = "ptbxl_database.csv"
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


def _recordings(raw: Path) -> Iterator[RawRecording]:
    """Those at 500 Hz where they were downloaded, else those at 100 Hz."""
    high = (raw / "records500").is_dir()
    for entry in read_index(raw / INDEX):
        path = entry.filename_hr if high else entry.filename_lr
        yield RawRecording(path, entry.patient, entry.split, entry.report)


PTB_XL = RawDataset("PTB-XL", f"{INDEX}, and WFDB files in records500 or records100", _recordings)
