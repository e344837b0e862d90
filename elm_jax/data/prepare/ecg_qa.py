"""ECG-QA: its question files + prepared segments of PTB-XL or MIMIC-IV-ECG -> one table of conversations.

A row is a question about one segment of every recording it names (two for a comparison). Leaves F.parquet,
with paths relative to the folder that holds ptb_xl/ or mimic_iv/, and F_report.json beside it.
"""

import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from elm_jax.data.prepare.output import compact, segment_counts, write_table
from elm_jax.data.prepare.ptb_xl import INDEX, read_index
from elm_jax.data.prepare.splits import SPLITS, leaks, split_of
from elm_jax.data.table_files import KINDS
from elm_jax.errors import UserError, nearest, refused
from elm_jax.folders import json_if_whole, read_regular, write_json
from elm_jax.json_text import parse_json

# As `prepare ptb_xl` leaves them: all recordings, or, of before there was that table, those with a report; the counts.
PTB_XL_TABLES, PTB_XL_REPORT = ("ptb_xl_records.parquet", "ptb_xl_reports.parquet"), "ptb_xl_report.json"
HOLDS = "ECG-QA's folder ptbxl or mimic-iv-ecg, or one that holds it"
FORMS = ("paraphrased", "template")
OFFICIAL = {"train": "train", "valid": "val", "test": "test"}
SplitRule = Literal["patient", "official", "strat_fold"]
# By the set's folder: the stem of a recording, with the number that questions call it by and the patient's, if any.
_STEMS = {
    "ptbxl": re.compile(r"records(?:100|500)_\d{5}_(?P<ecg>\d{5})_[hl]r"),
    "mimic-iv-ecg": re.compile(r"files_p\d+_p(?P<patient>\d+)_s(?P<ecg>\d+)_\d+"),
}
_NEEDED = {"question_type": str, "question": str, "answer": list, "ecg_id": list}


@dataclass(frozen=True)
class Settings:
    """How the questions are chosen and split; val and test are parts of the patients, for split "patient"."""

    split: SplitRule = "patient"
    forms: tuple[str, ...] = ("paraphrased",)
    single_only: bool = False
    seed: int = 0
    val: float = 0.1
    test: float = 0.1


