"""How many ECG conversations a second the loader makes, and where the time goes; prints docs/benchmarks.md's table.

    python scripts/bench_loader.py --tokenizer FOLDER [--recordings FOLDER] [--share system] [--json FILE]
    python scripts/bench_loader.py --start 10000 100000 1000000 [--table parquet] [--tokenizer FOLDER]

Conversations are one question and answer about one recording, read from its .npy file (12 leads, 10 s at 250 Hz), with
a system prompt of 174 tokens and 50 signal tokens, packed into rows of 2048. No two questions are alike, so that no
cache of texts helps. FOLDER of --recordings holds prepared .npy files; without it some are generated, with random
samples. Files are in the page cache: the disk is not measured.

The processor time of a conversation is that of all processes of the loader; other work on the machine lengthens it too,
by its share of the caches, but less than the wall-clock time. `data.workers` 0 reads with a thread of this process.

With --start it measures instead how long it takes from the start of a process to the first batch, for so many made
conversations over 4/5 as many recordings: cold, with no cache, and warm, as the second time; the imports (without JAX),
the split by patient, the validation part and the first step are in it. Of these conversations 60 % are questions of
some ten thousand with short answers, 25 % reports and 15 % dialogues of which no two are alike. Memory is that of the
process and its helpers at the highest, shared pages once; pages of files that lie in memory are in it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from elm_jax.config import DataConfig
from elm_jax.data import loader
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.demo import demo_tokenizer
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.data.readers import steps_from
from elm_jax.data.represent import SignalSpec
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.recording import LEADS
from elm_jax.text.render import add_tokens
from elm_jax.text.vocabulary import load_tokenizer

ROWS, MAX_LEN, SIGNAL_TOKENS, PROMPT_TOKENS, RECORDINGS = 8, 2048, 50, 174, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", help="folder or id of a tokenizer with Qwen's chat form; default: the demo's")
    parser.add_argument("--recordings", type=Path, help="folder of .npy files as `prepare` leaves them")
    parser.add_argument("--conversations", type=int, default=4096)
    parser.add_argument("--share", default="system", choices=("none", "system", "ecg"))
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", type=int, nargs="+", metavar="N", help="measure starts of so many conversations")
    parser.add_argument("--table", default="jsonl", choices=("jsonl", "parquet"), help="what starts read")
    parser.add_argument("--started", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.started:
        return _first_batch(args)
    if args.start:
        return _starts(args)
    with tempfile.TemporaryDirectory() as folder:
        dataset = _dataset(args, Path(folder))
        index = dataset.length_index(args.share, 0.0)
        plan = Plan(index, rows=ROWS, max_len=MAX_LEN, pack=True, seed=0)
        source = StepSource(dataset, plan, steps=plan.steps_before(1))
        source[0]
        result = {
            "machine": machine("numpy", "grain"), "share": args.share, "conversations": len(dataset),
            "tokens_per_conversation": float(index.length.mean()), "recordings_are_real": args.recordings is not None,
            "split_us": _split(source), "workers": [_through(source, workers) for workers in args.workers],
        }  # fmt: skip
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# -- starts ---------------------------------------------------------------------------------------------------

FILES = 200  # recordings of a folder; folders are links to one
STATEMENTS = (
    "Sinus rhythm", "Sinus bradycardia", "Atrial fibrillation", "Left axis deviation", "Right bundle branch block",
    "Left ventricular hypertrophy", "Nonspecific T wave changes", "Prolonged QT interval", "Low QRS voltages",
    "Possible inferior infarct - age undetermined", "First degree AV block", "Premature ventricular contractions",
)  # fmt: skip


def _starts(args: argparse.Namespace) -> None:
    print(f"{machine('numpy', 'pyarrow', 'tokenizers')}; {args.table}, share={args.share}\n")
    print("| conversations | start | to the first batch | processor | memory | of it files | conversations a second |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for count in args.start:
        with tempfile.TemporaryDirectory() as folder:
            _table(Path(folder), count, args.table)
            for start in ("cold", "warm"):
                found.append({"conversations": count, "start": start, **_started(args, Path(folder))})
                one = found[-1]
                figures = (
                    f"{one['seconds']:.1f} s", f"{one['processor_s']:.1f} s", f"{one['memory_mb']:.0f} MB",
                    f"{one['of_files_mb']:.0f} MB", f"{one['per_processor_s']:.0f}",
                )  # fmt: skip
                print(f"| {count:,} | {start} |", " | ".join(figures), "|", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _table(folder: Path, count: int, kind: str) -> None:
    """The records, with a recording for each path."""
    recordings = -(-count * 4 // 5)
    (folder / "mimic").mkdir()
    shared = folder / "shared"
    shared.mkdir()
    for number, path in enumerate(_generated(shared)[:FILES]):
        path.rename(shared / f"{number}.npy")
    for number in range(-(-recordings // FILES)):
        (folder / "mimic" / f"d{number:04d}").symlink_to(shared)
    rng = random.Random(0)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for n in range(count):
            place = n * 4 // 5
            path = f"mimic/d{place // FILES:04d}/{place % FILES}.npy"
            row = {"ecg_path": path, "text": _text(n, rng), "name": "made", "patient_id": str(n // 6)}
            file.write(json.dumps(row) + "\n")
    if kind == "parquet":
        import pyarrow.json
        import pyarrow.parquet

        fields = [(name, pyarrow.string()) for name in ("ecg_path", "text", "name", "patient_id")]
        options = pyarrow.json.ParseOptions(explicit_schema=pyarrow.schema(fields))
        table = pyarrow.json.read_json(folder / "questions.jsonl", parse_options=options)
        pyarrow.parquet.write_table(table, folder / "questions.parquet")
        (folder / "questions.jsonl").unlink()


def _text(n: int, rng: random.Random) -> str:
    kind, lead, finding = rng.random(), LEADS[n % 12], STATEMENTS[rng.randrange(len(STATEMENTS))].lower()
    if kind < 0.6:
        asked = rng.choice(("Does this ECG show", "Is there any sign of", "Does the trace tell of", "Can you see"))
        question = f"{asked} {finding} in lead {lead}, {rng.choice(('at all', 'now', 'at rest', 'in any beat'))}?"
        return json.dumps(["single-verify", question, [rng.choice(("yes", "no", "not sure"))]])
    if kind < 0.85:
        said = ". ".join(f"{rng.choice(STATEMENTS)} ({rng.randrange(100)} %)" for _ in range(rng.randrange(2, 6)))
        return json.dumps([{"from": "human", "value": "<ecg>\nWrite the report."}, {"from": "gpt", "value": said}])
    rate = rng.randrange(400, 1500) / 10
    turns = [
        ("human", f"Which rate has case {n}?"), ("gpt", f"About {rate} beats a minute, and {finding}."),
        ("human", f"What of lead {lead}?"), ("gpt", f"There it is {rng.randrange(1000)} uV at the most."),
    ]  # fmt: skip
    return json.dumps([{"from": who, "value": what} for who, what in turns])


def _started(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A process that reads the first batch, its memory looked at now and again."""
    command = [sys.executable, __file__, "--started", folder, "--table", args.table, "--share", args.share]
    command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
    own = {**os.environ, "HF_DATASETS_CACHE": str(folder / "tables")}
    begun = time.time()
    process = subprocess.Popen(list(map(str, command)), env=own, stdout=subprocess.PIPE, text=True)
    most, done = (0, 0), threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(0.2):
            most = max(most, _memory(process.pid))

    watching = threading.Thread(target=look)
    watching.start()
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    done.set()
    watching.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    told = json.loads(said.splitlines()[-1])
    return {
        "seconds": told["at"] - begun, "processor_s": used.ru_utime + used.ru_stime - told["after"],
        "memory_mb": most[0] / 1024, "of_files_mb": most[1] / 1024, "per_processor_s": told["per_processor_s"],
    }  # fmt: skip


