"""A launcher's restart: under torchrun one of two processes is killed, and the run goes on by itself to its end.

    python scripts/reliability/restarts.py [--kills 2]

It ends with status 0 and DONE, went on from a checkpoint each time, and has the losses of a run that nobody killed.
Needs PyTorch, whose torchrun it is.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import runs

STEPS, SAVE_EVERY = 30, 5
POLL = 0.01
OPTIONS = {"train__steps": STEPS, "train__save_every": SAVE_EVERY, "data__val_fraction": 0.0}


def processes_of(torchrun: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started and that run."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [int(child) for child in children if runs.__file__.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


def steps_of(folder: Path, resumes: int = 0) -> int:
    """How many steps are logged; those since the last of so many resumes, 0 before it."""
    file = folder / "metrics.jsonl"
    before, *since = (file.read_text() if file.is_file() else "").split('"event": "resume"')
    if len(since) < resumes:
        return 0
    return (since[-1] if resumes else "".join([before, *since])).count('"loss"')


def restarted(folder: Path, kills: int, chance: random.Random) -> list[float]:
    """Train under torchrun, and kill a process so many times; the seconds until steps are taken again."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, f"--max-restarts={kills}", runs.__file__, *runs.flags(folder, **OPTIONS)]
    process = runs.start_command(command, 1, {"ELM_JAX_CACHE": str(folder.parent / "cache")})
    took = []
    try:
        for kill in range(kills):
            _wait(process, lambda kill=kill: steps_of(folder) > SAVE_EVERY * (2 * kill + 1) + 1)
            os.kill(chance.choice(processes_of(process)), signal.SIGKILL)
            begun = time.time()
            _wait(process, lambda kill=kill: steps_of(folder, kill + 1) > 0)
            took.append(time.time() - begun)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, f"status {process.returncode}:\n{errors[-4000:]}"
        return took
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()


def _wait(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    while not there():
        assert process.poll() is None, f"torchrun has ended:\n{process.communicate()[1][-4000:]}"
        time.sleep(POLL)


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    problem, took, starts = "", [], []
    with tempfile.TemporaryDirectory() as place:
        killed, unbroken = Path(place) / "killed", Path(place) / "unbroken"
        try:
            took = restarted(killed, args.kills, random.Random(args.seed))
            runs.train(unbroken, devices=2, **OPTIONS)
            starts = [line["step"] for line in runs.lines(killed) if line.get("event") in ("start", "resume")]
            assert (killed / "DONE").is_file(), "not done"
            assert len(starts) == args.kills + 1 and not any(step % SAVE_EVERY for step in starts), f"began at {starts}"
            found, expected = runs.logged(killed), runs.logged(unbroken)
            assert found.keys() == expected.keys(), f"logged {sorted(found)}"
            differs = [s for s in expected if abs(found[s]["loss"] / expected[s]["loss"] - 1) > 1e-4]
            assert not differs, f"other losses in steps {differs}"
        except (AssertionError, subprocess.TimeoutExpired) as error:
            problem = str(error)
            print(problem, file=sys.stderr)
    sentence = problem or (
        f"torchrun: {args.kills} kills of one of two processes; it went on by itself from steps {starts[1:]}, took"
        f" steps again after at most {max(took, default=0):.0f} s, and ended with the losses of an unbroken one"
    )
    return common.end(sentence, not problem, kills=args.kills, starts=starts, seconds=[round(t, 1) for t in took])


if __name__ == "__main__":
    sys.exit(main())
