"""MIMIC-IV-ECG: its two tables joined by subject and study, the machine's statements as a report, what it measured."""

from collections.abc import Iterator
from pathlib import Path

from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording
from elm_jax.data.table_files import csv_rows
from elm_jax.text.reports import measured, wave_text

RECORDS, MEASUREMENTS = "record_list.csv", "machine_measurements.csv"
_KEY = ("subject_id", "study_id")
_STATEMENTS = tuple(f"report_{i}" for i in range(18))
_WAVES = ("rr_interval", "p_onset", "qrs_onset", "qrs_end", "t_end")  # ms; the places are within one beat
_LONGEST = 10_000  # ms; what is not known is 29999, 32767 or the like
_FIX = "point --raw at the folder of MIMIC-IV-ECG, or download it again"


def _recordings(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """Every record once. The reference drops those without a statement, and writes a study of two rows twice."""
    said: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {}
    for line, row in csv_rows(raw / MEASUREMENTS, (*_KEY, *_STATEMENTS), raw / MEASUREMENTS, "MIMIC-IV-ECG's", _FIX):
        key = tuple(row[name] for name in _KEY)
        report = tuple(text for name in _STATEMENTS if (text := (row[name] or "").strip()))
        if said.setdefault(key, (report, wave_text(measured(*(_ms(row.get(name)) for name in _WAVES)))))[0] != report:
            why = f"line {line} says something else of a study that was told already"
            yield LeftOut("second_report", "/".join(key), why)
    listed: set[str] = set()
    for line, row in csv_rows(raw / RECORDS, (*_KEY, "path"), raw / RECORDS, "MIMIC-IV-ECG's", _FIX):
        key, path = tuple(row[name] for name in _KEY), row["path"] or ""
        if path in listed:
            yield LeftOut("listed_twice", path, f"line {line}")
            continue
        listed.add(path)
        report, wave = said.pop(key, ((), ""))
        yield RawRecording(path, row["subject_id"], report=report, wave=wave)
    for key in said:
        yield LeftOut("without_record", "/".join(key), f"in {MEASUREMENTS}, not in {RECORDS}")


def _ms(cell: str | None) -> float | None:
    """A time in a cell; None where the machine found none."""
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if 0 <= value < _LONGEST else None


MIMIC_IV = RawDataset("MIMIC-IV-ECG", f"{RECORDS}, {MEASUREMENTS}, and WFDB files in files", _recordings)
