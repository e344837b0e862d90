"""PTB-XL: its index, and what it says of each recording."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elm_jax.data.prepare.runner import RawDataset, RawRecording
from elm_jax.errors import UserError, nearest, refused

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
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                fix = nearest(missing[0], reader.fieldnames or ()) or "download it again"
                raise UserError(str(path), f"no column {', '.join(missing)}", "PTB-XL's database", fix)
            return [_entry(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fix = "point --raw at PTB-XL's folder" if isinstance(error, OSError) else "download it again"
        raise UserError(str(path), f"an unreadable file ({error})", "PTB-XL's database", fix) from None


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
