"""Instruction pairs in the manner of ECG-LM (Yang et al., Health Data Sci 5 (2025) 0221), by rules without a model.

Of each prepared recording: what was measured (PTB-XL+'s tables, or `ecg.beats` of its samples), which findings that
makes by the rules of `ecg.guidelines`, why, and by which criterion, and what its report states. ECG-LM's own pairs, and
their wording, were not published: kinds, wordings and rules here are ours. Where a finding is asked for, the answer is
yes as often as no, for each finding and in each split, so that the question alone tells nothing.
"""

from __future__ import annotations

import zlib
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax.data.prepare.conversations import Recordings, nobody, recording_key
from elm_jax.data.prepare.output import compact, write_rows
from elm_jax.data.prepare.ptb_xl_plus import FEATURES, HOLDS, STATEMENTS, read_features, read_statements
from elm_jax.data.prepare.splits import SPLITS, leaks
from elm_jax.data.prepare.work import in_order
from elm_jax.data.table_files import csv_rows
from elm_jax.ecg.beats.measurements import Measurements, measure
from elm_jax.ecg.guidelines import RULES, SAID, Person, said
from elm_jax.ecg.recording import read_ecg
from elm_jax.errors import UserError, nearest
from elm_jax.folders import write_json
from elm_jax.stopping import each
from elm_jax.symbols.coder import cores

MEASURED = "measured"  # in place of a table of FEATURES: of the samples
MOST = 1000  # questions about a recording
_PTB_XL = "PTB-XL "  # how keys of its recordings begin
_BARE = " Answer yes or no."
# Of each kind the ways to ask; {} is the finding, or the value.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "verify": ("Does this ECG show {}?" + _BARE, "Does this ECG show {}?", "Is there {} in this ECG?"),
    "criterion": ("By which criterion is {} told, and is it met here?", "Define {} and say whether this ECG meets it."),
    "why": ("This ECG shows {}. What speaks for it?", "Why is {} found in this ECG?"),
    "findings": ("Which findings do the measurements of this ECG make?", "What is found in this ECG by measuring it?"),
    "measure": ("What is the {} of this ECG?", "Measure the {}."),
    "statements": ("What does the report of this ECG state?", "Which statements are made about this ECG?"),
}
_NAMES = {
    "rate": "heart rate", "p": "duration of the P wave", "pr": "PR interval", "qrs": "QRS duration",
    "qt": "QT interval", "qtc_bazett": "QTc interval", "axis": "QRS axis", "sokolow_lyon": "Sokolow-Lyon index",
    "cornell": "Cornell voltage",
}  # fmt: skip
_NONE = "None of those that are told by measurements."


@dataclass(frozen=True)
class Wanted:
    """kinds: of QUESTIONS; most: questions about a recording at most, None: all; features: of FEATURES or MEASURED;
    statements: of STATEMENTS; val and test: parts of the patients that no table puts into a split."""

    kinds: tuple[str, ...] = tuple(QUESTIONS)
    most: int | None = None
    features: str = MEASURED
    statements: str = "ptbxl"
    seed: int = 0
    val: float = 0.1
    test: float = 0.1


@dataclass(frozen=True)
class Case:
    """A segment and what is known of it. told: finding -> (whether it is there, what shows that); values: in words."""

    path: str
    patients: tuple[str, ...]
    split: str
    told: Mapping[str, tuple[bool, str]]
    values: Mapping[str, str]
    statements: tuple[str, ...] = ()