def _memory(pid: int) -> tuple[int, int]:
    """KiB of a process and those that it has started: all, and of these the pages of files."""
    all_of, of_files = 0, 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (pid, *children):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {line.split()[0]: int(line.split()[1]) for line in lines}
            all_of, of_files = all_of + sizes["Pss:"], of_files + sizes["Pss_File:"]
    except (OSError, IndexError, KeyError):  # one of them has just ended
        return 0, 0
    return all_of, of_files


def _first_batch(args: argparse.Namespace) -> None:
    """As training starts, without JAX; then some steps more. Prints when the first was there, by `time.time`."""
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer") if args.tokenizer else demo_tokenizer()
    add_tokens(tokenizer)
    data = DataConfig(
        names=(f"questions.{args.table}",), root=str(args.started), share=args.share, max_len=MAX_LEN,
        outside_root=True, val_fraction=0.05,
    )  # fmt: skip
    text, cache = text_spec(data, "qwen2", SIGNAL_TOKENS, "sft", ()), args.started / "cache"
    sources = []
    for split in ("train", "val"):
        dataset = Dataset(load_records(data, split, 0), tokenizer, text, signal_spec(data, 0))
        index = dataset.length_index(args.share, 0.0, cache)
        problem = dataset.missing(0.0)
        if problem:
            raise problem
        shuffle = split == "train"
        plan = Plan(index, rows=ROWS, max_len=MAX_LEN, pack=True, seed=0, shuffle=shuffle, cache=cache)
        sources.append(StepSource(dataset, plan, steps=plan.steps_before(1)))
    source = sources[0]
    source[0]
    at, begun = time.time(), time.process_time()
    read = sum(source[step].conversations for step in itertools.islice(range(1, len(source)), 40))
    after = time.process_time() - begun
    print(json.dumps({"at": at, "after": after, "per_processor_s": read / after}))


# -- the loader -----------------------------------------------------------------------------------------------


