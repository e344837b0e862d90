"""From a raw download to records, in one way for every dataset of recordings.

Leaves in O: <name>/preprocessed_<len>/<recording with _ for />_<segment>.npy, or shards in which recordings are called
so (`ecg.shards`); <name>_report.json, the counts; and with paths relative to O the tables <name>_records.parquet
(patient, split, report and place of each), <name>_reports.parquet (conversations), <name>_pretrain.parquet (plain
reports) and <name>_questions.parquet, of the last three those that there is something for.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax import compat as behaviours
from elm_jax.data.prepare.output import FORMATS, NpyFiles, Shards, compact, write_rows
from elm_jax.data.prepare.profiles import MADE, PROFILES, Profile
from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording, unlike_a_path
from elm_jax.data.prepare.reports import AS_IS, UNCHANGED, Reports
from elm_jax.data.prepare.splits import SPLITS, Owner, leaks, splits_of
from elm_jax.data.prepare.work import in_order
from elm_jax.data.sources import patient_ids
from elm_jax.ecg.checks import check_signal
from elm_jax.ecg.recording import Recording, segments
from elm_jax.errors import UserError, printable
from elm_jax.folders import json_if_whole, write_atomic, write_json
from elm_jax.json_text import parse_json
from elm_jax.stopping import each

TABLES = ("records", "reports", "pretrain", "questions")  # of which the first has all recordings, and no conversation
REPORT_QUESTION = "Write the report of this ECG."
_KINDS = ("flat", "clipped", "scale", "limb_sums", "reversal")  # what `check_signal` may find in what is prepared
# In the folder of the segments: what is amiss with those that were made, a line for each; how all are made.
_SIGNALS, _SETTINGS = "signals.jsonl", "settings.json"
_OF_PROFILES = ("resampling", "filters")  # of the settings, in the order of MADE
# Of settings that there are not always: before there were such, or where nobody gives them.
_BEFORE = {
    "filters": "none",
    "reports": AS_IS,
    "format": "npy",
    "assumed_rate": None,
    "assumed_unit": None,
    "table": None,
}


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A recording whose segments are there."""

    raw: RawRecording
    patients: tuple[str, ...]
    count: int
    folder: str  # below O

    def rows(
        self, splits: Iterable[str], place: Callable[[str, int], dict[str, Any]] | None = None, **said: str
    ) -> Iterator[dict[str, Any]]:
        """One record for each segment and split, with its `place`."""
        common = {**said, "patient_id": "+".join(self.patients)}
        for split, number in product(splits, range(self.count)):
            placed = place(self.raw.stem, number) if place else {}
            yield {"ecg_path": f"{self.folder}/{self.raw.stem}_{number}.npy", **common, "split": split, **placed}


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
    workers: int = 1,
    split: str = "official",
    folds: int = 0,
    reports: Reports = UNCHANGED,
    made_by: Mapping[str, str] | None = None,
    form: str = "npy",
) -> dict[str, Any]:
    """Prepare what of a dataset lies in `raw`; returns (and writes) the counts.

    `profile` is one of PROFILES; the compat name `spline_resampling` makes elm-2026 of clean. `workers`: processes;
    what is written does not depend on their number. `split` and `folds` are as for `splits_of`; `reports` says what
    becomes of these, `made_by` what the report is to say of how it was made; `form` is one of FORMATS. Recordings
    without files, unreadable or too short are counted and listed; files already there are kept.

    Raises:
        UserError: nothing can be prepared, or `out` holds segments made with other settings.
    """
    if profile == "clean" and behaviours.enabled("spline_resampling", compat):
        profile = "elm-2026"
    resampling, filters = MADE[profile]
    settings = {"dataset": name, "sampling_rate": sampling_rate, "segment_len": length, "resampling": resampling}
    settings |= {"filters": filters, "reports": reports.name, "format": form, **dataset.given}
    folder = out / name / f"preprocessed_{length}"
    # The last of them: before there were several datasets.
    for earlier in (folder / _SETTINGS, out / f"{name}_report.json", out / "prepare_report.json"):
        _check_settings(earlier, settings)
    problems: dict[str, dict[str, str]] = {"missing": {}, "unreadable": {}, "too_short": {}}
    found: list[RawRecording] = []
    for one in dataset.recordings(raw):
        if isinstance(one, LeftOut):
            problems.setdefault(one.kind, {})[one.what] = one.why
        elif why := _unlike_a_name(one):
            problems["missing"][one.where] = why
        else:
            found.append(one)
    _check_stems(raw, found)
    divided = f"{split}, {folds} folds" if folds else split
    found, about_reports = reports(found)
    for left in folder.glob(".*.*.????????"):  # a write that was cut off
        left.unlink()
    store = FORMATS[form](folder)
    done = store.counts()
    maker = _Maker(raw, out, store, dataset.read, PROFILES[profile], settings)
    noted = _notes(folder)
    if noted.keys() - done.keys():  # of what is made anew
        _write_notes(folder, {stem: noted[stem] for stem in noted.keys() & done.keys()})
    made = in_order(maker, [one for one in found if one.stem not in done], workers)
    prepared: list[_Prepared] = []
    kept = 0
    bar = tqdm(found, desc=dataset.title, unit="record", disable=not progress)
    for one in each(bar, "record"):
        count = done.get(one.stem, 0)
        kept += bool(count)
        if not count:
            count, kind, why, packed = next(made)
            if kind:
                problems[kind][one.where] = why
            else:
                store.keep(one.stem, packed)
        if count:
            whose = patient_ids(one.patient) or (f"{name}:{one.stem}",)
            prepared.append(_Prepared(one, whose, count, folder.relative_to(out).as_posix()))
    if not prepared:
        kind, listed = max(problems.items(), key=lambda item: len(item[1]))
        first = ": ".join(next(iter(listed.items()), ()))
        told = f"no usable record ({len(listed)} {kind}; {first})" if listed else "no recording"
        raise UserError(str(raw), told, dataset.holds, f"point --raw at the folder of {dataset.title}")
    _warn_of_splits(out, name, divided)
    kept_as = store.finish()
    owners = [Owner(item.patients, item.raw.split, item.raw.fold) for item in prepared]
    splits = splits_of(owners, split, folds)
    report = {
        **settings,
        **(made_by or {}),
        "profile": profile,
        "split": divided,
        "records": len(prepared),
        "already_there": kept,
        "segments": sum(item.count for item in prepared),
        "without_report": sum(not item.raw.words for item in prepared),
        **kept_as,
        **_write_tables(out, name, prepared, splits, store),
        "patients": len({patient for item in prepared for patient in item.patients}),
        "patients_in_several_splits": leaks(
            (split, item.patients) for item, found in zip(prepared, splits, strict=True) for split in found
        ),
        **problems,
        **about_reports,
        **_signals(folder, {item.raw.stem: item.raw.where for item in prepared}),
    }
    write_json(out / f"{name}_report.json", report)
    return report


