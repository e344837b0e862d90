"""What tables of records hold: questions, lengths, recordings, patients, labels, what is missing and what is repeated.

A table is gone through once, some rows at a time. Of each row four numbers of 8 bytes stay in memory, and of each
kind of thing that is counted as many as `_KINDS` are told apart.
"""

import copy
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax.data.represent import DEMO, FLATLINE, NOISE, SignalSpec
from elm_jax.data.sources import Record, records_of
from elm_jax.data.table_files import file_tables
from elm_jax.ecg.names import LEADS
from elm_jax.ecg.recording import read_ecg
from elm_jax.errors import UserError
from elm_jax.stopping import each
from elm_jax.text.turns import Turn, to_turns

OTHERS = "others"
_SHOWN = 20  # of what is counted, the most frequent; the rest is told as one
_KINDS = 50_000
_BATCH = 4096
_SHORT = 80  # characters of answers that are counted by what they say
_BINS = 30
_TEXTS = ("questions", "answers", "conversation")


def table_stats(
    paths: Sequence[Path], root: Path | None = None, tokenizers: Mapping[str, Any] | None = None,
    looked_at: int = 1000, progress: bool = True,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Of each table in `paths` (files, or folders of them) what it holds, by its path.

    root: what `ecg_path` is relative to; None: the folder of the table. tokenizers: by name, in whose tokens texts are
    measured: the words alone, without the form of a chat and without ECGs. looked_at: how many recordings of a table
    are opened for their leads, rate and duration, evenly spread; all are looked for.

    Raises:
        UserError: a table cannot be read, or there is none.
    """
    found: dict[str, dict[str, Any]] = {}
    backends = {name: _whole(tokenizer) for name, tokenizer in (tokenizers or {}).items()}
    for path in paths:
        if not path.exists():
            raise UserError(path, "no such file or folder", "a table, or a folder of tables", "correct the path")
        signals = _signals(root or (path if path.is_dir() else path.parent))
        for file in sorted(path.glob("*.parquet")) or [path]:  # of what `prepare` left, its tables
            for where, split, table in file_tables(file):
                bar = tqdm(records_of(where, table), where, len(table), unit="row", disable=not progress, mininterval=1)
                counted = _Table(signals, backends, looked_at and max(len(table) // looked_at, 1))
                counted.add(each(bar, "row"), _splits(table, split or "train"))
                found[where] = counted.told()
    if not found:
        raise UserError(paths[0] if paths else "stats", "no table", "a .parquet, .json or .jsonl file", "name one")
    return found


def _whole(tokenizer: Any) -> Any:
    """What splits all of a text into tokens, whatever a folder says of cutting texts off or filling them up."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _splits(table: Any, default: str) -> Iterator[str]:
    if "split" not in table.column_names:
        return repeat(default)
    return (str(split) for rows in table.select_columns(["split"]).iter(_BATCH) for split in rows["split"])


def _signals(root: Path) -> SignalSpec:
    """Where recordings are looked for; what would become of them does not matter here."""
    return SignalSpec(str(root), tuple(range(len(LEADS))), 0, 0, 0, None, 0)


def _is_file(path: str) -> bool:
    return path not in (NOISE, FLATLINE) and not path.startswith(DEMO)


class _Kinds:
    """How often each of a bounded number of things was met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, one: str) -> None:
        self.counts[one if one in self.counts or len(self.counts) < _KINDS else OTHERS] += 1

    def told(self) -> dict[str, int]:
        most = sorted(self.counts.items(), key=lambda item: (item[0] == OTHERS, -item[1], item[0]))
        rest = sum(count for _, count in most[_SHOWN:])
        return dict(most[:_SHOWN]) | ({OTHERS: rest} if rest else {})


class _Distinct:
    """How many different things were met, by 64 bits of a hash."""

    def __init__(self) -> None:
        self.seen = array("Q")

    def add(self, thing: Any) -> None:
        digest = hashlib.blake2b(repr(thing).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self.seen.append(int.from_bytes(digest, "little"))

    def count(self) -> int:
        return len(np.unique(np.frombuffer(self.seen, np.uint64))) if self.seen else 0


def _summary(counts: Mapping[int, int]) -> dict[str, Any]:
    """Of lengths, each with how often it was met; `bins`: (the least length, how often) of equal parts up to p99."""
    if not counts:
        return {}
    lengths, numbers = (np.array(column) for column in zip(*sorted(counts.items()), strict=True))
    total, ends = int(numbers.sum()), np.cumsum(numbers)
    parts = {f"p{part}": int(lengths[np.searchsorted(ends, total * part / 100)]) for part in (50, 95, 99)}
    width = parts["p99"] // _BINS + 1
    bins = np.bincount(np.minimum(lengths // width, _BINS), numbers)
    return {
        "n": total, "min": int(lengths[0]), "mean": round(float(lengths @ numbers) / total, 2), **parts,
        "max": int(lengths[-1]), "bins": [(place * width, int(count)) for place, count in enumerate(bins)],
    }  # fmt: skip


@dataclass
class _Table:
    """What the rows of a table hold, as they go by. step: one recording in so many is opened; 0: none."""

    signals: SignalSpec
    tokenizers: Mapping[str, Any]
    step: int
    counts: dict[str, _Kinds] = field(default_factory=lambda: {name: _Kinds() for name in _COUNTED})
    distinct: dict[str, _Distinct] = field(default_factory=lambda: {name: _Distinct() for name in _DISTINCT})
    turns: Counter[int] = field(default_factory=Counter)
    tokens: dict[tuple[str, str], Counter[int]] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)
    rows: int = 0
    silent: int = 0  # rows without a conversation

    def add(self, records: Iterable[Record], splits: Iterator[str]) -> None:
        there = lru_cache(1 << 16)(self._is_there)
        left = iter(records)
        while batch := list(islice(left, _BATCH)):
            said = []
            for record in batch:
                self._count(record, next(splits), there)
                said += self._said(record)
                self.rows += 1
            for name, tokenizer in self.tokenizers.items():
                self._measure(name, tokenizer, said)

    def _count(self, record: Record, split: str, there: Any) -> None:
        self.counts["splits"].add(split)
        self.counts["types"].add(record.name or record.fields.get("question_type", "") or "unnamed")
        self.counts["ecgs_a_row"].add(str(len(record.ecg_paths)))
        if record.label is not None:
            self.counts["labels"].add(str(record.label))
        self.distinct["rows"].add((record.ecg_paths, record.text))
        ecgs = [path for path in record.ecg_paths if path not in (NOISE, FLATLINE)]
        for patient in record.patient.split("+") if ecgs or not record.ecg_paths else ():
            self.distinct["patients"].add(patient)
        for path in ecgs:
            self.distinct["recordings"].add(path)
            if not there(path):
                self.distinct["missing"].add(path)
            elif self.step and self.rows % self.step == 0:
                self._look(path)

    def _is_there(self, path: str) -> bool:
        return not _is_file(path) or bool(self.signals.stamp(path))

    def _look(self, path: str) -> None:
        """What a recording is: its leads in the file, Hz, s; once, however many rows have it."""
        if not _is_file(path) or path in self.looked:
            return
        self.looked.add(path)
        try:
            recording = read_ecg(Path(self.signals.root, path))
        except UserError as error:
            self.counts["unreadable"].add(error.found)
            return
        stored = len(recording.leads) - len(recording.derived) + len(recording.dropped)
        self.counts["leads"].add(str(stored))
        self.counts["hertz"].add(f"{recording.sampling_rate:g}")
        self.counts["seconds"].add(f"{recording.signal.shape[1] / recording.sampling_rate:g}")

    def _said(self, record: Record) -> list[list[Turn]]:
        try:
            turns = [] if record.text is None or record.problem else to_turns(record.text)
        except UserError:
            turns = []
        if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
            self.silent += 1
            return []
        self.turns[len(turns)] += 1
        for turn in turns:
            if turn.role == "assistant" and len(turn.text) <= _SHORT:
                self.counts["answers"].add(turn.text.strip())
        return [turns]

    def _measure(self, name: str, tokenizer: Any, said: Sequence[Sequence[Turn]]) -> None:
        texts = [turn.text for turns in said for turn in turns]
        encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for turns in said:
            by_role: Counter[str] = Counter()
            for turn in turns:
                by_role[turn.role] += len(next(encoded))
            for what, length in zip(_TEXTS, (by_role["user"], by_role["assistant"], by_role.total()), strict=True):
                self.tokens.setdefault((name, what), Counter())[length] += 1

    def told(self) -> dict[str, Any]:
        counts = {name: kinds.told() for name, kinds in self.counts.items()}
        distinct = {name: one.count() for name, one in self.distinct.items()}
        return {
            "rows": self.rows, "repeated": self.rows - distinct.pop("rows"), "without_conversation": self.silent,
            **distinct, **counts, "turns": _summary(self.turns),
            "tokens": {name: {what: _summary(self.tokens.get((name, what), {})) for what in _TEXTS}
                       for name in self.tokenizers},
        }  # fmt: skip


_COUNTED = ("splits", "types", "ecgs_a_row", "labels", "answers", "leads", "hertz", "seconds", "unreadable")
_DISTINCT = ("rows", "patients", "recordings", "missing")
