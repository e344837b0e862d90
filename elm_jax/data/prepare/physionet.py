"""Datasets of WFDB records that say all in their headers: CSN, CPSC, Georgia, Ningbo, LUDB, PTB-DB; and any folder."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording, comments, records_below, segments_of, told
from elm_jax.data.prepare.snomed import NAMES
from elm_jax.data.table_files import csv_rows
from elm_jax.ecg.formats import READERS
from elm_jax.errors import UserError

REFERENCE = "REFERENCE.csv"  # of CPSC 2018 as it was given out
_QUESTION = "Which findings does this ECG show?"
_CPSC = ("normal", "atrial fibrillation", "first degree AV block", "left bundle branch block") + (
    "right bundle branch block", "premature atrial contraction", "premature ventricular contraction",
    "ST segment depression", "ST segment elevation",
)  # fmt: skip
_MADE = re.compile(r"preprocessed_\d+")  # a folder of segments
Recordings = Callable[[Path], Iterator[RawRecording | LeftOut]]


def _coded(pattern: str) -> Recordings:
    """Records whose name is like `pattern`, wherever they lie; their findings are the SNOMED CT codes of the header."""
    of_set = re.compile(pattern)

    def recordings(raw: Path) -> Iterator[RawRecording | LeftOut]:
        unknown: dict[str, str] = {}
        for path in records_below(raw):
            stem = Path(path).name
            if not of_set.fullmatch(stem):
                continue
            try:
                said = told(raw / f"{path}.hea")
            except UserError as error:
                yield LeftOut("unreadable", path, str(error))
                continue
            codes = [code.strip() for code in said.get("Dx", "").split(",") if code.strip()]
            unknown |= {code: path for code in codes if code not in NAMES and code not in unknown}
            named = ", ".join(NAMES[code] for code in codes if code in NAMES)
            yield RawRecording(path, questions=[("diagnosis", _QUESTION, named)] if named else [], name=stem)
        for code, path in unknown.items():
            yield LeftOut("unknown_codes", code, f"first in {path}")

    return recordings


_cpsc_2020 = _coded(r"[AQ]\d{4,5}")


def _cpsc(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """As the challenges of 2020 and 2021 have it, WFDB below any folders, or as that of 2018: REFERENCE.csv, MATLAB."""
    if not (raw / REFERENCE).is_file():
        yield from _cpsc_2020(raw)
        return
    for stem, path, labels in cpsc_2018(raw):
        named = ", ".join(_CPSC[label - 1] for label in labels)
        yield RawRecording(path, questions=[("diagnosis", _QUESTION, named)] if named else [], name=stem)


def cpsc_2018(raw: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, path below `raw` and labels (1 to 9) of each recording in REFERENCE.csv; its .mat may lie in any folder.

    Raises:
        UserError: the table cannot be read, or has other labels.
    """
    index, columns = raw / REFERENCE, ("First_label", "Second_label", "Third_label")
    places = {path.stem: path.relative_to(raw).as_posix() for path in sorted(raw.rglob("*.mat"))}
    for line, row in csv_rows(index, ("Recording", *columns), index, "CPSC 2018's labels", "download it again"):
        stem = (row["Recording"] or "").strip()
        given = [text for column in columns if (text := (row[column] or "").strip())]
        if not all(re.fullmatch(f"[1-{len(_CPSC)}]", text) for text in given):
            fix = "correct it, or download it again"
            raise UserError(f"{index}, line {line}", f"labels {given}", f"numbers 1 to {len(_CPSC)}", fix)
        yield stem, places.get(stem, f"{stem}.mat"), [int(text) for text in given]


def _ludb(raw: Path) -> Iterator[RawRecording]:
    """200 subjects, one record each; the report is the header's list of diagnoses."""
    for path in records_below(raw):
        said = [line for line in comments(raw / f"{path}.hea") if line]
        report = " ".join(line for line in said if not line.startswith("<"))
        yield RawRecording(path, report=report)


def _ptbdb(raw: Path) -> Iterator[RawRecording]:
    """290 patients, a folder each; why they came is asked for."""
    for path in records_below(raw):
        said = told(raw / f"{path}.hea")
        reason = said.get("Reason for admission", "")
        patient = next((part for part in Path(path).parts if re.fullmatch(r"patient\d+", part)), "")
        known = reason and reason.casefold() != "n/a"
        asked = [("diagnosis", "What was this patient admitted for?", reason)] if known else []
        yield RawRecording(path, patient, questions=asked)


def _folder(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """Every file below that can be a recording, in order: by its ending, and not when it belongs to a WFDB record, or
    is what `prepare` made. A record that is a segment of another is left out: its samples are those of the other."""
    records = set(records_below(raw))
    whole: dict[str, str] = {}  # segment -> the record that has it
    for record in sorted(records):
        with suppress(UserError):  # which is told where it is read
            names = [(Path(record).parent / name).as_posix() for name in segments_of(raw / f"{record}.hea")]
            whole |= {name: record for name in names if name in records and name != record}
    yield from (LeftOut("segments_of_others", name, f"of {record}") for name, record in sorted(whole.items()))
    found = records - whole.keys()
    for path in sorted(raw.rglob("*")):
        below = path.relative_to(raw)
        endings = "".join(path.suffixes[-2:]).casefold(), path.suffix.casefold()
        known = any(ending == ".npy" or ending in READERS for ending in endings)
        hidden = any(part.startswith(".") for part in below.parts)
        made = any(_MADE.fullmatch(part) for part in below.parts[:-1])
        if known and not hidden and not made and path.is_file() and below.with_suffix("").as_posix() not in records:
            found.add(below.as_posix())
    yield from (RawRecording(path) for path in sorted(found))


_HEADERS = "WFDB records in any folders"
CSN = RawDataset("Chapman-Shaoxing-Ningbo", f"{_HEADERS}, as WFDBRecords/01/010/JS00001", _coded(r"JS\d+"))
CPSC = RawDataset("CPSC 2018", f"{_HEADERS}, as cpsc_2018/g1/A0001; or REFERENCE.csv and .mat files", _cpsc)
GEORGIA = RawDataset("Georgia", f"{_HEADERS}, as georgia/g1/E00001", _coded(r"E\d+"))
NINGBO = RawDataset("Ningbo", f"{_HEADERS}, as ningbo/g1/JS10647", _coded(r"JS\d+"))
LUDB = RawDataset("LUDB", f"{_HEADERS}, as data/1", _ludb)
PTBDB = RawDataset("PTB-DB", f"{_HEADERS}, as patient001/s0010_re", _ptbdb)
FOLDER = RawDataset(
    "recordings", "recordings of any format that docs/records.md names, in any folders", _folder, takes_table=True
)
