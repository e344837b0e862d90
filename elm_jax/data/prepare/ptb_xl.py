"""PTB-XL: WFDB records -> segments as `.npy`, and tables for report generation.

Leaves in O: ptb_xl/preprocessed_<len>/<path with _>_<segment>.npy; ptb_xl_reports.parquet (conversations) and
ptb_xl_pretrain.parquet (plain reports), with paths relative to O; prepare_report.json.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax import compat as behaviours
from elm_jax.data.prepare.output import PTB_XL_FOLDER, PTB_XL_REPORTS, compact, write_segment, write_table
from elm_jax.data.prepare.splits import leaks
from elm_jax.ecg.recording import read_recording, segments
from elm_jax.errors import UserError, nearest
from elm_jax.folders import write_json
from elm_jax.json_text import parse_json

INDEX = "ptbxl_database.csv"
REPORT = "prepare_report.json"
QUESTION = "Write the report of this ECG."
_COLUMNS = ("ecg_id", "patient_id", "report", "strat_fold", "filename_lr", "filename_hr")
_SEGMENT = re.compile(r"(.+)_(\d+)\.npy")


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
    try:
        return Entry(
            int(row["ecg_id"]),
            str(int(float(row["patient_id"]))),
            row["report"].strip(),
            int(row["strat_fold"]),
            row["filename_lr"],
            row["filename_hr"],
        )
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}, line {line}",
            f"an unreadable row ({error})",
            "numbers as in PTB-XL's database",
            "correct the line",
        ) from None


def prepare_ptb_xl(
    raw: Path,
    out: Path,
    sampling_rate: float = 250,
    length: int = 2500,
    progress: bool = True,
    compat: Sequence[str] = (),
) -> dict[str, Any]:
    """Prepare what of PTB-XL lies in `raw`; returns (and writes) the counts. `compat` is as for `ecg.to_segment`.

    Records without files, unreadable or too short are counted and listed; files already there are kept.
    Raises UserError if nothing can be prepared, or `out` holds segments made with other settings.
    """
    resampling = "spline" if behaviours.enabled("spline_resampling", compat) else "low-pass"
    settings = {
        "dataset": "ptb_xl",
        "sampling_rate": sampling_rate,
        "segment_len": length,
        "resampling": resampling,
    }
    _check_settings(out / REPORT, settings)
    entries = read_index(raw / INDEX)
    high = (raw / "records500").is_dir()
    folder = out / PTB_XL_FOLDER / f"preprocessed_{length}"
    done = segment_counts(folder)
    problems: dict[str, dict[str, str]] = {"missing": {}, "unreadable": {}, "too_short": {}}
    prepared: list[tuple[Entry, str, int]] = []
    skipped = 0
    for entry in tqdm(entries, desc="PTB-XL", unit="record", disable=not progress):
        name = entry.filename_hr if high else entry.filename_lr
        stem = name.replace("/", "_")
        count = done.get(stem, 0)
        skipped += bool(count)
        if not count and not (raw / f"{name}.hea").is_file():
            problems["missing"][name] = "no header file"
            continue
        if not count:
            try:
                recording = replace(read_recording(raw / name, dtype=np.float64), report=entry.report)
                windows = segments(recording, sampling_rate, length, compat)
            except UserError as error:
                problems["unreadable"][name] = str(error)
                continue
            for number in reversed(range(len(windows))):
                path = folder / f"{stem}_{number}.npy"
                write_segment(path, out, windows[number], recording, name, sampling_rate)
            count = len(windows)
        if count:
            prepared.append((entry, stem, count))
        else:
            problems["too_short"][name] = f"shorter than {length} samples at {sampling_rate:g} Hz"
    if not prepared:
        kind, listed = max(problems.items(), key=lambda item: len(item[1]))
        first = next(iter(listed.items()), (INDEX, "no rows"))
        raise UserError(
            str(raw),
            f"no usable record ({len(listed)} {kind}; {first[0]}: {first[1]})",
            "WFDB files in records500 or records100",
            "point --raw at PTB-XL's folder",
        )
    rows = [row for item in prepared for row in _table_rows(folder.relative_to(out), *item)]
    leaking = leaks((row["split"], (row["patient_id"],)) for row in rows)
    write_table(out / PTB_XL_REPORTS, [{**row, "text": _conversation(row["text"])} for row in rows])
    write_table(out / "ptb_xl_pretrain.parquet", rows)
    report = {
        **settings,
        "records": len(prepared),
        "already_there": skipped,
        "segments": sum(count for _, _, count in prepared),
        "without_report": sum(not entry.report for entry, _, _ in prepared),
        "rows": {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")},
        "patients": len({row["patient_id"] for row in rows}),
        "patients_in_several_splits": leaking,
        **problems,
    }
    write_json(out / REPORT, report)
    return report


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Segments of one folder must be made alike, also over several runs."""
    try:
        before = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(before, dict):
        return
    for key, value in settings.items():
        if before.get("segment_len") == settings["segment_len"] and before.get(key) != value:
            raise UserError(
                str(path),
                f"segments made with {key} {before.get(key, 'of an earlier version')}",
                f"{key} {value}",
                "give another --out",
            )


def segment_counts(folder: Path) -> dict[str, int]:
    """Stem -> number of segments, for the records that are complete: segment 0 is written last."""
    found: dict[str, set[int]] = {}
    for file in folder.glob("*.npy"):
        match = _SEGMENT.fullmatch(file.name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    return {stem: len(numbers) for stem, numbers in found.items() if 0 in numbers}


def _table_rows(folder: Path, entry: Entry, stem: str, count: int) -> Sequence[dict[str, Any]]:
    if not entry.report:
        return []
    return [
        {
            "ecg_path": f"{folder.as_posix()}/{stem}_{number}.npy",
            "text": entry.report,
            "name": "report",
            "patient_id": entry.patient,
            "split": entry.split,
        }
        for number in range(count)
    ]


def _conversation(report: str) -> str:
    return compact([{"from": "human", "value": QUESTION}, {"from": "gpt", "value": report}])