def prepare_ecg_qa(
    raw: Path,
    records: Path,
    out: Path,
    ptbxl_csv: Path | None = None,
    settings: Settings | None = None,
    progress: bool = True,
    made_by: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Join the questions in `raw` to the segments in `records`; returns (and writes) the counts.

    `ptbxl_csv` gives the patients; without it the table of recordings that `prepare ptb_xl` leaves does. A
    comparison of patients in different splits is left out, so that no patient is in two. `made_by` is what the
    report is to say of how it was made. Raises UserError for folders without questions or segments, malformed
    questions, and recordings of unknown patients.
    """
    chosen = settings or Settings()
    source, stems = _stems(records)
    patients, folds = _patients(records, ptbxl_csv, stems if source == "mimic-iv-ecg" else None)
    if chosen.split == "strat_fold" and not folds:
        if source == "mimic-iv-ecg":
            raise UserError("--split", "strat_fold", "patient or official for MIMIC-IV-ECG", "choose one of them")
        found = "strat_fold, and PTB-XL that was prepared with other splits than its own"
        raise UserError("--split", found, "PTB-XL's folds", f"give --ptbxl-csv .../{INDEX}")
    where = f"{records.parent.name}/{records.name}"
    counts: Counter[str] = Counter()
    used: set[int] = set()
    rows: list[dict[str, Any]] = []
    for form, official, question in _questions(_folder(raw, source, chosen.forms), chosen.forms, progress):
        counts["questions"] += 1
        ids = [int(ecg) for ecg in question["ecg_id"]]
        if chosen.single_only and len(ids) > 1:
            counts["comparisons_not_wanted"] += 1
            continue
        if any(ecg not in stems for ecg in ids):
            counts["without_recording"] += 1
            continue
        who = [_known(patients, ecg, ptbxl_csv) for ecg in ids]
        split = _split(chosen, official, who, [folds.get(ecg, "") for ecg in ids])
        if split is None:
            counts["across_splits"] += 1
            continue
        counts["single" if len(ids) == 1 else "comparison"] += 1
        used.update(ids)
        for number in range(min(stems[ecg][1] for ecg in ids)):
            paths = [f"{where}/{stems[ecg][0]}_{number}.npy" for ecg in ids]
            rows.append(_row(question, form, paths, who, split))
    if not rows:
        raise UserError(
            str(raw),
            f"none of {counts['questions']} questions about a recording in {records}",
            "questions about prepared recordings",
            "prepare more of PTB-XL, or choose other forms",
        )
    report = {**(made_by or {}), **_report(chosen, counts, used, rows)}
    write_table(out, rows)
    write_json(out.with_name(f"{out.stem}_report.json"), report)
    return report


def add_arguments(parser: ArgumentParser) -> None:
    """What `prepare_by` is told by."""
    parser.add_argument("--raw", type=Path, required=True, help=HOLDS)
    parser.add_argument("--out", type=Path, required=True, help="the table (.parquet), or a folder for it")
    parser.add_argument("--records", type=Path, help="prepared segments; default: in the folder of --out")
    parser.add_argument("--ptbxl-csv", type=Path, help="ptbxl_database.csv; default: what prepare ptb_xl left")
    parser.add_argument(
        "--split",
        choices=["patient", "official", "strat_fold"],
        default="patient",
        help="whole patients by --seed, --val and --test; ECG-QA's own lists; PTB-XL's folds 9 and 10",
    )
    parser.add_argument("--forms", default="paraphrased", help=f"of {','.join(FORMS)} (the same questions)")
    parser.add_argument("--single-only", action="store_true", help="leave out comparisons of two recordings")


def prepare_by(args: Namespace, table: Path) -> dict[str, Any]:
    """`prepare_ecg_qa` as the arguments say, into `table`. Raises UserError."""
    forms = tuple(form for form in args.forms.split(",") if form)
    for form in forms or ("",):
        if form not in FORMS:
            raise UserError("--forms", repr(form), ", ".join(FORMS), nearest(form, FORMS) or "correct it")
    records = args.records or table.parent / "ptb_xl" / "preprocessed_2500"
    settings = Settings(args.split, forms, args.single_only, args.seed, args.val, args.test)
    return prepare_ecg_qa(args.raw, records, table, args.ptbxl_csv, settings, True, args.made_by)


def _row(question: dict[str, Any], form: str, paths: list[str], who: list[str], split: str) -> dict[str, Any]:
    return {
        "ecg_path": paths[0] if len(paths) == 1 else compact(paths),
        "text": compact([question["question_type"], question["question"], question["answer"]]),
        "name": question["question_type"],
        "patient_id": "+".join(sorted(set(who))),
        "split": split,
        "form": form,
        "sample_id": question.get("sample_id"),
        **{kind: _as_text(question.get(kind)) for kind in KINDS},
    }


def _as_text(value: Any) -> str | None:
    """What a question says of its kind: one text, whether it is a name, a number or a list of names."""
    return ", ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def _report(
    chosen: Settings, counts: Counter[str], used: set[int], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    people = [(row["split"], row["patient_id"].split("+")) for row in rows]
    return {
        "split": chosen.split,
        "forms": list(chosen.forms),
        "seed": chosen.seed,
        **{key: counts[key] for key in ("questions", "single", "comparison", "comparisons_not_wanted")},
        **{key: counts[key] for key in ("without_recording", "across_splits")},
        "recordings": len(used),
        "patients": len({patient for _, who in people for patient in who}),
        "rows": {split: sum(row["split"] == split for row in rows) for split in SPLITS},
        "patients_in_several_splits": leaks(people),
    }


def _split(chosen: Settings, official: str, who: Sequence[str], folds: Sequence[str]) -> str | None:
    """The split of a question; None if its recordings are in different ones."""
    if chosen.split == "official":
        return OFFICIAL[official]
    by_patient: Callable[[str], str] = lambda p: split_of(p, chosen.seed, chosen.val, chosen.test)  # noqa: E731
    splits = set(folds) if chosen.split == "strat_fold" else set(map(by_patient, who))
    return splits.pop() if len(splits) == 1 else None


def _stems(records: Path) -> tuple[str, dict[int, tuple[str, int]]]:
    """(the set's folder, number of a recording -> (stem, number of segments))."""
    counts = segment_counts(records)
    for source, pattern in _STEMS.items():
        found = {int(match["ecg"]): (stem, n) for stem, n in counts.items() if (match := pattern.fullmatch(stem))}
        if found:
            return source, found
    raise UserError(
        str(records),
        "no segments of PTB-XL or MIMIC-IV-ECG",
        "records500_00000_00001_hr_0.npy and the like",
        "run prepare ptb_xl first and give its folder as --records",
    )


def _patients(
    records: Path, ptbxl_csv: Path | None, named: dict[int, tuple[str, int]] | None
) -> tuple[dict[int, str], dict[int, str]]:
    """(ecg_id -> patient, ecg_id -> split by strat_fold); of recordings whose stems are `named` by patient no folds."""
    if named is not None:
        found = {ecg: _STEMS["mimic-iv-ecg"].fullmatch(stem) for ecg, (stem, _) in named.items()}
        return {ecg: match["patient"] for ecg, match in found.items() if match}, {}
    if ptbxl_csv is not None:
        entries = read_index(ptbxl_csv)
        return {e.ecg_id: e.patient for e in entries}, {e.ecg_id: e.split for e in entries}
    tables = [records.parent.parent / name for name in PTB_XL_TABLES]
    table = next((table for table in tables if table.is_file()), None)
    if table is None:
        raise UserError(str(tables[0]), "no file", "who the patients are", f"give --ptbxl-csv .../{INDEX}")
    import pyarrow.parquet as pq

    with refused(table, "an unreadable table", "the table that prepare makes of PTB-XL", "prepare it again", Exception):
        columns = pq.read_table(table, columns=["ecg_path", "patient_id", "split"]).to_pylist()
        ids = [int(Path(row["ecg_path"]).name.split("_")[2]) for row in columns]
    people = {ecg: row["patient_id"] for ecg, row in zip(ids, columns, strict=True)}
    rule = json_if_whole(table.with_name(PTB_XL_REPORT)).get("split", "official")  # there was no other once
    own = rule == "official" and all(row["split"] in SPLITS for row in columns)
    return people, {ecg: row["split"] for ecg, row in zip(ids, columns, strict=True)} if own else {}


def _known(patients: dict[int, str], ecg: int, ptbxl_csv: Path | None) -> str:
    if ecg not in patients:
        raise UserError(
            str(ptbxl_csv or PTB_XL_TABLES[0]),
            f"no patient of recording {ecg}",
            "every prepared recording",
            f"give the {INDEX} that lists it as --ptbxl-csv",
        )
    return patients[ecg]


def _folder(raw: Path, source: str, forms: Sequence[str]) -> Path:
    """The folder that holds paraphrased/ and template/: `raw`, or ECG-QA's own of the source in it."""
    for folder in (raw / source, raw / "ecgqa" / source, raw):
        if all((folder / form).is_dir() for form in forms):
            return folder
    raise UserError(
        str(raw), f"no folder {' or '.join(forms)}", f"ECG-QA's folder {source}", "correct --raw (or --forms)"
    )


def _questions(
    folder: Path, forms: Sequence[str], progress: bool
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(form, official split, question) in the order of the files."""
    files = [
        (form, split, file)
        for form in forms
        for split in OFFICIAL
        for file in sorted((folder / form / split).glob("*.json"))
    ]
    if not files:
        raise UserError(str(folder), "no .json file", "train/*.json and the like", "correct --raw")
    for form, split, file in tqdm(files, desc="ECG-QA", unit="file", disable=not progress):
        data = read_regular(file, "a list of questions", "download it again")
        with refused(file, "an unreadable file", "a list of questions", "download it again"):
            items = parse_json(data)
        if not isinstance(items, list):
            raise UserError(
                str(file), f"a JSON {type(items).__name__}", "a list of questions", "download it again"
            )
        for number, item in enumerate(items, 1):
            yield form, split, _checked(f"{file}, question {number}", item)


def _checked(where: str, item: Any) -> dict[str, Any]:
    for key, kind in _NEEDED.items():
        if not isinstance(item, dict) or not isinstance(item.get(key), kind):
            raise UserError(where, f"no {kind.__name__} {key}", "a question of ECG-QA", "correct the file")
    if not item["ecg_id"] or not all(isinstance(ecg, int) for ecg in item["ecg_id"]):
        raise UserError(where, f"ecg_id {item['ecg_id']}", "numbers of recordings", "correct the file")
    return item
