"""Goodput: the share of the time that went into steps which counted, when a run is killed every minute.

    python scripts/reliability/goodput.py [--minutes 30] [--every 60] [--config configs/demo.py] [--out FOLDER]
                                          [--config.KEY=VALUE ...]

The run (by default the demo, which goes on beyond its end, and saves by time, as whoever is often killed does: where no
save fits between two kills a run never gets on) gets SIGKILL `--every` so many seconds after its start,
whatever it does, and is started again at once. `--every 0` kills only once, at the end: goodput without faults. Steps
count if the next start went on behind them. The seconds of each attempt are split by what it was at: imports, data
(the config, records and their plan), model (weights and programs), restore, compile (or reading the program from the
cache), validate, save (as long as steps wait for it) and training, which is `counted` up to the save that the next
attempt went on from and `lost` behind it. Beside the seconds that pass there are those of processors, which other work
on the machine changes little. It fails where no step counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common

# As Young (1974) has it: the root of twice the seconds of a save, of which the loop stands still for some 0.3, by those
# between two faults.
OFTEN = ["--config.train.save_minutes=0.1"]
# What of a trainer is which part of the time; what is none of these, once it is built, is training.
PARTS = {"__init__": "data", "_build": "model", "_restore": "restore", "_validate": "validate", "_save": "save"}
# From when on, by the clock and in seconds of processors, it was at which part; the step of a save or restore.
Line = tuple[float, float, str, int | None]


def child(path: Path, flags: list[str]) -> None:
    """The train command, which writes down what it is at from when on."""
    from elm_jax import cli, train
    from elm_jax.training.loop import Trainer
    from elm_jax.training.step import StepPrograms

    now = ["model"]  # of what has begun, the innermost is last

    def enter(part: str, step: int | None = None) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([time.time(), time.process_time(), part, step]) + "\n")

    def time_it(owner: type, name: str, part: str) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            enter(part, args[0] if part in ("save", "restore") else None)
            now.append(part)
            try:
                return method(self, *args, **kwargs)
            finally:
                now.pop()
                if name == "_build":
                    now[:] = ["train"]
                enter(now[-1])

        setattr(owner, name, wrapper)

    for name, part in PARTS.items():
        time_it(Trainer, name, part)
    time_it(StepPrograms, "compile", "compile")
    enter("data")
    cli.run(train.main, flags)


def attempts(folder: Path, minutes: float, every: float, flags: list[str]) -> list[list[Line]]:
    """Train for so long, killed so often: what each attempt was at from when on; its last line is its end."""
    stop, found = time.time() + 60 * minutes, []
    environment = {**os.environ, "ELM_JAX_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")  # as a user has it: in our cache
    while time.time() < stop - 1:
        path = folder / f"attempt_{len(found)}"
        own = [f"--config.workdir={folder / 'run'}", "--config.train.steps=1000000", "--config.eval.at_end=False"]
        command = [sys.executable, __file__, "--child", str(path), *flags, *own, "--config.log.progress=False"]
        begun, used = time.time(), _processor_seconds()
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=(min(stop, begun + every) if every else stop) - begun)
            raise SystemExit(f"error: the run ended by itself, status {process.returncode}:\n{errors}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        end = time.time(), _processor_seconds() - used, "", None
        found.append([(begun, 0.0, "imports", None), *map(tuple, lines), end])
    return found


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def split(found: list[list[Line]], newest: int, clock: int) -> Counter[str]:
    """The seconds of each part over all attempts; after the last one the run would go on from the step `newest`.

    clock: 0 for seconds that passed, 1 for those of processors.
    """
    seconds = Counter[str]()
    for lines in reversed(found):
        own, counted = Counter[str](), 0.0
        for now, after in zip(lines, lines[1:], strict=False):
            _, _, part, step = now
            if part == "save" and step == newest:
                counted = own["train"]
            own[part] += after[clock] - now[clock]
        restored = [step for _, _, part, step in lines if part == "restore" and step is not None]
        if restored or own["train"]:  # else it was killed before it went on from anywhere
            newest = restored[0] if restored else 0
        own["counted"], own["lost"] = counted, own.pop("train", 0.0) - counted
        seconds.update(own)
    return seconds


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=60, help="seconds from a start to the kill; 0: only at the end")
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--out", type=Path, help="a new folder for the run and its cache (default: temporary)")
    args, flags = parser.parse_known_args()
    if args.out:
        args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).absolute()
        found = attempts(folder, args.minutes, args.every, ["--config", args.config, *OFTEN, *flags])
        steps = common.newest(folder / "run")
    seconds, used = split(found, steps, 0), split(found, steps, 1)
    wall = sum(lines[-1][0] - lines[0][0] for lines in found)
    figures = {
        "minutes": args.minutes,
        "every": args.every,
        "flags": [*OFTEN, *flags],
        "attempts": len(found),
        "goodput": round(seconds["counted"] / wall, 4),
        "share": {part: round(passed / wall, 4) for part, passed in seconds.most_common()},
        "seconds_an_attempt": {part: round(passed / len(found), 2) for part, passed in seconds.most_common()},
        "processor_seconds_an_attempt": {part: round(passed / len(found), 2) for part, passed in used.most_common()},
        "steps": steps,
        "steps_per_s": round(steps / max(seconds["counted"], 1e-9), 2),
    }
    sentence = (
        f"{len(found)} attempts in {wall / 60:.1f} minutes: {seconds['counted'] / wall:.0%} of the time went into "
        f"{steps} steps that counted, {seconds['lost'] / wall:.0%} into steps that were lost"
    )
    return common.end(sentence, steps > 0, **figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    sys.exit(main())
