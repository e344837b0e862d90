"""Synthetic sets: what kind of signal it is (an ECG, noise, a flat line), how many R peaks it has, how fast it is.

A recording is a segment that `prepare` left, or one that is generated. A question says what its answer is, and the
answer is what the recording shows: its beats are those of all leads together, or those that it was generated with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax.data.prepare import comprehension
from elm_jax.data.prepare.conversations import Recordings, nobody
from elm_jax.data.prepare.output import NpyFiles, compact, write_rows
from elm_jax.data.prepare.splits import SPLITS, split_of
from elm_jax.data.prepare.work import in_order
from elm_jax.ecg.beats.detect import CONTRAST, RATE, find_beats
from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.ecg.resampling import resample
from elm_jax.ecg.synthetic import draw_rhythm, synthesize
from elm_jax.errors import UserError, nearest, refused
from elm_jax.folders import read_regular, write_json
from elm_jax.json_text import parse_json
from elm_jax.stopping import each

SIGNAL_TYPE, SIGNALS = "signal_type", ("ecg", "noise", "flatline")
_FROM_FIRST = "What is the mean heart rate from the first to the last R peak of this recording, in beats per minute"
QUESTIONS = {
    SIGNAL_TYPE: "What kind of signal is this? Answer with its letter.",
    "r_peak_count": "How many R peaks does this recording have?",
    "heart_rate_bpm_int": f"{_FROM_FIRST}, to the nearest whole number?",
    "heart_rate_bpm_float": f"{_FROM_FIRST}, to two decimal places?",
}
GENERATED_RATE = 250.0  # Hz
MOST = 10_000_000  # recordings
SHORTEST = 5.0  # s of a generated recording: the slowest and least regular have two beats in it
_EDGE = 0.03  # s from the ends of a window, where it cannot be said whether a beat lies in it
_ONE_BEAT = 4.0  # s: a longer window that has one beat shows a disturbance, and no heart


@dataclass(frozen=True)
class Wanted:
    """kinds: of QUESTIONS; signals: of SIGNALS, of the first kind; recordings: how many at most, None: all there are.

    per_answer: so many questions of each number that is an answer, and none of those that have fewer; None: all.
    wording: of a kind the questions, taken in turn. published: as `comprehension` has it.
    """

    kinds: tuple[str, ...] = tuple(QUESTIONS)
    signals: tuple[str, ...] = SIGNALS
    recordings: int | None = None
    per_answer: int | None = None
    wording: Mapping[str, Sequence[str]] | None = None
    published: bool = False
    seed: int = 0
    val: float = 0.1
    test: float = 0.1

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.kinds if kind != SIGNAL_TYPE)

    @property
    def without_ecg(self) -> bool:
        """Whether no recording is asked about."""
        return self.kinds == (SIGNAL_TYPE,) and "ecg" not in self.signals

    def question(self, kind: str, turn: int) -> str:
        told = (self.wording or {}).get(kind) or (QUESTIONS[kind],)
        return told[turn % len(told)]


@dataclass(frozen=True)
class Window:
    """A segment, by its path below the folder of recordings: whose it is, its split; number: of a generated one."""

    path: str
    patients: tuple[str, ...]
    split: str
    number: int | None = None


@dataclass(frozen=True)
class _Row:
    """name: of what is asked, as the table has it; kind: as the report has it."""

    window: Window
    name: str
    kind: str
    question: str
    answer: str

    def as_record(self) -> dict[str, str]:
        turns = [{"from": "human", "value": self.question}, {"from": "gpt", "value": self.answer}]
        told = {"ecg_path": self.window.path, "text": compact(turns), "name": self.name}
        return {**told, "patient_id": "+".join(self.window.patients), "split": self.window.split}


def prepare_synthetic(
    records: Path, generated: int, out: Path, wanted: Wanted, length: int = 2500, workers: int = 1,
    progress: bool = True, made_by: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the table `out` (.parquet) with paths relative to `records`; returns (and writes) the counts.

    Args:
        records: where `prepare` left segments of `length` samples, or where `generated` new ones go (0: none).
        workers: processes, on which nothing depends.
        made_by: what the report is to say of how it was made.

    Raises:
        UserError: there are no recordings, or too few of them; or nothing is left to ask.
    """
    _check(wanted, generated, length)
    windows, most = _windows(records, generated, out, wanted, length)
    usable: list[tuple[Window, dict[str, str]]] = []
    left_out: dict[str, str] = {}
    with tqdm(total=most, desc="recordings", unit="", disable=not progress) as bar:
        read = in_order(partial(_answers, records, wanted, length), windows, workers)
        for window, (answers, problem) in zip(windows, each(read, "recording"), strict=True):
            if problem:
                left_out[window.path] = problem
                continue
            usable.append((window, answers))
            bar.update()
            if len(usable) == most:
                break
    if not usable or (wanted.recordings or 0) > len(usable):
        first = "".join(f" (not about {path}: {why})" for path, why in list(left_out.items())[:1])
        found, expected = f"{len(usable)} recordings that can be asked about{first}", f"{wanted.recordings or 'some'}"
        raise UserError(records, found, expected, "prepare more, or lower --recordings")
    counts, answers_of = Counter[tuple[str, str]](), Counter[str]()

    def counted(rows: Iterable[_Row]) -> Iterator[dict[str, str]]:
        for row in rows:
            counts["rows", row.window.split] += 1
            counts["kinds", row.name] += 1
            answers_of[f"{row.kind}: {row.answer}"] += row.kind != "heart_rate_bpm_float"  # of which each is another
            yield row.as_record()

    types = _types([window for window, _ in usable], wanted) if SIGNAL_TYPE in wanted.kinds else ()
    write_rows(out, counted(chain(types, _numbers(usable, wanted))))
    if not counts:
        raise UserError("--per-answer", f"{wanted.per_answer}", "answers that occur as often", "lower it")
    report = {
        **(made_by or {}),
        "recordings": len(usable),
        "rows": {split: counts["rows", split] for split in SPLITS},
        "kinds": {name: count for (what, name), count in sorted(counts.items()) if what == "kinds"},
        "answers": {answer: count for answer, count in sorted(answers_of.items()) if count},
        "seed": wanted.seed,
        "left_out": left_out,
    }
    write_json(out.with_name(f"{out.stem}_report.json"), report)
    return report


