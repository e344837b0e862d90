"""Published conversations about recordings -> a table of those whose recordings are prepared.

A recording is known by the number that its dataset gave it, wherever in a path that stands: of MIMIC's study, of a
PTB-XL record, of a CODE-15 exam, of a record of CPSC or Chapman-Shaoxing-Ningbo. Any other is found by its path, where
the prepared one has the same. A row is a conversation about one segment. Leaves F.parquet, with paths relative to the
folder of the prepared recordings, and F_report.json beside it, which lists what was left out, and why.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from elm_jax.data.prepare.output import compact, write_table
from elm_jax.data.prepare.runner import segment_counts
from elm_jax.data.prepare.splits import SPLITS, leaks, split_of
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
    "conversations": "any .json, .jsonl, .parquet or .csv files of conversations, or a folder of them",
}
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
_PATHS = ("ecg_path", "ecg", "image_path", "image")  # fields that name a recording, the first that there is
_NAMES = ("name", "source", "question_type")  # fields that name the kind of a conversation
_TEXTS = ("conversations", "messages", "text")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SEGMENTS = re.compile(r"preprocessed_(\d+)")
_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
_MIMIC = re.compile(r"(?:^|[/_])p(\d+)[/_]s(\d+)[/_]\d+")
_NUMBERS = (
    ("PTB-XL", re.compile(r"(?:^|[/_])(\d{5})_[hl]r")),
    ("JS", re.compile(r"(?:^|[/_])JS(\d{5})(?!\d)")),
    ("CPSC", re.compile(r"(?:^|[/_])([AQ]\d{4})(?!\d)")),
    ("CODE-15", re.compile(r"code15[^/]*/(?:[^/]*/)*(\d+)[^/]*$")),
)  # fmt: skip


class Item(NamedTuple):
    """A published conversation. where: its place, for errors. split: as its file or the item says; "" if neither."""

    where: str
    ecg: str
    text: Any
    name: str
    split: str


class Recordings:
    """The prepared recordings of a folder.

    Args:
        folder: what `prepare` left: DATASET/preprocessed_LENGTH and tables.
        length: samples of the segments.

    Raises:
        UserError: there is none of this length.
    """

    def __init__(self, folder: Path, length: int) -> None:
        self.segments: dict[str, list[str]] = {}  # key -> paths of segments, below the folder
        for place in sorted(folder.glob(f"*/preprocessed_{length}")):
            where = place.relative_to(folder).as_posix()
            for stem, count in sorted(segment_counts(place).items()):
                paths = [f"{where}/{stem}_{number}.npy" for number in range(count)]
                for key in {recording_key(f"{place.parent.name}/{stem}"), stem} - {""}:
                    self.segments.setdefault(key, paths)
        if not self.segments:
            others = sorted({match[1] for p in folder.glob("*/preprocessed_*") if (match := _SEGMENTS.match(p.name))})
            found = f"no segments of {length} samples" + (f", but of {', '.join(others)}" if others else "")
            raise UserError(str(folder), found, "prepared recordings", "prepare them first, or give their --records")
        self.people = _people(folder)

    def find(self, ecg: str, name: str) -> list[str] | None:
        """The segments of a recording by its path; `name` says the dataset where the path does not."""
        stem = _SUFFIX.sub("", ecg).strip("/").replace("/", "_")
        keys = (recording_key(ecg), recording_key(f"{name}/{ecg}"), stem)
        return next((self.segments[key] for key in keys if key in self.segments), None)


def recording_key(path: str) -> str:
    """What tells a recording from all others of the known datasets, by its path or stem; "" where it is of none."""
    if study := _MIMIC.search(path):
        return f"MIMIC {study[2]}"
    return next((f"{dataset} {match[1]}" for dataset, number in _NUMBERS if (match := number.search(path))), "")


def prepare_conversations(
    raw: Path, records: Path, out: Path, length: int = 2500, official: bool = False,
    seed: int = 0, val: float = 0.1, test: float = 0.1, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Join the conversations in `raw` to the segments in `records`; returns (and writes) the counts.

    Args:
        raw: a file, or a folder of files.
        official: splits as the files' names or the items say; else whole patients by `seed`, `val`, `test` (shares).

    Raises:
        UserError: there are no conversations, or none about a prepared recording.
    """
    recordings = Recordings(records, length)
    left_out: dict[str, dict[str, str]] = {"without_recording": {}, "malformed": {}}
    rows: list[dict[str, Any]] = []
    items, counts = 0, Counter[str]()
    for item in tqdm(_items(raw), desc="conversations", unit="", disable=not progress):
        items += 1
        try:
            turns = to_turns(decode_text(item.text))
        except UserError as error:
            left_out["malformed"][item.where] = str(error)
            continue
        if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
            left_out["malformed"][item.where] = "no answer"
            continue
        paths = recordings.find(item.ecg, item.name)
        if paths is None:
            known = recording_key(item.ecg) or recording_key(f"{item.name}/{item.ecg}")
            reason = f"{known} is not prepared" if known else f"no dataset is known by {item.ecg!r}"
            left_out["without_recording"][item.where] = reason
            continue
        counts["conversations"] += 1
        patient, split = recordings.people.get(paths[0], ("", ""))
        counts["of unknown patients"] += not patient
        patient = patient or Path(paths[0]).stem.rpartition("_")[0]
        split = (item.split or "train") if official else split_of(patient, seed, val, test)
        text = item.text if isinstance(item.text, str) else compact(item.text)
        common = {"text": text, "name": item.name, "patient_id": patient, "split": split}
        rows += [{"ecg_path": path, **common} for path in paths]
    if not rows:
        reasons = [f"{where}: {why}" for listed in left_out.values() for where, why in listed.items()]
        found = f"no conversation about a prepared recording among {items}" + (f" ({reasons[0]})" if reasons else "")
        raise UserError(str(raw), found, f"recordings that are in {records}", "prepare the datasets that it is about")
    report = {
        "items": items,
        **counts,
        "split": "official" if official else "patient",
        "seed": seed,
        "rows": {split: sum(row["split"] == split for row in rows) for split in SPLITS},
        "patients": len({row["patient_id"] for row in rows}),
        "patients_in_several_splits": leaks((row["split"], (row["patient_id"],)) for row in rows),
        **left_out,
    }
    write_table(out, rows)
    write_json(out.with_name(f"{out.stem}_report.json"), report)
    return report


