"""How many ECG conversations a second the loader makes, and where the time goes; prints docs/benchmarks.md's table.

    python scripts/bench_loader.py --tokenizer FOLDER [--recordings FOLDER] [--share system] [--json FILE]

Conversations are one question and answer about one recording, read from its .npy file (12 leads, 10 s at 250 Hz), with
a system prompt of 174 tokens and 50 signal tokens, packed into rows of 2048. No two questions are alike, so that no
cache of texts helps. FOLDER of --recordings holds prepared .npy files; without it some are generated, with random
samples. Files are in the page cache: the disk is not measured.

The processor time of a conversation is that of all processes of the loader; other work on the machine lengthens it too,
by its share of the caches, but less than the wall-clock time. `data.workers` 0 reads with a thread of this process.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
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
from elm_jax.data.represent import SignalSpec, signal_spec
from elm_jax.data.sources import load_records
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
    args = parser.parse_args()
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
