"""What saving costs: a run on real recordings with many checkpoints, against the same run without.

    python scripts/reliability/saving.py --ptb-xl ptb-xl-1.0.3 --llm stories260K

The first run of docs/real_data.md (PTB-XL's reports; encoder, connector and LLM are trained) is taken for some steps in
turns, with checkpoints and with none. What a checkpoint costs is the difference of the medians of
their times by the number of checkpoints, verification in the background included; told as well are the seconds that
the loop itself stood still for one, and the difference of the processor's time. The shares are those of a checkpoint
every `train.save_every` steps, by its default.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import common

from elm_jax.cli import ConfigFlags
from elm_jax.config import Config

FIRST = 4  # the step from which on time counts, without that of compiling
PROMISE = 0.01
RUN = {
    "data.system_prompt": "", "data.share": "ecg", "data.max_len": 512, "data.val_fraction": 0, "llm.remat": "none",
    "llm.compute_dtype": "float32", "encoder.config.resnet_type": "resnet18", "encoder.config.width": 8,
    "encoder.tokens": 8, "update": "encoder,connector,llm", "optim.lr": 2e-3, "train.batch_size": 8,
    "llm.chat": "plain", "data.names": "ptb_xl_reports.parquet", "log.progress": "false",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptb-xl", type=Path, required=True, help="folder with ptbxl_database.csv and records500")
    parser.add_argument("--llm", type=Path, required=True, help="folder of a small LLM")
    parser.add_argument("--steps", type=int, default=64, help="of a run")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints, where there are any")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "elm_jax.prepare", "ptb_xl", "--raw", str(options.ptb_xl), "--out", temporary]
        subprocess.run(command, check=True, cwd=common.ROOT, stdout=sys.stderr)
        flags = {**RUN, "data.root": temporary, "llm.name": options.llm.resolve(), "train.steps": options.steps}
        found: dict[int, list[Times]] = {options.steps: [], options.every: []}
        for repeat in range(options.repeats):
            for every, runs in found.items():
                runs.append(trained(flags, folder / f"run_{repeat}_{every}", every))
    saves = (options.steps - 1) // options.every - FIRST // options.every
    wall, cpu = (
        [median(getattr(run, kind) for run in found[every]) for every in (options.steps, options.every)]
        for kind in ("wall", "cpu")
    )
    steps, default = options.steps - FIRST, Config().train.save_every
    usual = default * wall[0] / steps  # seconds between two checkpoints
    held = median(seconds for run in found[options.every] for seconds in run.held)
    cost = (wall[1] - wall[0]) / saves
    busy = (cpu[1] - cpu[0]) / saves
    busy_share = busy / cpu[0] * steps / default
    sentence = (
        f"for a checkpoint the loop stands still for {held:.3f} s; it costs {busy:.3f} s of the processor, and the run "
        f"{cost:.3f} s more; at one in {default} steps of {1000 * wall[0] / steps:.0f} ms that is {held / usual:.2%}, "
        f"{busy_share:.2%} and {cost / usual:.2%} of theirs"
    )
    return common.end(
        sentence, max(cost / usual, held / usual, busy_share) < PROMISE,
        step_ms=round(1000 * wall[0] / steps, 1), saves=saves,
        repeats=options.repeats, seconds_without=round(wall[0], 3), seconds_with=round(wall[1], 3),
        cost_s=round(cost, 4), held_s=round(held, 4), cpu_s=round(busy, 4),
        share=round(cost / usual, 6), held_share=round(held / usual, 6), cpu_share=round(busy_share, 6),
    )  # fmt: skip


class Times:
    """Of a run from its step FIRST to its last one: seconds, the processor's, and those of each checkpoint in them."""

    def __init__(self) -> None:
        self.wall, self.cpu, self.held = 0.0, 0.0, list[float]()


def trained(flags: dict[str, Any], workdir: Path, every: int) -> Times:
    """Train, with a checkpoint every so many steps."""
    from elm_jax.training import loop

    own = {**flags, "workdir": workdir, "train.save_every": every, "train.eval_every": 10**6}
    config = ConfigFlags.parse(
        ["--config", str(common.ROOT / "elm_jax/configs/llava_merl.py"), *(f"--config.{n}={v}" for n, v in own.items())]
    ).load()
    times, last = Times(), config.train.steps
    advance, save, compiles = loop.Trainer._advance, loop.Trainer._save, loop.StepPrograms.compile

    def advanced(trainer: loop.Trainer, loaded: Any) -> Any:
        if loaded.step == FIRST:
            times.wall, times.cpu = time.perf_counter(), time.process_time()
        line = advance(trainer, loaded)
        if loaded.step + 1 == last:
            with trainer.report.paused():
                times.wall, times.cpu = time.perf_counter() - times.wall, time.process_time() - times.cpu
        return line

    def compiled(programs: loop.StepPrograms, *arguments: Any) -> float:
        cpu = time.process_time()
        seconds = compiles(programs, *arguments)
        times.wall, times.cpu = times.wall + seconds, times.cpu + time.process_time() - cpu
        return seconds

    def saved(trainer: loop.Trainer, done: int) -> None:
        with trainer.report.paused():  # the steps before it are no part
            began = time.perf_counter()
        save(trainer, done)
        if done != last:
            times.held.append(time.perf_counter() - began)

    with (
        mock.patch.multiple(loop.Trainer, _advance=advanced, _save=saved),
        mock.patch.object(loop.StepPrograms, "compile", compiled),
    ):
        loop.train(config)
    return times


if __name__ == "__main__":
    sys.exit(main())