def _people(folder: Path) -> dict[str, tuple[str, str]]:
    """Path of a segment -> (patient, split), of all tables that `prepare` left in a folder; MIMIC's paths name them."""
    import pyarrow.parquet as pq

    found: dict[str, tuple[str, str]] = {}
    columns = ["ecg_path", "patient_id", "split"]
    for file in sorted(folder.glob("*.parquet")):
        with refused(file, "an unreadable table", "a table that prepare made", "prepare it again", Exception):
            if set(columns) <= set(pq.read_schema(file).names):
                for row in pq.read_table(file, columns=columns).to_pylist():
                    if row["patient_id"] is not None and not str(row["ecg_path"]).startswith("["):
                        found.setdefault(str(row["ecg_path"]), (str(row["patient_id"]), str(row["split"])))
    for path in folder.glob("mimic_iv/preprocessed_*/*.npy"):
        if subject := _MIMIC.search(path.name):
            found.setdefault(path.relative_to(folder).as_posix(), (subject[1], ""))
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
    objects, number = row.get("objects"), row.get("ecg_id")
    ecg: Any = next((row[field] for field in _PATHS if row.get(field)), None)
    if isinstance(objects, Mapping) and objects.get("ecg"):
        ecg = objects["ecg"]
    if ecg is None and number is not None:  # ECG-QA's, of PTB-XL
        digits = re.search(r"\d+", str(number))
        ecg = f"{int(digits[0]):05d}_hr" if digits else ""
    ecg = ecg[0] if isinstance(ecg, Sequence) and not isinstance(ecg, str) and ecg else ecg
    text: Any = next((row[field] for field in _TEXTS if row.get(field)), None)
    if text is None and "question" in row and "answer" in row:
        text = [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}]
    text = [_turn(turn) for turn in text if not _is_system(turn)] if isinstance(text, list) else text
    name = next((str(row[field]) for field in _NAMES if row.get(field)), group)
    return Item(where, str(ecg or ""), text, name, _SPLITS.get(str(row.get("split", "")).lower(), split))


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