def prepare_ecg_lm(
    raw: Path | None, records: Path, out: Path, wanted: Wanted, ptbxl_csv: Path | None = None, length: int = 2500,
    workers: int = 1, progress: bool = True, made_by: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the table `out` (.parquet) with paths relative to `records`; returns (and writes) the counts.

    Args:
        raw: PTB-XL+'s folder; None: nothing is stated, and all recordings are measured.
        records: where `prepare` left segments of `length` samples.
        ptbxl_csv: ptbxl_database.csv, which says sex and age.
        workers: processes that measure, on which nothing depends.

    Raises:
        UserError: a table cannot be read, there are no recordings, or nothing can be asked.
    """
    _check(wanted, raw)
    recordings = Recordings(records, length, out)
    people = _people(ptbxl_csv) if ptbxl_csv else {}
    left_out: dict[str, dict[str, str]] = {"without_features": {}, "without_recording": {}, "not_measured": {}}
    by_key = {recording_key(path): path for path in sorted(recordings.paths)}  # of a recording's several the last
    stated = read_statements(raw, wanted.statements) if raw and "statements" in wanted.kinds else {}
    if wanted.features == MEASURED:
        rows = _measure_all(records, sorted(recordings.paths), workers, left_out["not_measured"])
    else:
        assert raw is not None
        rows = _of_table(raw, wanted.features, recordings, by_key, left_out)
    cases = []
    for path, found in each(tqdm(rows, "recordings", unit="", disable=not progress), "recording"):
        number, who = _ecg_id(path), recordings.patients(path) or (nobody(path),)
        split = recordings.split(path, who, "recordings", wanted.seed, wanted.val, wanted.test)
        case = case_of(found, people.get(number, Person()))
        cases.append(replace(case, path=path, patients=who, split=split, statements=stated.get(number, ())))
    counts = Counter[tuple[str, str]]()

    def counted(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
        for row in rows:
            counts["rows", row["split"]] += 1
            counts["kinds", row["name"]] += 1
            counts["asked", row["attribute"]] += row["name"] in ("verify", "criterion")
            yield row

    write_rows(out, counted(pairs_of(cases, wanted)))
    if not counts:
        reasons = [f"{what}: {why}" for listed in left_out.values() for what, why in listed.items()]
        found = f"nothing to ask about {len(cases)} recordings" + (f" ({reasons[0]})" if reasons else "")
        raise UserError(records, found, "recordings with measurements or statements", "prepare more, or other --kinds")
    report = {
        **(made_by or {}),
        "features": wanted.features,
        "statements_of": wanted.statements if stated else "none",
        "recordings": len(cases),
        "rows": {split: counts["rows", split] for split in SPLITS},
        "kinds": {kind: counts["kinds", kind] for kind in wanted.kinds},
        "findings": {rule.finding: _verdicts(cases, rule.finding, counts) for rule in RULES},
        "seed": wanted.seed,
        "patients": len({one for case in cases for one in case.patients}),
        "patients_in_several_splits": leaks((case.split, case.patients) for case in cases),
        **left_out,
    }
    write_json(out.with_name(f"{out.stem}_report.json"), report)
    return report


def add_arguments(parser: ArgumentParser) -> None:
    """What `prepare_by` is told by."""
    parser.add_argument("--raw", type=Path, help=f"{HOLDS}; without it all is measured in the recordings")
    parser.add_argument("--out", type=Path, required=True, help="the table (.parquet), or a folder for it")
    parser.add_argument("--records", type=Path, help="where prepare left recordings; default: the folder of --out")
    parser.add_argument("--ptbxl-csv", type=Path, help="ptbxl_database.csv: sex and age, on which some rules depend")
    parser.add_argument(
        "--features", choices=[*FEATURES, MEASURED],
        help="PTB-XL+'s table of measurements (default: 12sl), or measured: in the recordings (default without --raw)",
    )  # fmt: skip
    parser.add_argument(
        "--statements", choices=list(STATEMENTS), default="ptbxl", help="whose: the cardiologists', or 12SL's"
    )
    parser.add_argument("--kinds", default=",".join(QUESTIONS), help="of questions; default: %(default)s")
    parser.add_argument("--questions", type=int, metavar="N", help="about a recording, at most; default: all")
    parser.add_argument("--segment-len", type=int, default=2500, help="samples of the segments")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; the result is the same")


def prepare_by(args: Namespace, table: Path) -> dict[str, Any]:
    """`prepare_ecg_lm` as the arguments say, into `table`."""
    features = args.features or ("12sl" if args.raw else MEASURED)
    kinds = tuple(args.kinds.split(","))
    wanted = Wanted(kinds, args.questions, features, args.statements, args.seed, args.val, args.test)
    places = args.raw, args.records or table.parent, table
    return prepare_ecg_lm(*places, wanted, args.ptbxl_csv, args.segment_len, args.workers, True, args.made_by)


def case_of(found: Measurements, person: Person) -> Case:
    """What measurements tell of somebody's ECG, of no path yet."""
    told = {}
    for rule in RULES:
        holds = rule.of(found, person)
        if holds is not None:
            told[rule.finding] = holds, rule.shows(found)
    values = {name: said(found, name) for name in SAID if found.values[name].value is not None}
    return Case("", (), "", told, values)


def pairs_of(cases: Sequence[Case], wanted: Wanted) -> Iterator[dict[str, str]]:
    """The rows of the table, in the order of the cases; the same for the same cases and seed."""
    chosen = _balanced(cases, wanted.seed)
    for place, case in enumerate(cases):
        rng = np.random.default_rng([wanted.seed, zlib.crc32(case.path.encode())])
        rows = [row for kind in wanted.kinds for row in _rows(kind, case, chosen[place], rng)]
        if wanted.most is not None and len(rows) > wanted.most:
            rows = [rows[i] for i in sorted(rng.choice(len(rows), wanted.most, replace=False))]
        yield from rows


def _balanced(cases: Sequence[Case], seed: int) -> list[set[str]]:
    """Of each case the findings that are asked for: each as often where it is there as where it is not."""
    chosen: list[set[str]] = [set() for _ in cases]
    for number, rule in enumerate(RULES):
        for split in SPLITS:
            sides: tuple[list[int], list[int]] = [], []
            for place, case in enumerate(cases):
                if case.split == split and rule.finding in case.told:
                    sides[case.told[rule.finding][0]].append(place)
            rng, count = np.random.default_rng([seed, number, SPLITS.index(split)]), min(map(len, sides))
            for side in sides:
                for place in rng.choice(len(side), count, replace=False):
                    chosen[side[place]].add(rule.finding)
    return chosen


def _rows(kind: str, case: Case, chosen: set[str], rng: np.random.Generator) -> Iterator[dict[str, str]]:
    def row(about: str, answer: Callable[[str], str] | str, name: str = "") -> dict[str, str]:
        asked = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))].format(about)
        told = answer if isinstance(answer, str) else answer(asked)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
        common = {"ecg_path": case.path, "text": compact(turns), "name": kind, "patient_id": "+".join(case.patients)}
        return {**common, "split": case.split, "attribute": name or about}

    if kind == "findings" and case.told:
        there = [finding for finding, (holds, _) in case.told.items() if holds]
        yield row("", f"{'; '.join(there)}." if there else _NONE, kind)
    if kind == "measure":
        yield from (row(_NAMES[name], f"{words}.") for name, words in case.values.items())
    if kind == "statements" and case.statements:
        yield row("", "; ".join(case.statements), kind)
    for rule in RULES:
        holds, shown = case.told.get(rule.finding, (False, ""))
        if kind == "why" and holds:
            yield row(rule.finding, f"{shown}. The criterion is {rule.criterion} ({rule.source}).")
        if rule.finding in chosen and kind == "verify":
            yes = "yes" if holds else "no"
            bare = f"{yes.capitalize()}: {shown}, and the criterion is {rule.criterion}."
            yield row(rule.finding, lambda asked, yes=yes, bare=bare: yes if asked.endswith(_BARE) else bare)
        if rule.finding in chosen and kind == "criterion":
            met = "It is met" if holds else "It is not met"
            yield row(rule.finding, f"The criterion is {rule.criterion} ({rule.source}). {met}: {shown}.")