@dataclass(frozen=True)
class _Maker:
    """Makes the segments of a recording."""

    raw: Path
    out: Path
    store: NpyFiles | Shards
    read: Callable[..., Recording]
    profile: Profile
    settings: dict[str, Any]

    def __call__(self, one: RawRecording) -> tuple[int, str, str, Any]:
        """How many segments there are; where there are none the kind of the problem, and what it is; and what is left
        to the store."""
        rate, length = self.settings["sampling_rate"], self.settings["segment_len"]
        problem = unlike_a_path(one.path) or _absent(self.raw / one.path)
        if problem:
            return 0, "missing", problem, None
        try:
            where = (self.raw / one.path,) if one.row is None else (self.raw / one.path, one.row)
            recording = self.read(*where)
            if not np.isfinite(recording.signal).all():
                raise UserError(self.raw / one.path, "NaN or infinity", "finite numbers", "leave it out, or repair it")
            signal = self.profile(recording.signal, recording.sampling_rate, rate)
            windows = segments(replace(recording, signal=signal, sampling_rate=rate), rate, length)
            if not len(windows):
                return 0, "too_short", f"shorter than {length} samples at {rate:g} Hz", None
            said = {"report": one.words, "ecg_path": one.path, "original_sf": recording.sampling_rate}
            said |= {"target_sf": rate, "segment_len": length}
            packed = self.store.pack(one.stem, windows, said, self.out, recording.gains)
        except UserError as error:
            return 0, "unreadable", str(error), None
        folder = self.store.folder
        if not (folder / _SETTINGS).is_file():  # there before the first segment: a run that is stopped has them
            write_json(folder / _SETTINGS, self.settings)
        amiss = _amiss(recording)
        if amiss:
            self._note({"name": one.stem, **amiss})
        return len(windows), "", "", self.store.leave(packed)

    def _note(self, said: dict[str, str]) -> None:
        """A line of its own, whatever was cut off before; there before the recording counts as made."""
        handle = os.open(self.store.folder / _SIGNALS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, f"\n{json.dumps(said)}\n".encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def _amiss(recording: Recording) -> dict[str, str]:
    """What `check_signal` finds in a signal that is prepared nevertheless, by kind."""
    kinds: dict[str, list[str]] = {}
    for finding in check_signal(recording.signal, recording.sampling_rate):
        kinds.setdefault(finding.kind, []).append(finding.text)
    return {kind: "; ".join(texts) for kind, texts in kinds.items()}


def _signals(folder: Path, prepared: dict[str, str]) -> dict[str, dict[str, str]]:
    """What was noted of the recordings that are `prepared` (stem -> what the report calls it), by kind.

    The notes are in order afterwards, each once, whoever wrote them.
    """
    noted = _notes(folder)
    if (folder / _SIGNALS).is_file():
        _write_notes(folder, noted)
    kinds: dict[str, dict[str, str]] = {kind: {} for kind in _KINDS}
    for stem in sorted(prepared.keys() & noted.keys()):
        for kind, why in noted[stem].items():
            kinds.setdefault(kind, {})[prepared[stem]] = why
    return kinds


def _notes(folder: Path) -> dict[str, dict[str, str]]:
    """Stem -> what was noted of it last."""
    path = folder / _SIGNALS
    noted: dict[str, dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            said = parse_json(line)
            noted[said.pop("name")] = said
        except (ValueError, AttributeError, KeyError):  # cut off when the machine stopped: it is made anew
            continue
    return noted


def _write_notes(folder: Path, noted: dict[str, dict[str, str]]) -> None:
    text = "".join(f"{json.dumps({'name': stem, **noted[stem]})}\n" for stem in sorted(noted))
    write_atomic(folder / _SIGNALS, lambda file: file.write(text.encode()), lasting=True)


def _write_tables(
    out: Path, name: str, prepared: Sequence[_Prepared], splits: Sequence[tuple[str, ...]], store: NpyFiles | Shards
) -> dict[str, dict[str, Any]]:
    """Write the tables that there is something for. Returns rows by split: `rows` of reports and questions, `tables`
    of each."""
    counts: Counter[tuple[str, str]] = Counter()

    def reports(text: Callable[[str], str]) -> Iterator[dict[str, str]]:
        for item, where in zip(prepared, splits, strict=True):
            if item.raw.words:
                yield from item.rows(where, text=text(item.raw.words), name="report")

    def questions() -> Iterator[dict[str, str]]:
        for item, where in zip(prepared, splits, strict=True):
            for kind, question, answer in item.raw.questions:
                yield from item.rows(where, text=compact([kind, question, answer]), name=kind)

    def counted(kind: str, rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
        for row in rows:
            counts[kind, row["split"]] += 1
            yield row

    owned = zip(prepared, splits, strict=True)
    records = (row for item, where in owned for row in item.rows(where, store.place, report=item.raw.words))
    made = (records, reports(_conversation), reports(str), questions())
    for kind, rows in zip(TABLES, made, strict=True):
        write_rows(out / f"{name}_{kind}.parquet", counted(kind, rows))
    named = sorted({split for where in splits for split in where if len(where) > 1}) or SPLITS
    written = {f"{name}_{kind}.parquet": kind for kind in TABLES if any(one == kind for one, _ in counts)}
    earlier = json_if_whole(out / f"{name}_report.json").get("tables")
    for kind in TABLES:
        file = f"{name}_{kind}.parquet"
        if isinstance(earlier, dict) and file in earlier and file not in written:
            (out / file).unlink(missing_ok=True)  # there is nothing for it any more
    return {
        "rows": {split: counts["reports", split] + counts["questions", split] for split in named},
        "tables": {file: {split: counts[kind, split] for split in named} for file, kind in written.items()},
    }


def _warn_of_splits(out: Path, name: str, split: str) -> None:
    """Say where tables take the place of ones with other splits, by which others may have been made."""
    before = json_if_whole(out / f"{name}_report.json").get("split", split)
    if before != split:
        own = {f"{name}_{kind}.parquet" for kind in TABLES}
        others = ", ".join(sorted(path.name for path in out.glob("*.parquet") if path.name not in own))
        told = f"warning: the tables of {name} in {out} had --split {before}, and now have {split}."
        told += f" Make these again, whose splits may be others now: {others}" if others else ""
        print(printable(told), file=sys.stderr)


def _conversation(report: str) -> str:
    return compact([{"from": "human", "value": REPORT_QUESTION}, {"from": "gpt", "value": report}])


def _check_stems(raw: Path, recordings: Iterable[RawRecording]) -> None:
    """No two recordings may be kept under one name."""
    named: dict[str, str] = {}
    for one in recordings:
        other = named.setdefault(one.stem, one.where)
        if other != one.where:
            found = f"{other} and {one.where}"
            expected = "recordings that differ in more than / and _, and rows that have names"
            raise UserError(str(raw), found, expected, "rename one of them")


def _unlike_a_name(one: RawRecording) -> str | None:
    """What is wrong with what its segments would be called."""
    if any(name != name.encode(errors="replace").decode() for name in (one.stem, one.path)):
        return "a name that is not Unicode, as tables are"
    return "a name with / in it" if "/" in one.stem else None


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
    for key in {**settings, **_BEFORE}:
        made, value = ({**_BEFORE, **told}.get(key, "of an earlier version") for told in (before, settings))
        if made != value:
            fix = "give another --out"
            if key in _OF_PROFILES and (profile := _profile(before)):
                fix += f", or --profile {profile}, as they were made"
            raise UserError(str(path), f"segments made with {key} {made}", f"{key} {value}", fix)


def _profile(settings: Mapping[str, Any]) -> str:
    """The profile by which segments of these settings were made, "" where they do not say."""
    made = tuple(settings.get(key, _BEFORE.get(key)) for key in _OF_PROFILES)
    return next((name for name, how in MADE.items() if how == made), "")
