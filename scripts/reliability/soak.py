"""Tens of thousands of small steps: what they leave of memory, threads and open files.

    python scripts/reliability/soak.py                    50 000 steps: minutes on two CPU cores
    python scripts/reliability/soak.py --steps 2000

The smallest model that can be built is trained on generated ECGs through the real loader, with a validation and a
checkpoint every 500 steps: the first half by the run's own process, the second, which goes on from the first's
checkpoint, with two worker processes. In the middle between two checkpoints the process measures itself and its
workers: memory (RSS), threads, open files, files in /dev/shm. After the first fifth of a half, in which caches fill,
memory may not grow by 1 % (median of the last fifth against that of the second), and in its last fifth there may
usually be no more threads, open files and files in shared memory than there were at most in the second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import runs
import warm

EVERY = 500  # steps between checkpoints, validations and measurements
DRIFT = 0.01
COUNTS = ("threads", "files", "shared")
SMALL: dict[str, Any] = {
    "elm": "base_elf", "encoder.name": None, "encoder.config": {}, "connector.hidden": None,
    "update": ["connector", "llm"],
    "llm.scratch": {"hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1, "mlp": 8, "max_len": 64},
    "data.names": ["demo:train=64,val=4,test=4"], "data.segment_len": 100, "data.sampling_rate": 10,
    "train.batch_size": 2, "train.save_every": EVERY, "train.eval_every": EVERY, "train.log_every": 10,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--workdir", type=Path, help="keep the run there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workdir or Path(temporary)
        ends = {0: options.steps // 2, 2: options.steps}  # by workers
        told = {f"workers_{workers}": figures(half(folder, end, workers)) for workers, end in ends.items()}
        size = (folder / "run" / "metrics.jsonl").stat().st_size
        finished = [line for line in runs.lines(folder / "run") if line.get("event") == "finish"]
    for one, line in zip(told.values(), finished, strict=True):
        one |= {"step_ms": line["step_ms"], "host_ms": round(line["step_ms"] * line["host_wait_share"], 3)}
    drift = max(one["drift"] for one in told.values())
    grown = [f"{name} of {half}" for half, one in told.items() for name in COUNTS if one[name][1] > one[name][0]]
    good = drift < DRIFT and not grown
    sentence = (
        f"{options.steps:,} steps: memory grew by {drift:.2%} at most, "
        f"{'more ' + ', '.join(grown) if grown else 'threads, open files and shared memory not at all'}; "
        f"{told['workers_0']['steps_per_s']} steps a second alone, {told['workers_2']['steps_per_s']} with two workers"
    )
    return common.end(
        sentence, good, steps=options.steps, metrics_bytes_per_step=round(size / options.steps, 1), **told
    )


def half(folder: Path, steps: int, workers: int) -> list[dict[str, float]]:
    """Train up to so many steps; what the process measured of itself."""
    changes = {**SMALL, "train.steps": steps, "data.workers": workers}
    flags = runs.flags(folder / "run", **{name.replace(".", "__"): value for name, value in changes.items()})
    path = folder / f"samples-{workers}.jsonl"
    own = {"ELM_JAX_CACHE": str(folder / "cache"), "SOAK_FILE": str(path)}
    process = runs.start_command([*warm.python(own), __file__, *flags], 1, own)
    try:
        _, errors = process.communicate()
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(errors[-3000:])
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(samples: list[dict[str, float]]) -> dict[str, Any]:
    """The second fifth against the last one: medians of memory and its drift; of threads and files the most against the
    median."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    before, after = (median(sample["rss_mb"] for sample in part) for part in (early, late))
    first, last = samples[0], samples[-1]
    return {
        "rss_mb": [round(before, 2), round(after, 2)], "drift": round(after / before - 1, 5),
        **{name: [max(x[name] for x in early), median(x[name] for x in late)] for name in COUNTS},
        "steps_per_s": round((last["step"] - first["step"]) / (last["seconds"] - first["seconds"]), 1),
    }  # fmt: skip


# -- the run that measures itself -----------------------------------------------------------------------------------


def train_and_measure() -> None:
    import elm_jax.train
    from elm_jax import cli
    from elm_jax.training import loop

    loop.Trainer._advance = measuring(loop.Trainer._advance)
    cli.run(elm_jax.train.main)


def measuring(advance: Callable[..., Any]) -> Callable[..., Any]:
    """A step; in the middle between two checkpoints a line goes to the file of samples."""

    def advanced(trainer: Any, loaded: Any) -> Any:
        line = advance(trainer, loaded)
        if (loaded.step + 1) % EVERY == EVERY // 2:
            with open(os.environ["SOAK_FILE"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": loaded.step + 1, **measured()}) + "\n")
        return line

    return advanced


def measured() -> dict[str, float]:
    """This process and those that it has started; a warm server that started this one is none of them."""
    mine = [os.getpid(), *children(os.getpid())]
    status = {pid: dict(x.split(":", 1) for x in Path(f"/proc/{pid}/status").read_text().splitlines()) for pid in mine}
    shared = Path("/dev/shm")
    return {
        "seconds": round(time.perf_counter(), 3),
        "rss_mb": round(sum(int(fields["VmRSS"].split()[0]) for fields in status.values()) / 1024, 2),
        "threads": sum(int(fields["Threads"]) for fields in status.values()),
        "files": sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in mine),
        "shared": sum(mapped(pid) for pid in mine) if shared.is_dir() else 0,
    }


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *children(child)]
    return found


def mapped(pid: int) -> int:
    """Files of shared memory that a process has mapped."""
    return len({line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line})


if __name__ == "__main__":
    if "SOAK_FILE" in os.environ:
        train_and_measure()
    else:
        sys.exit(main())
