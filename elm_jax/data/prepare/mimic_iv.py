"""MIMIC-IV-ECG: its two tables joined by subject and study, and the machine's statements as a report."""

from collections.abc import Iterator
from pathlib import Path

from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording
from elm_jax.data.table_files import csv_rows

RECORDS, MEASUREMENTS = "record_list.csv", "machine_measurements.csv"
_KEY = ("subject_id", "study_id")
_STATEMENTS = tuple(f"report_{i}" for i in range(18))
_FIX = "point --raw at the folder of MIMIC-IV-ECG, or download it again"


def _recordings(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """Every record once. The reference drops those without a statement, and writes a study of two rows twice."""
    said: dict[tuple[str, ...], str] = {}
    for line, row in csv_rows(raw / MEASUREMENTS, (*_KEY, *_STATEMENTS), raw / MEASUREMENTS, "MIMIC-IV-ECG's", _FIX):
        key = tuple(row[name] for name in _KEY)
        report = " ".join(text for name in _STATEMENTS if (text := (row[name] or "").strip()))
        if said.setdefault(key, report) != report:
            why = f"line {line} says something else of a study that was told already"
            yield LeftOut("second_report", "/".join(key), why)
    listed: set[str] = set()
    for line, row in csv_rows(raw / RECORDS, (*_KEY, "path"), raw / RECORDS, "MIMIC-IV-ECG's", _FIX):
        key, path = tuple(row[name] for name in _KEY), row["path"] or ""
        if path in listed:
            yield LeftOut("listed_twice", path, f"line {line}")
            continue
        listed.add(path)
        yield RawRecording(path, row["subject_id"], report=said.pop(key, ""))
    for key in said:
        yield LeftOut("without_record", "/".join(key), f"in {MEASUREMENTS}, not in {RECORDS}")


MIMIC_IV = RawDataset("MIMIC-IV-ECG", f"{RECORDS}, {MEASUREMENTS}, and WFDB files in files", _recordings)
