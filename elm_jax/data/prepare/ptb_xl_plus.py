"""PTB-XL+ 1.0.1 (Strodthoff et al., Sci Data 10 (2023) 279): features and statements of PTB-XL's recordings.

Its rows are known by `ecg_id`, wherever that column stands; the tables are not in order. Durations are in ms,
amplitudes in mV, axes in degrees. What a table does not have, or has as no number that a heart could make, is not
measured.
"""

import ast
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from elm_jax.data.table_files import csv_rows
from elm_jax.ecg.beats.amplitudes import Lead
from elm_jax.ecg.beats.measurements import UNITS, Measurements, Value
from elm_jax.ecg.beats.rhythm import Rhythm
from elm_jax.ecg.names import LEADS
from elm_jax.errors import UserError, refused

FEATURES = {name: f"features/{name}_features.csv" for name in ("12sl", "unig", "ecgdeli")}
# The table, and its column of (SNOMED code, likelihood).
STATEMENTS = {
    "ptbxl": ("labels/ptbxl_statements.csv", "scp_codes_ext_snomed"),
    "12sl": ("labels/12sl_statements.csv", "statements_ext_snomed"),
}
DESCRIPTIONS = "labels/snomed_description.csv"
HOLDS = "PTB-XL+'s folder, with features and labels"
_EXPECTED, _FIX = "a table of PTB-XL+", "download it again"
SECONDS = 10.0  # of a recording of PTB-XL
# Of each value the columns that have it, the first that a table has, and between which numbers it is one.
_VALUES = {
    "rate": (("HR_Ventr_Global", "HR__Global"), 15, 350), "p": (("P_Dur_Global", "P_DurFull_Global"), 20, 300),
    "pr": (("PR_Int_Global", "PQ_Int_Global"), 50, 600), "qrs": (("QRS_Dur_Global",), 30, 350),
    "qt": (("QT_Int_Global",), 150, 900), "qtc_bazett": (("QT_IntBazett_Global",), 150, 900),
    "qtc_fridericia": (("QT_IntFridericia_Global",), 150, 900),
    "axis": (("R_AxisFrontal_Global", "QRS_AxisFront_Global"), -360, 360),
    "p_axis": (("P_AxisFront_Global",), -360, 360), "t_axis": (("T_AxisFront_Global",), -360, 360),
}  # fmt: skip
_INTERVAL = ("RR_Mean_Global",), 150, 4000
_WAVES = {
    "p": ("P_Amp",), "q": ("Q_Amp",), "r": ("R_Amp",), "s": ("S_Amp",), "j": ("ST_Elev", "ST_Amp"),
    "st80": ("ST_Amp80ms",), "t": ("T_Amp",),
}  # fmt: skip
_MOST = 10.0  # mV
_ABSENT = "not in the table"


def read_features(folder: Path, table: str) -> Iterator[tuple[int, Measurements]]:
    """(ecg_id, what was measured) of each row of one of FEATURES.

    Raises:
        UserError: the table is not there, cannot be read, or has none of the columns.
    """
    path = folder / FEATURES[table]
    wanted = {column for columns, *_ in (*_VALUES.values(), _INTERVAL) for column in columns}
    for line, row in csv_rows(path, ("ecg_id",), path, _EXPECTED, "point --raw at PTB-XL+'s folder, or leave it out"):
        if not wanted & row.keys():
            raise UserError(path, "none of the columns that are read", f"such as {', '.join(sorted(wanted)[:3])}", _FIX)
        yield _number(path, line, row), _measured(row)


def read_statements(folder: Path, source: str) -> dict[int, tuple[str, ...]]:
    """ecg_id -> the names of its statements, the likeliest first, of one of STATEMENTS: SNOMED's descriptions of those
    that PTB-XL+ calls informative. Raises UserError."""
    needed = ("snomed_id", "description", "informative")
    fix = "point --raw at PTB-XL+'s folder, or leave statements out of --kinds"
    names = {
        str(row["snomed_id"]).strip(): row["description"].strip()
        for _, row in csv_rows(folder / DESCRIPTIONS, needed, folder / DESCRIPTIONS, _EXPECTED, fix)
        if str(row["informative"]).strip().lower() in ("true", "1", "1.0") and row["description"]
    }
    (file, column), found = STATEMENTS[source], dict[int, tuple[str, ...]]()
    for line, row in csv_rows(folder / file, ("ecg_id", column), folder / file, _EXPECTED, fix):
        where = f"{folder / file}, line {line}"
        with refused(where, "a cell that is not as PTB-XL+ has it", "a list of (code, likelihood)", _FIX, Exception):
            codes = sorted(ast.literal_eval(row[column] or "[]"), key=lambda pair: -float(pair[1]))
            told = [names.get(str(int(code)), "") for code, _ in codes]
        found[_number(folder / file, line, row)] = tuple(dict.fromkeys(filter(None, told)))
    return found


def _number(path: Path, line: int, row: Mapping[str, str]) -> int:
    with refused(f"{path}, line {line}", f"ecg_id {row['ecg_id']!r}", "the number of a recording", _FIX, Exception):
        return int(float(row["ecg_id"]))


def _measured(row: Mapping[str, str]) -> Measurements:
    found = {name: _first(row, *of) for name, of in _VALUES.items()}
    interval = _first(row, *_INTERVAL)
    if interval is not None:
        found["rate"] = 60_000 / interval if found["rate"] is None else found["rate"]
        if found["qtc_bazett"] is None and found["qt"] is not None:
            found["qtc_bazett"] = found["qt"] / (interval / 1000) ** 0.5
    for name in ("axis", "p_axis", "t_axis"):
        turned = found[name]
        found[name] = turned if turned is None else 180 - (180 - turned) % 360
    leads = {lead: Lead(waves) if (waves := _waves(row, lead)) else Lead(reason=_ABSENT) for lead in LEADS}
    found["sokolow_lyon"] = _sum(leads, "V1", ("V5", "V6"))
    found["cornell"] = _sum(leads, "V3", ("aVL",))
    values = {name: Value(found[name], float(found[name] is not None), _reason(found[name])) for name in UNITS}
    return Measurements(SECONDS, values, Rhythm(), leads)


def _waves(row: Mapping[str, str], lead: str) -> dict[str, float]:
    found = {}
    for name, columns in _WAVES.items():
        size = _first(row, tuple(f"{column}_{lead}" for column in columns), -_MOST, _MOST)
        if size is not None:
            found[name] = -abs(size) if name in ("q", "s") else size  # some tables have their depths
    return found


def _sum(leads: Mapping[str, Lead], s: str, r: tuple[str, ...]) -> float | None:
    """The depth of S in one lead and the largest R of others, where all are there."""
    depth, heights = leads[s].amplitudes.get("s"), [leads[lead].amplitudes.get("r") for lead in r]
    known = [height for height in heights if height is not None]
    return None if depth is None or len(known) < len(r) else max(known) - depth


def _first(row: Mapping[str, str], columns: tuple[str, ...], low: float, high: float) -> float | None:
    """The number in the first of the columns that has one, None where it is beyond what is possible."""
    for column in columns:
        try:
            number = float(row.get(column) or "nan")
        except ValueError:
            continue
        if math.isfinite(number):
            return number if low <= number <= high else None
    return None


def _reason(value: float | None) -> str:
    return _ABSENT if value is None else ""