def read_wording(path: Path) -> dict[str, list[str]]:
    """A JSON object: kind -> its question, or a list of them. Raises UserError."""
    fix = 'write it like {"r_peak_count": ["How many beats?"]}'
    with refused(path, "malformed JSON", "kinds with their questions", fix):
        said = parse_json(read_regular(path, "a JSON file", fix))
    found: dict[str, list[str]] = {}
    for kind, told in said.items() if isinstance(said, dict) else [("", None)]:
        told = [told] if isinstance(told, str) else told
        if kind not in QUESTIONS or not isinstance(told, list) or not all(isinstance(text, str) for text in told):
            raise UserError(path, f"{kind!r}: {str(told)[:80]}", f"questions by {', '.join(QUESTIONS)}", fix)
        found[kind] = told
    return found


def _check(wanted: Wanted, generated: int, length: int) -> None:
    for flag, given, known in (("--questions", wanted.kinds, tuple(QUESTIONS)), ("--signals", wanted.signals, SIGNALS)):
        for name in given or ("",):
            if name not in known or given.count(name) > 1:
                found, expected = repr(",".join(given)), f"some of {', '.join(known)}, each once"
                raise UserError(flag, found, expected, nearest(name, known) or "correct it")
    least = (("--recordings", wanted.recordings, 1), ("--per-answer", wanted.per_answer, 1), ("--seed", wanted.seed, 0))
    for flag, number, lowest in (*least, ("--generated", generated, 0)):
        if number is not None and not lowest <= number <= MOST:
            raise UserError(flag, str(number), f"{lowest} to {MOST}", "correct it, or leave it out")
    if generated and wanted.recordings:
        found = f"--recordings {wanted.recordings} and --generated {generated}"
        raise UserError("command line", found, "one of them", "leave one out")
    if wanted.without_ecg and not (generated or wanted.recordings):
        raise UserError("--recordings", "none", "how many of each kind of signal", "give it")
    if generated and length < SHORTEST * GENERATED_RATE:
        expected = f"{SHORTEST * GENERATED_RATE:g} or more, {SHORTEST:g} s, of generated recordings"
        raise UserError("--segment-len", str(length), expected, "raise it")


def _windows(records: Path, generated: int, out: Path, wanted: Wanted, length: int) -> tuple[list[Window], int]:
    """The segments in the order in which they are taken, and how many of them at most."""
    if wanted.without_ecg or generated:
        place = f"synthetic/preprocessed_{length}/seed{wanted.seed}"
        count = generated or wanted.recordings or 0
        windows = []
        for number in range(count):
            path = f"{place}_{number:07d}_0.npy"
            split = split_of(nobody(path), wanted.seed, wanted.val, wanted.test)
            windows.append(Window(path, (nobody(path),), split, number))
        return windows, count
    recordings = Recordings(records, length, out)
    paths = sorted(recordings.paths | recordings.lost)  # the latter are listed as what cannot be read
    if not wanted.published:
        paths = [paths[place] for place in np.random.default_rng(wanted.seed).permutation(len(paths))]
    if (wanted.recordings or 0) > len(paths):  # known before all are read
        expected = f"{wanted.recordings} recordings"
        raise UserError(records, f"{len(paths)}", expected, "prepare more, or lower --recordings")
    windows = []
    for path in paths:
        who = recordings.patients(path) or (nobody(path),)
        split = recordings.split(path, who, "recordings", wanted.seed, wanted.val, wanted.test)
        windows.append(Window(path, who, split))
    return windows, min(wanted.recordings or len(windows), len(windows))