def _of_table(
    raw: Path, table: str, recordings: Recordings, by_key: Mapping[str, str], left_out: Mapping[str, dict[str, str]]
) -> Iterator[tuple[str, Measurements]]:
    """The segments of the recordings that a table of PTB-XL+ has, by path; what does not join is listed."""
    found: dict[str, Measurements] = {}
    for number, measured in read_features(raw, table):
        key = f"{_PTB_XL}{number:05d}"
        if key in by_key:
            found[key] = measured
        else:
            left_out["without_recording"][str(number)] = f"{key} is not prepared"
    for path in sorted(recordings.paths):
        if (key := recording_key(path)) in found:
            yield path, found[key]
        else:
            left_out["without_features"][path] = f"no row of {FEATURES[table]}" if key else "no recording of PTB-XL"


def _measure_all(
    records: Path, paths: Sequence[str], workers: int, not_measured: dict[str, str]
) -> Iterator[tuple[str, Measurements]]:
    for path, found in zip(paths, in_order(partial(_measured, records), paths, workers), strict=True):
        if isinstance(found, str):
            not_measured[path] = found
        else:
            yield path, found


def _measured(records: Path, path: str) -> Measurements | str:
    """What is measured of a segment, without its averaged beat; or why nothing is."""
    try:
        recording = read_ecg(records / path, dtype=np.float64)
        found = measure(recording.signal, recording.sampling_rate, recording.leads)
    except UserError as error:
        return str(error)
    return replace(found, beat=None) if found.beats else found.values["rate"].reason


def _people(path: Path) -> dict[int, Person]:
    """ecg_id -> sex and age, of ptbxl_database.csv. Raises UserError."""
    found = {}
    for _, row in csv_rows(path, ("ecg_id", "sex", "age"), path, "PTB-XL's ptbxl_database.csv", "correct --ptbxl-csv"):
        sex = {"0": "male", "0.0": "male", "1": "female", "1.0": "female"}.get(str(row["sex"]).strip())
        age = str(row["age"]).strip()
        if str(row["ecg_id"]).strip().isdecimal():
            years = float(age) if age.replace(".", "", 1).isdecimal() else None
            found[int(row["ecg_id"])] = Person(sex, years)
    return found


def _ecg_id(path: str) -> int:
    """PTB-XL's number of a recording; 0 for others."""
    key = recording_key(path)
    return int(key.removeprefix(_PTB_XL)) if key.startswith(_PTB_XL) else 0


def _verdicts(cases: Sequence[Case], finding: str, counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    told = Counter(case.told[finding][0] for case in cases if finding in case.told)
    return {"yes": told[True], "no": told[False], "asked": counts["asked", finding]}


def _check(wanted: Wanted, raw: Path | None) -> None:
    for name in wanted.kinds or ("",):
        if name not in QUESTIONS or wanted.kinds.count(name) > 1:
            expected = f"some of {', '.join(QUESTIONS)}, each once"
            raise UserError("--kinds", repr(",".join(wanted.kinds)), expected, nearest(name, QUESTIONS) or "correct it")
    for flag, number, low, high in (("--questions", wanted.most, 1, MOST), ("--seed", wanted.seed, 0, 2**32 - 1)):
        if number is not None and not low <= number <= high:
            raise UserError(flag, str(number), f"{low} to {high}", "correct it")
    if raw is None and wanted.features != MEASURED:
        raise UserError("--features", f"{wanted.features}, and no --raw", "PTB-XL+'s folder", "give --raw, too")
    if wanted.statements not in STATEMENTS:
        raise UserError("--statements", repr(wanted.statements), ", ".join(STATEMENTS), "correct it")
