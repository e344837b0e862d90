"""The Harvard-Emory ECG database: a folder for each institution, WFDB files, and the codes of its physicians."""

from collections.abc import Iterator
from pathlib import Path

from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording
from elm_jax.data.table_files import csv_rows
from elm_jax.errors import UserError

_TABLES = "12SL_diagnoses"
NAMES, INDEX = "diagnoses_dictionary.csv", "diagnoses_acquisition.csv"
_FIX = "point --raw at the folder of HEEDB, or download it again"
_PATIENT = ("BDSPPatientID", "patient_id", "PatientID")


def _recordings(raw: Path) -> Iterator[RawRecording | LeftOut]:
    """The acquisitions of every institution; the codes are named by the first one's dictionary."""
    indexes = sorted(raw.glob(f"I*/{_TABLES}/{INDEX}"))
    if not indexes:
        raise UserError(raw, f"no I*/{_TABLES}/{INDEX}", "the folder of HEEDB", _FIX)
    names = {}
    dictionary = indexes[0].with_name(NAMES)
    for _, row in csv_rows(dictionary, ("codes", "diagnoses"), dictionary, "codes and diagnoses", _FIX):
        names[(row["codes"] or "").strip()] = (row["diagnoses"] or "").strip()
    unknown: dict[str, str] = {}
    for index in indexes:
        for line, row in csv_rows(index, ("FileName", "codes_physician"), index, "acquisitions", _FIX):
            codes = [code.strip() for code in (row["codes_physician"] or "").split(",") if code.strip()]
            unknown |= {code: f"{index}, line {line}" for code in codes if code not in names and code not in unknown}
            report = "; ".join(names[code] for code in codes if names.get(code))
            path = f"{index.parent.parent.name}/WFDB/{(row['FileName'] or '').lstrip('/')}"
            patient = next((row[name] for name in _PATIENT if row.get(name)), "")
            yield RawRecording(path, patient, report=report)
    for code, where in unknown.items():
        yield LeftOut("unknown_codes", code, where)


HEED = RawDataset("HEEDB", f"a folder I0001 and the like with WFDB and {_TABLES}/{INDEX}", _recordings)
