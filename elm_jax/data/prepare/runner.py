"""From a raw download to records, in one way for every dataset of recordings.

Leaves in O: <name>/preprocessed_<len>/<recording with _ for />_<segment>.npy; with paths relative to O, the tables
<name>_reports.parquet (conversations), <name>_pretrain.parquet (plain reports) and <name>_questions.parquet, of those
of the three that there is something for; <name>_report.json, the counts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax import compat as behaviours
from elm_jax.data.prepare.output import compact, write_segment, write_table
from elm_jax.data.prepare.profiles import MADE, PROFILES
from elm_jax.data.prepare.splits import SPLITS, leaks, split_of
from elm_jax.ecg.recording import Recording, read_ecg, segments
from elm_jax.errors import UserError
from elm_jax.folders import write_json
from elm_jax.json_text import parse_json

REPORT_QUESTION = "Write the report of this ECG."
HELD_OUT = 0.1  # of the patients, in val and in test, where a dataset has no splits of its own
_SEGMENT = re.compile(r"(.+)_(\d+)\.npy")


@dataclass(frozen=True)
class RawRecording:
    """What a dataset says of one recording.

    path: below the raw folder, as `read` takes it. split: "train", "val" or "test"; None: by a hash of the patient.
    report: the cardiologist's or the machine's words, if any. questions: (kind, question, answer) about it.
    """

    path: str
    patient: str
    split: str | None = None
    report: str = ""
    questions: Sequence[tuple[str, str, str]] = ()


def read_double(path: Path) -> Recording:
    """The recording of a file of any format, or WFDB record: (12, L) float64 in canonical order, mV."""
    return read_ecg(path, dtype=np.float64)


@dataclass(frozen=True)
class RawDataset:
    """A dataset as it is downloaded.

    title: its name in print. holds: what its folder has, for `--help` and errors. recordings: of a folder, what there
    is; raises UserError where its index cannot be read. read: a recording's file, the leads in the canonical order.
    """

    title: str
    holds: str
    recordings: Callable[[Path], Iterable[RawRecording]]
    read: Callable[[Path], Recording] = read_double


@dataclass(frozen=True)
class _Prepared:
    """A recording whose segments are there."""

    raw: RawRecording
    split: str
    paths: Sequence[str]  # below O

    def rows(self, name: str, text: str) -> Iterator[dict[str, Any]]:
        """One record for each segment."""
        common = {"text": text, "name": name, "patient_id": self.raw.patient, "split": self.split}
        return ({"ecg_path": path, **common} for path in self.paths)


def prepare_dataset(
    name: str,
    dataset: RawDataset,
    raw: Path,
    out: Path,
    sampling_rate: float = 250,
    length: int = 2500,
    progress: bool = True,
    profile: str = "clean",
    compat: Sequence[str] = (),
) -> dict[str, Any]:
    """Prepare what of a dataset lies in `raw`; returns (and writes) the counts.

    `profile` is one of PROFILES; the compat name `spline_resampling` makes elm-2026 of clean. Recordings without files,
    unreadable or too short are counted and listed; files already there are kept.

    Raises:
        UserError: nothing can be prepared, or `out` holds segments made with other settings.
    """
    if profile == "clean" and behaviours.enabled("spline_resampling", compat):
        profile = "elm-2026"
    resampling, filters = MADE[profile]
    settings = {"dataset": name, "sampling_rate": sampling_rate, "segment_len": length, "resampling": resampling}
    settings |= {"filters": filters}
    for earlier in (f"{name}_report.json", "prepare_report.json"):  # the second: before there were several datasets
        _check_settings(out / earlier, settings)
    folder = out / name / f"preprocessed_{length}"
    done = segment_counts(folder)
    problems: dict[str, dict[str, str]] = {"missing": {}, "unreadable": {}, "too_short": {}}
    prepared: list[_Prepared] = []
    kept = 0
    found = list(dataset.recordings(raw))
    _check_stems(raw, found)
    for one in tqdm(found, desc=dataset.title, unit="record", disable=not progress):
        stem = one.path.replace("/", "_")
        count = done.get(stem, 0)
        kept += bool(count)
        if not count:
            problem = _unlike_a_path(one.path) or _absent(raw / one.path)
            if problem:
                problems["missing"][one.path] = problem
                continue
            try:
                recording = replace(dataset.read(raw / one.path), report=one.report)
                signal = PROFILES[profile](recording.signal, recording.sampling_rate, sampling_rate)
                made = replace(recording, signal=signal, sampling_rate=sampling_rate)
                windows = segments(made, sampling_rate, length)
            except UserError as error:
                problems["unreadable"][one.path] = str(error)
                continue
            count = len(windows)
            for number in reversed(range(count)):  # the first is last: where it is, all are
                path = folder / f"{stem}_{number}.npy"
                write_segment(path, out, windows[number], recording, one.path, sampling_rate)
        if count:
            where = folder.relative_to(out).as_posix()
            split = one.split or split_of(one.patient, 0, HELD_OUT, HELD_OUT)
            prepared.append(_Prepared(one, split, [f"{where}/{stem}_{number}.npy" for number in range(count)]))
        else:
            problems["too_short"][one.path] = f"shorter than {length} samples at {sampling_rate:g} Hz"
    if not prepared:
        kind, listed = max(problems.items(), key=lambda item: len(item[1]))
        first = ": ".join(next(iter(listed.items()), ("the index", "no rows")))
        told = f"no usable record ({len(listed)} {kind}; {first})"
        raise UserError(str(raw), told, dataset.holds, f"point --raw at {dataset.title}'s folder")
    rows = _write_tables(out, name, prepared)
    report = {
        **settings,
        "records": len(prepared),
        "already_there": kept,
        "segments": sum(len(item.paths) for item in prepared),
        "without_report": sum(not item.raw.report for item in prepared),
        "rows": {split: sum(row["split"] == split for row in rows) for split in SPLITS},
        "patients": len({row["patient_id"] for row in rows}),
        "patients_in_several_splits": leaks((row["split"], (row["patient_id"],)) for row in rows),
        **problems,
    }
    write_json(out / f"{name}_report.json", report)
    return report


def _write_tables(out: Path, name: str, prepared: Sequence[_Prepared]) -> list[dict[str, Any]]:
    """The tables that there is something for; the rows of the first of them, and of the questions."""
    reports = [row for item in prepared if item.raw.report for row in item.rows("report", item.raw.report)]
    questions = [
        row
        for item in prepared
        for kind, question, answer in item.raw.questions
        for row in item.rows(kind, compact([kind, question, answer]))
    ]
    tables = {
        "reports": [{**row, "text": _conversation(row["text"])} for row in reports],
        "pretrain": reports,
        "questions": questions,
    }
    for kind, rows in tables.items():
        if rows:
            write_table(out / f"{name}_{kind}.parquet", rows)
    return reports + questions


def _conversation(report: str) -> str:
    return compact([{"from": "human", "value": REPORT_QUESTION}, {"from": "gpt", "value": report}])


def _check_stems(raw: Path, found: Iterable[RawRecording]) -> None:
    """No two recordings may be kept under one name."""
    named: dict[str, str] = {}
    for one in found:
        other = named.setdefault(one.path.replace("/", "_"), one.path)
        if other != one.path:
            fix = "rename one of them"
            raise UserError(str(raw), f"{other} and {one.path}", "recordings that differ in more than / and _", fix)


def _unlike_a_path(path: str) -> str | None:
    """What is wrong with a path that an index gives: it may not lead out of the folder."""
    parts = PurePosixPath(path)
    inside = path and not parts.is_absolute() and ".." not in parts.parts
    return None if inside else "not a path below the raw folder"


def _absent(path: Path) -> str | None:
    """A recording is a file, or a WFDB record without its suffix."""
    return None if path.is_file() or path.with_name(f"{path.name}.hea").is_file() else "no such file, nor a .hea of it"


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Segments of one folder must be made alike, also over several runs."""
    try:
        before = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(before, dict) or any(before.get(key) != settings[key] for key in ("dataset", "segment_len")):
        return
    for key, value in settings.items():
        if before.get(key, "none" if key == "filters" else None) != value:  # there were none once
            found = f"segments made with {key} {before.get(key, 'of an earlier version')}"
            raise UserError(str(path), found, f"{key} {value}", "give another --out")


def segment_counts(folder: Path) -> dict[str, int]:
    """Stem -> number of segments, for the recordings that are complete: segment 0 is written last."""
    found: dict[str, set[int]] = {}
    for file in folder.glob("*.npy"):
        match = _SEGMENT.fullmatch(file.name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    return {stem: len(numbers) for stem, numbers in found.items() if 0 in numbers}
