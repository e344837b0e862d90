"""Published conversations about recordings -> a table of those whose recordings are prepared.

A segment that `prepare` wrote is found by its path, alone; a recording by its path where the prepared one has the same,
else by the number that its dataset gave it, wherever in a path that stands: of MIMIC's study, of a PTB-XL record, of a
CODE-15 exam, of a record of CPSC, Georgia or Chapman-Shaoxing-Ningbo. A row is a conversation about one segment of each
recording it names. Leaves F.parquet, with paths relative to the folder of the prepared recordings, and F_report.json
beside it, which lists what was left out, and why.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from elm_jax.data.prepare import reasoning
from elm_jax.data.prepare.output import compact, segment_counts, write_table
from elm_jax.data.prepare.runner import TABLES
from elm_jax.data.prepare.splits import SPLITS, leaks, one_person, split_of
from elm_jax.data.sources import patient_ids
from elm_jax.errors import UserError, refused
from elm_jax.folders import read_regular, write_json
from elm_jax.json_text import parse_json
from elm_jax.text.turns import decode_text, to_turns

# What is published -> its files. One way reads all: fields and names differ less than these do.
CONVERSATIONS = {
    "pretrain_mimic": "ECG-Chat's pretrain_mimic.json (MIMIC-IV-ECG's reports)",
    "ecg_instruct_45k": "ECG-Chat's ecg_instruct_45k.json (MIMIC-IV-ECG)",
    "ecg_instruct_pulse": "PULSE's ECGInstruct.json (MIMIC-IV-ECG, PTB-XL, CODE-15)",
    "ecg_bench_pulse": "PULSE's ECGBench, a folder of files for each of its tests",
    "ecg_grounding": "GEM's ECG_Grounding_30k.json and the like (MIMIC-IV-ECG, PTB-XL, CODE-15)",
    "ecg_protocol_cot": "ECG-Protocol-Guided-Grounding-CoT, as ECG-R1 learns from it",
    "ecg_qa_cot": "OpenTSLM's ECG-QA-CoT, .csv files (PTB-XL)",
    reasoning.NAME: "ECG-Reasoning-Benchmark's ptbxl.jsonl, mimic_iv_ecg.jsonl (PTB-XL, MIMIC-IV-ECG)",
    "conversations": "any .json, .jsonl, .parquet or .csv files of conversations, or a folder of them",
}
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
SplitRule = Literal["recordings", "patient", "official"]
_PATHS = ("ecg_path", "ecg", "image_path", "image")  # fields that name a recording, the first that there is
_NAMES = ("name", "source", "question_type")  # fields that name the kind of a conversation
_TEXTS = ("conversations", "messages", "text")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SEGMENTS = re.compile(r"preprocessed_(\d+)")
_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
_OWNERS = {"MIMIC": "mimic_iv", "JS": "csn"}  # kinds of numbers that are not called as their dataset is
_NUMBER = re.compile(r"\d{1,9}(?:\.\d+)?")
_MIMIC = re.compile(r"(?:^|[/_])p(\d+)[/_]s(\d+)[/_]\d+")
_NUMBERS = (
    ("PTB-XL", re.compile(r"(?:^|[/_])(\d{5})_[hl]r")),
    ("JS", re.compile(r"(?:^|[/_])JS(\d{5})(?!\d)")),
    ("Georgia", re.compile(r"(?:^|[/_])(E\d{5})(?!\d)")),
    ("CPSC", re.compile(r"(?:^|[/_])([AQ]\d{4})(?!\d)")),
    ("CODE-15", re.compile(r"code15[^/]*/(?:[^/]*/)*(\d+)[^/]*$")),
)  # fmt: skip


class Item(NamedTuple):
    """A published conversation.

    where: its place, for errors. ecgs: what names its recordings. first: only the first of them needs to be known.
    split: as its file or the item says; "" if neither. fields: what of `table_files.KINDS` it says. problem: what is
    wrong with it, where no conversation can be made of it.
    """

    where: str
    ecgs: tuple[str, ...]
    text: Any
    name: str
    split: str
    first: bool = False
    fields: Mapping[str, str] = {}
    problem: str = ""


class Recordings:
    """The prepared recordings of a folder.

    Args:
        folder: what `prepare` left: DATASET/preprocessed_LENGTH and tables.
        length: samples of the segments.
        out: a table that is about to be written, and is none of these.

    Raises:
        UserError: there is none of this length.
    """

    def __init__(self, folder: Path, length: int, out: Path | None = None) -> None:
        self.segments: dict[str, dict[str, list[str]]] = {}  # key -> dataset -> paths of segments, below the folder
        self.paths: set[str] = set()  # of all segments
        # Stem without the ending of its file -> of each such file the dataset, and the segments.
        short: dict[str, list[tuple[str, list[str]]]] = {}
        places = sorted(folder.glob(f"*/preprocessed_{length}"))
        for place in places:
            where, dataset = place.relative_to(folder).as_posix(), place.parent.name
            for stem, count in sorted(segment_counts(place).items()):
                paths = [f"{where}/{stem}_{number}.npy" for number in range(count)]
                self.paths.update(paths)
                for key in {recording_key(f"{dataset}/{stem}"), stem} - {""}:
                    self.segments.setdefault(key, {}).setdefault(dataset, paths)
                short.setdefault(_SUFFIX.sub("", stem), []).append((dataset, paths))
        if not self.segments:
            others = sorted({match[1] for p in folder.glob("*/preprocessed_*") if (match := _SEGMENTS.match(p.name))})
            found = f"no segments of {length} samples" + (f", but of {', '.join(others)}" if others else "")
            raise UserError(str(folder), found, "prepared recordings", "prepare them first, or give their --records")
        alone = {key: dict(found) for key, found in short.items() if len({name for name, _ in found}) == len(found)}
        self.segments = alone | self.segments
        self.people = _people(folder, [place.parent.name for place in places], out)
        known = ((path.partition("/")[0], patient, split) for path, (patient, split) in self.people.items())
        self.splits = {(name, one): split for name, who, split in known if split in SPLITS for one in patient_ids(who)}
        own = tuple(f"{place.relative_to(folder).as_posix()}/" for place in places)
        self.lost = {path for path in self.people if path.startswith(own)} - self.paths  # which only tables have
        self.persons = one_person(patient_ids(patient) for patient, _ in self.people.values())

    def find(self, ecg: str, name: str) -> list[list[str]]:
        """The segments of a recording by its path; of each that it may be, where datasets share what names it.

        `name` says the dataset where the path does not.
        """
        if (segment := "/".join(ecg.split("/")[-3:])) in self.paths:  # DATASET/preprocessed_LENGTH/NAME_NUMBER.npy
            return [[segment]]
        whole, numbers = ecg.strip("/").replace("/", "_"), (recording_key(ecg), recording_key(f"{name}/{ecg}"))
        hits = [self.segments[key] for key in (whole, _SUFFIX.sub("", whole), *numbers) if key in self.segments]
        if len({dataset for hit in hits for dataset in hit}) > 1:
            kind = next(filter(None, numbers), "").rpartition(" ")[0]
            # What a path or a name says goes before the kind of the number, which other datasets may have, too.
            told = [(word, hit) for word in (*ecg.split("/"), name) for hit in hits]
            for word, hit in [*told, (_OWNERS.get(kind, kind), hits[0])]:
                if own := [paths for dataset, paths in hit.items() if _same(dataset, word)]:
                    return own
        return list(hits[0].values()) if hits else []

    def patients(self, path: str) -> tuple[str, ...]:
        """Whose a segment is, as a table or MIMIC's name of it says; () where neither does."""
        subject = _MIMIC.search(Path(path).name)
        return patient_ids(self.people.get(path, ("", ""))[0]) or ((subject[1],) if subject else ())

    def split(self, path: str, patients: tuple[str, ...], rule: SplitRule, seed: int, val: float, test: float) -> str:
        """The split of a segment: of its table or of others of its patient, where the rule asks for that, else by a
        hash of the patient."""
        name = path.partition("/")[0]
        own = [self.people.get(path, ("", ""))[1], *(self.splits.get((name, one), "") for one in patients)]
        prepared = next((split for split in own if split in SPLITS), "") if rule == "recordings" else ""
        return prepared or split_of(self.persons.get(patients[0], patients[0]), seed, val, test)