def _answers(records: Path, wanted: Wanted, length: int, window: Window) -> tuple[dict[str, str], str]:
    """What the questions about a window are answered with, by kind; or why nothing is asked of it."""
    if wanted.without_ecg:
        return {}, ""
    file, seconds = records / window.path, length / GENERATED_RATE
    if window.number is not None:
        key = (wanted.seed, window.number)
        if not file.is_file():
            stem, said = file.name.rpartition("_")[0], {"report": "", "ecg_path": window.path, "segment_len": length}
            said |= {"original_sf": GENERATED_RATE, "target_sf": GENERATED_RATE}
            store, made = NpyFiles(file.parent), synthesize(key, GENERATED_RATE, length)
            store.leave(store.pack(stem, made[None], said, records, None))
        if not wanted.published:
            return _told(draw_rhythm(key, seconds).r_peaks, seconds), ""
    try:
        recording = read_ecg(file, dtype=np.float64)
    except UserError as error:
        return {}, str(error)
    signal, rate = recording.signal, recording.sampling_rate
    if wanted.published:
        return comprehension.answers(signal[LEADS.index("II")], rate), ""
    found, seconds = find_beats(signal if rate == RATE else resample(signal, rate, RATE)), signal.shape[1] / rate
    if found.at.size < (1 if seconds <= _ONE_BEAT else 2) or found.contrast < CONTRAST:
        return {}, "no heartbeats"
    return _told(found.at / RATE, seconds), ""


def _told(beats: np.ndarray, seconds: float) -> dict[str, str]:
    """Of beats (N,) in s, some of which may lie outside of the window: kind of question -> answer."""
    inside, told = beats[(beats >= 0) & (beats < seconds)], {}
    if inside.size > 1:
        rate = 60 * (inside.size - 1) / (inside[-1] - inside[0])
        told = {"heart_rate_bpm_int": str(math.floor(rate + 0.5)), "heart_rate_bpm_float": f"{rate:.2f}"}
    if inside.size and np.minimum(abs(beats), abs(beats - seconds)).min() > _EDGE:
        told["r_peak_count"] = str(inside.size)
    return told


def _types(windows: Sequence[Window], wanted: Wanted) -> Iterator[_Row]:
    """Of each window one row a kind of signal, in its split; the letters of a kind are even in each split."""
    orders = list(permutations(wanted.signals))
    orders = [orders[place] for place in np.random.default_rng([wanted.seed, 1]).permutation(len(orders))]
    turns = Counter[str]()
    for number, window in enumerate(windows):
        for signal in wanted.signals:
            if wanted.published:
                order, text = wanted.signals, comprehension.options(wanted.signals)
            else:
                order = orders[turns[window.split] % len(orders)]
                text = "\n".join(f"{chr(ord('A') + place)}) {name}" for place, name in enumerate(order))
            nobodys = replace(window, path=signal, patients=(f"{signal}:{wanted.seed}:{number}",))
            asked = f"{wanted.question(SIGNAL_TYPE, number)}\n{text}"
            name = signal if wanted.published else SIGNAL_TYPE
            letter = chr(ord("A") + order.index(signal))
            yield _Row(window if signal == "ecg" else nobodys, name, signal, asked, letter)
        turns[window.split] += 1


def _numbers(usable: Sequence[tuple[Window, dict[str, str]]], wanted: Wanted) -> Iterator[_Row]:
    """The rows whose answers are numbers, of each window one a kind."""
    places = [(n, kind) for n, (_, answers) in enumerate(usable) for kind in wanted.numbers if kind in answers]
    asked = [(kind, usable[n][1][kind]) for n, kind in places]
    balance = comprehension.balanced if wanted.published else partial(_balanced, wanted.seed)
    for place in balance(asked, wanted.per_answer):
        (n, kind), answer = places[place], asked[place][1]
        yield _Row(usable[n][0], kind, kind, wanted.question(kind, n), answer)


def _balanced(seed: int, asked: Sequence[tuple[str, str]], per_answer: int | None) -> list[int]:
    """Which of `asked` (kind, answer) are kept, in their order: `per_answer` of each, drawn by the seed (None: all)."""
    if per_answer is None:
        return list(range(len(asked)))
    groups: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(asked):
        groups.setdefault(one, []).append(place)
    generator = np.random.default_rng([seed, 2])
    large = (groups[one] for one in sorted(groups) if len(groups[one]) >= per_answer)
    return sorted(int(place) for group in large for place in generator.choice(group, per_answer, replace=False))
