"""CODE-15%: HDF5 files of many exams each, and the table of exams with its six labels."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording
from elm_jax.data.table_files import csv_rows
from elm_jax.ecg.formats.extras import needed
from elm_jax.ecg.formats.hdf5 import own_data
from elm_jax.ecg.names import LEADS
from elm_jax.ecg.recording import Recording
from elm_jax.ecg.stored import check_size
from elm_jax.errors import UserError, refused
from elm_jax.folders import check_regular

INDEX, PARTS, RATE = "exams.csv", 18, 400.0
_WHAT, _FIX = "a file of CODE-15%'s exams", "download it again"
_LABELS = {
    "1dAVb": "first degree AV block",
    "RBBB": "right bundle branch block",
    "LBBB": "left bundle branch block",
    "SB": "sinus bradycardia",
    "ST": "sinus tachycardia",
    "AF": "atrial fibrillation",
}
_QUESTION = f"Which of these does this ECG show: {', '.join(_LABELS.values())}?"


def _recordings(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """The exams of the files that are there; the reference wants all 18, and keeps the row of zeros at a file's end."""
    about = {}
    index, expected = raw / INDEX, "CODE-15%'s table of exams"
    for line, row in csv_rows(index, ("exam_id", "patient_id", *_LABELS), index, expected, _FIX):
        about[_exam(index, line, row["exam_id"])] = row
    listed: set[int] = set()
    for part in range(PARTS):
        path = raw / f"exams_part{part}.hdf5"
        if not path.is_file():
            yield LeftOut("missing_files", path.name, "not downloaded")
            continue
        for row, exam in enumerate(_exams(path)):
            if exam == 0 or exam in listed:
                kind, why = ("filler", "exam 0") if exam == 0 else ("listed_twice", f"exam {exam}")
                yield LeftOut(kind, f"{path.name}, row {row}", why)
                continue
            listed.add(exam)
            said = about.get(exam)
            if said is None:
                yield LeftOut("not_in_index", str(exam), f"prepared, but {INDEX} does not say whose it is")
            asked = () if said is None else (("diagnosis", _QUESTION, _answer(said)),)
            patient = "" if said is None else said["patient_id"] or ""
            yield RawRecording(path.name, patient, questions=asked, name=str(exam), row=row)


def _exam(path: Path, line: int, text: str | None) -> int:
    wrong = (ValueError, OverflowError)
    with refused(f"{path}, line {line}", "an unreadable row", "a number as exam_id", "correct it", *wrong):
        return int(float(str(text)))


def _answer(row: dict[str, str]) -> str:
    found = [name for label, name in _LABELS.items() if (row[label] or "").strip().casefold() in ("true", "1", "1.0")]
    return ", ".join(found) or "none of them"


def _exams(path: Path) -> list[int]:
    exams = _open(path)["exam_id"]
    with refused(path, "unreadable numbers of exams", _WHAT, _FIX, Exception):
        check_size(path, exams.size * exams.dtype.itemsize, min(exams.id.get_storage_size(), path.stat().st_size))
        return exams[()].tolist()


@lru_cache(maxsize=PARTS)
def _open(path: Path) -> Any:
    """A file with its two arrays; left open, as each process reads thousands of its rows."""
    check_regular(path, _WHAT)
    h5py = needed(path, "h5py", "HDF5")
    with refused(path, "an unreadable HDF5 file", _WHAT, _FIX, Exception):
        file = h5py.File(path, "r")
        exams, tracings = own_data(path, file, "exam_id"), own_data(path, file, "tracings")
        shape, numbers = tracings.shape, exams.dtype.kind in "iu" and tracings.dtype.kind in "fiu"
    if not numbers:  # these lie in no heap, where HDF5's library may go round for ever
        raise UserError(path, f"exam_id {exams.dtype} and tracings {tracings.dtype}", "numbers", _FIX)
    if exams.ndim != 1 or len(shape) != 3 or shape[0] != len(exams) or shape[2] != len(LEADS) or shape[1] > 100_000:
        raise UserError(path, f"exam_id {exams.shape} and tracings {shape}", "(n,) and (n, samples, 12)", _FIX)
    return {"exam_id": exams, "tracings": tracings}


def _read(path: Path, row: int) -> Recording:
    with refused(path, f"an unreadable row {row}", _WHAT, _FIX, Exception):
        signal = _open(path)["tracings"][row]
    return Recording(np.ascontiguousarray(signal.T, dtype=np.float64), LEADS, RATE)


CODE15 = RawDataset("CODE-15%", f"{INDEX}, and exams_part0.hdf5 to exams_part{PARTS - 1}.hdf5", _recordings, _read)