def recording_key(path: str) -> str:
    """What tells a recording from all others of the known datasets, by its path or stem; "" where it is of none."""
    if study := _MIMIC.search(path):
        return f"MIMIC {study[2]}"
    return next((f"{dataset} {match[1]}" for dataset, number in _NUMBERS if (match := number.search(path))), "")


def _same(dataset: str, word: str) -> bool:
    """Whether a word is a dataset's name: `ptb-xl` is that of ptb_xl."""
    return re.sub(r"[\W_]", "", dataset.lower()) == re.sub(r"[\W_]", "", word.lower())


def prepare_conversations(
    raw: Path, records: Path, out: Path, length: int = 2500, split: SplitRule = "recordings",
    seed: int = 0, val: float = 0.1, test: float = 0.1, progress: bool = True,
    made_by: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Join the conversations in `raw` to the segments in `records`; returns (and writes) the counts.

    Args:
        raw: a file, or a folder of files.
        split: "recordings": where the prepared tables have the recordings, else by patient; "patient": whole patients
            by `seed`, `val`, `test` (shares); "official": as the files' names or the items say, else train.
        made_by: what the report is to say of how it was made.

    Raises:
        UserError: there are no conversations, or none about a prepared recording.
    """
    recordings = Recordings(records, length, out)
    left_out: dict[str, dict[str, str]] = {"without_recording": {}, "ambiguous": {}, "malformed": {}}
    rows: list[dict[str, Any]] = []
    people: list[tuple[str, list[str]]] = []  # of each row
    items, counts = 0, Counter[str]({"conversations": 0, "of unknown patients": 0, "across_splits": 0})
    for item in tqdm(_items(raw), desc="conversations", unit="", disable=not progress):
        items += 1
        if item.problem:
            left_out["malformed"][item.where] = item.problem
            continue
        try:
            turns = to_turns(item.text)
        except UserError as error:
            left_out["malformed"][item.where] = str(error)
            continue
        if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
            left_out["malformed"][item.where] = "no answer"
            continue
        paths, kind, reason = _segments(item, recordings)
        if reason:
            left_out[kind][item.where] = reason
            continue
        known = [recordings.patients(found[0]) for found in paths]
        about = {found[0]: told or (nobody(found[0]),) for found, told in zip(paths, known, strict=True)}
        splits = {recordings.split(path, who, split, seed, val, test) for path, who in about.items()}
        if split == "official":
            splits = {item.split or "train"}
        if len(splits) > 1:
            counts["across_splits"] += 1
            continue
        counts["conversations"] += 1
        counts["of unknown patients"] += not all(known)
        plain = isinstance(item.text, str) and decode_text(item.text) == item.text
        common = {
            "text": item.text if plain else compact(item.text),
            "name": item.name,
            "patient_id": "+".join(sorted(set(chain(*about.values())))),
            "split": splits.pop(),
            **item.fields,
        }
        # Datasets number their patients each from 1 on.
        named = [f"{path.partition('/')[0]}/{one}" for path, who in about.items() for one in who]
        for segments in zip(*paths, strict=False):  # as many as the shortest has
            rows.append({"ecg_path": segments[0] if len(segments) == 1 else compact(segments), **common})
            people.append((common["split"], named))
    if not rows:
        reasons = [f"{where}: {why}" for listed in left_out.values() for where, why in listed.items()]
        found = f"no conversation about a prepared recording among {items}" + (f" ({reasons[0]})" if reasons else "")
        raise UserError(str(raw), found, f"recordings that are in {records}", "prepare the datasets that it is about")
    report = {
        **(made_by or {}),
        "items": items,
        **counts,
        "split": split,
        "seed": seed,
        "rows": {name: sum(row["split"] == name for row in rows) for name in SPLITS},
        "patients": len({one for _, named in people for one in named}),
        "patients_in_several_splits": leaks(people),
        **left_out,
    }
    columns = dict.fromkeys(chain.from_iterable(rows))
    write_table(out, [columns | row for row in rows])
    write_json(out.with_name(f"{out.stem}_report.json"), report)
    return report


def _segments(item: Item, recordings: Recordings) -> tuple[list[list[str]], str, str]:
    """The segments of each recording that an item is about; or none, the kind of the reason, and the reason."""
    found: list[list[str]] = []
    for ecg in item.ecgs or ("",):
        places = recordings.find(ecg, item.name)
        known = recording_key(ecg) or recording_key(f"{item.name}/{ecg}")
        if len(places) > 1:
            datasets = " and ".join(paths[0].partition("/")[0] for paths in places)
            return [], "ambiguous", f"{ecg!r} may be of {datasets}, and names none of them"
        if places:
            found += places
        elif known or not (item.first and found):
            why = f"{known} is not prepared" if known else f"no dataset is known by {ecg!r}"
            return [], "without_recording", why
    return found, "", ""


def nobody(path: str) -> str:
    """Whose a segment is of which that is not known: as `runner` has it, of somebody of whom there is no other."""
    return f"{path.partition('/')[0]}:{Path(path).stem.rpartition('_')[0]}"


def _people(folder: Path, datasets: Iterable[str], out: Path | None) -> dict[str, tuple[str, str]]:
    """Path of a segment -> (patient, split), of the tables that `prepare` made of the recordings of `datasets`."""
    import pyarrow.parquet as pq

    found: dict[str, tuple[str, str]] = {}
    columns = ["ecg_path", "patient_id", "split"]
    for file in (folder / f"{name}_{kind}.parquet" for name in datasets for kind in TABLES):
        if not file.is_file() or (out is not None and out.resolve() == file.resolve()):
            continue
        with refused(file, "an unreadable table", "a table that prepare made", "prepare it again", Exception):
            for batch in pq.ParquetFile(file).iter_batches(columns=columns):
                for row in batch.to_pylist():
                    found.setdefault(str(row["ecg_path"]), (str(row["patient_id"] or ""), str(row["split"])))
    return found


def _items(raw: Path) -> Iterator[Item]:
    found = [raw] if raw.is_file() else sorted(file for file in raw.rglob("*") if file.is_file())
    files = [file for file in found if file.suffix.lower() in SUFFIXES]
    if not files:
        told = "no file of them" if raw.exists() else "no such file"
        raise UserError(str(raw), told, f"files of {', '.join(SUFFIXES)}", "correct --raw")
    for file in files:
        place = file.relative_to(raw.parent if raw.is_file() else raw)
        split = next((_SPLITS[word] for part in reversed(place.parts) for word in _words(part) if word in _SPLITS), "")
        group = place.parent.name or ""  # PULSE's tests are folders
        for number, row in enumerate(_rows(file), 1):
            yield _item(f"{place.as_posix()}, item {number}", row, group, split)


def _words(part: str) -> list[str]:
    return re.split(r"[^a-z]+", part.lower())


def _rows(file: Path) -> Iterable[Any]:
    """What a file holds, an item each."""
    expected, fix = "a list of conversations", "download it again"
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        with refused(file, "an unreadable table", expected, fix, Exception):
            batches = pq.ParquetFile(file).iter_batches(1024)
            yield from (row for batch in batches for row in batch.to_pylist())
        return
    data = read_regular(file, expected, fix)
    with refused(file, "an unreadable file", "UTF-8 text", fix):
        text = data.decode("utf-8-sig")
    if file.suffix.lower() == ".csv":
        with refused(file, "an unreadable file", expected, fix, csv.Error):
            yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    with refused(file, "malformed JSON", expected, fix):
        lines = file.suffix.lower() == ".jsonl"
        content = [parse_json(line) for line in text.split("\n") if line.strip()] if lines else parse_json(text)
    if isinstance(content, dict) and all(isinstance(value, list) for value in content.values()):
        content = [{"split": name, **row} for name, rows in content.items() for row in rows if isinstance(row, dict)]
    if not isinstance(content, list):
        raise UserError(str(file), f"a JSON {type(content).__name__}", expected, fix)
    yield from content


def _item(where: str, row: Any, group: str, split: str) -> Item:
    """An item of any of the sets; what it lacks is empty, and found by its reader."""
    row = row if isinstance(row, Mapping) else {}
    if reasoning.is_sample(row):
        return _sample(where, row)
    objects = row.get("objects")
    several = isinstance(objects, Mapping) and objects.get("ecg")
    ecg: Any = several or next((row[field] for field in _PATHS if row.get(field)), None)
    if ecg is None and row.get("ecg_id") is not None:  # ECG-QA's, of PTB-XL
        ecg = [f"{int(float(number)):05d}_hr" for number in _NUMBER.findall(str(row["ecg_id"]))]
    ecg = decode_text(ecg) if str(ecg).lstrip().startswith("[") else ecg
    ecgs = tuple(str(one) for one in (ecg if isinstance(ecg, list | tuple) else [ecg]) if one)
    text: Any = next((row[field] for field in _TEXTS if row.get(field)), None)
    if text is None and "question" in row and "answer" in row:
        text = [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}]
    text = decode_text(text)
    text = [_turn(turn) for turn in text if not _is_system(turn)] if isinstance(text, list) else text
    name = next((str(row[field]) for field in _NAMES if row.get(field)), group)
    split = _SPLITS.get(str(row.get("split", "")).lower(), split)
    return Item(where, ecgs, text, name, split, first=bool(several))


def _sample(where: str, row: Mapping[str, Any]) -> Item:
    """A sample of ECG-Reasoning-Benchmark, all of which tests."""
    try:
        path, source, diagnosis = reasoning.recording_of(row)
        return Item(where, (path,), reasoning.turns_of(row), source, "test", fields={"attribute": diagnosis})
    except UserError as error:
        return Item(where, (), None, "", "test", problem=str(error))


def _is_system(turn: Any) -> bool:
    """A prompt of theirs, in whose place `data.system_prompt` stands."""
    return isinstance(turn, Mapping) and str(turn.get("role", turn.get("from"))).lower() == "system"


def _turn(turn: Any) -> Any:
    """PULSE's ECGBench has questions and answers in several parts."""
    if isinstance(turn, Mapping) and isinstance(turn.get("value"), list):
        answers = str(turn.get("from")).lower() not in ("human", "user")
        parts = [str(part).strip() for part in turn["value"]]
        return {**turn, "value": (", " if answers else " ").join(parts)}
    return dict(turn) if isinstance(turn, Mapping) else turn