def _dataset(args: argparse.Namespace, folder: Path) -> Dataset:
    recordings = sorted(args.recordings.rglob("*.npy")) if args.recordings else _generated(folder)
    if not recordings:
        raise SystemExit(f"error: {args.recordings} holds no .npy files")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for n in range(args.conversations):
            lead, place = LEADS[n % 12], n * 7919
            question = f"Question {n}: is the trace of lead {lead} free of mains hum, near sample {place}?"
            row = {
                "ecg_path": str(recordings[n * len(recordings) // args.conversations].absolute()),
                "text": ["single-verify", question, ["yes" if n % 3 else "no"]], "name": "bench", "patient_id": str(n),
                "split": "train",
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer") if args.tokenizer else demo_tokenizer()
    add_tokens(tokenizer)
    data = DataConfig(
        names=("questions.jsonl",), root=str(folder), share=args.share, max_len=MAX_LEN, val_fraction=0.0,
        outside_root=True, system_prompt=_prompt(tokenizer),
    )  # fmt: skip
    text = text_spec(data, "qwen2", SIGNAL_TOKENS, "sft", ())
    return Dataset(load_records(data, "train", 0), tokenizer, text, signal_spec(data, 0))


def _generated(folder: Path) -> list[Path]:
    """Files as `prepare` writes them."""
    rng, paths = np.random.default_rng(0), []
    for n in range(RECORDINGS):
        record = {
            "ecg": rng.normal(size=(12, 2500)).astype(np.float32), "report": "", "leads": list(LEADS), "target_sf": 250,
        }  # fmt: skip
        paths.append(folder / f"{n}.npy")
        np.save(paths[-1], np.array(record, dtype=object), allow_pickle=True)
    return paths


def _prompt(tokenizer: Any) -> str:
    words = ["You"]
    while len(tokenizer(" ".join(words))["input_ids"]) < PROMPT_TOKENS - 5:  # beside those of the chat form
        words.append("read")
    return " ".join(words)


def _split(source: StepSource) -> dict[str, float]:
    """Processor microseconds a conversation of each part, in one thread."""
    spent: dict[str, float] = {}

    @contextmanager
    def timed(owner: Any, name: str, part: str) -> Iterator[None]:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent[part] = spent.get(part, 0.0) + time.process_time() - begun

        setattr(owner, name, wrapped)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def run() -> float:
        begun = time.process_time()
        for step in range(len(source)):
            source[step]
        return time.process_time() - begun

    def least(work: Callable[[], float]) -> float:
        return min(work() for _ in range(3))

    whole = least(run)
    parts: dict[str, float] = {}
    wrapped = [
        (SignalSpec, "load_raw", "read"), (SignalSpec, "load", "load"), (Dataset, "conversation", "render"),
        (loader, "write_row", "pack"), (loader, "empty_batch", "pack"),
    ]  # fmt: skip
    for owner, name, part in wrapped:  # one at a time: the clock costs as much as a small part
        def once(owner: Any = owner, name: str = name, part: str = part) -> float:
            spent.clear()
            with timed(owner, name, part):
                run()
            return spent[part]

        parts[part] = parts.get(part, 0.0) + least(once)
    count = len(source.dataset)
    # `write_row` packs what has been read and rendered: the reader runs before it.
    split = {
        "read": parts["read"], "normalise": parts["load"] - parts["read"], "render": parts["render"],
        "pack": parts["pack"], "other": whole - parts["load"] - parts["render"] - parts["pack"], "all": whole,
    }  # fmt: skip
    return {name: round(seconds / count * 1e6, 1) for name, seconds in split.items()}


def _through(source: StepSource, workers: int) -> dict[str, Any]:
    """Rates of the whole loader between two moments at which as much is read ahead."""
    ahead, measured = 8 * max(1, workers), source.plan.steps_before(1)
    endless = StepSource(source.dataset, source.plan, steps=source.plan.steps_before(4) + 4 * ahead)
    steps = steps_from(endless, 0, workers)
    for _ in range(ahead):
        next(steps)
    begun, cpu = time.perf_counter(), _processor_seconds()
    count = sum(next(steps).conversations for _ in range(measured))
    seconds, used = time.perf_counter() - begun, _processor_seconds() - cpu
    steps.close()  # type: ignore[attr-defined]
    return {
        "workers": workers, "wall_per_s": round(count / seconds), "processor_us": round(used / count * 1e6, 1),
        "cores_used": round(used / seconds, 2),
    }  # fmt: skip


def _processor_seconds() -> float:
    """Of this process and the processes that it has started and that still run."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def _print(result: dict[str, Any]) -> None:
    what = f"{result['conversations']} conversations of {result['tokens_per_conversation']:.0f} tokens"
    print(f"{result['machine']}; share={result['share']}, {what}\n")
    split = result["split_us"]
    print("| processor µs a conversation |", " | ".join(split), "|\n|---|" + "---|" * len(split))
    print("| one thread |", " | ".join(f"{value:.0f}" for value in split.values()), "|\n")
    print("| data.workers | processor µs a conversation | conversations a processor second | cores used | wall clock |")
    print("|---|---|---|---|---|")
    for row in result["workers"]:
        figures = (f"{row['processor_us']:.0f}", f"{1e6 / row['processor_us']:.0f}", row["cores_used"])
        print(f"| {row['workers']} |", " | ".join(map(str, figures)), f"| {row['wall_per_s']}/s |")


if __name__ == "__main__":
    main()
