"""What no longer answers: a worker killed or stopped, a recording whose read never returns, a process of a run stopped.

    python scripts/reliability/stalls.py [--repeat 1] [--only worker_killed ...]

Each time a tiny run trains, one of its processes is killed or stopped or a read sticks, and it is measured after how
many seconds the run has ended: within one and a half times the timeout (10 s for a worker), by one sentence, with
status 75, and with no process left behind.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import runs

WORKER, TIMEOUT = 10.0, 12.0  # seconds: what is promised of a worker, and what data.timeout and peers are given here
STATUS = 75
POLL = 0.01
STUCK = 40  # number of the record that sticks
NAMES = {
    "worker_killed": "killed by signal 9",
    "worker_stopped": "stopped for",
    "read_stuck_in_a_thread": "being read for",
    "read_stuck_in_a_worker": "being read for",
    "peer_stopped": "has not been heard of for",
    "first_peer_stopped": "has not been heard of for",
}


class Run:
    """A tiny run that would train for long, in one process or several."""

    def __init__(self, folder: Path, workers: int = 0, processes: int = 1, stuck: bool = False) -> None:
        self.folder, self.began = folder, folder.with_suffix(".stuck")
        changes = {"train__steps": 100_000, "train__save_every": 50_000, "data__workers": workers,
                   "data__timeout": TIMEOUT, "data__val_fraction": 0.0}  # fmt: skip
        command = [sys.executable, runs.__file__, *runs.flags(folder, **changes)]
        own = {"ELM_JAX_CACHE": str(folder.parent / "cache"), "ELM_JAX_PEER_TIMEOUT": f"{TIMEOUT:g}"}
        own |= {"TEST_STUCK": f"{STUCK} {self.began}"} if stuck else {}
        places = runs.two() if processes == 2 else [{}]
        self.processes = [runs.start_command(command, 1, {**own, **place}) for place in places]

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Until something is there; fails where a process ends before."""
        while not there():
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended, f"ended too early:\n{ended[0].communicate()[1][-2000:]}"
            time.sleep(POLL)

    def trains(self) -> bool:
        """Whether some steps are taken."""
        file = self.folder / "metrics.jsonl"
        return file.is_file() and file.read_text().count('"loss"') > 20

    def workers(self) -> list[int]:
        """The processes of its loader."""
        children = Path(f"/proc/{self.processes[0].pid}/task/{self.processes[0].pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def end(self, begun: float, but: int | None = None) -> tuple[float, list[str]]:
        """After how many seconds all processes but one have ended with STATUS, and what they said."""
        said = []
        for number, process in enumerate(self.processes):
            if number == but:
                continue
            _, errors = process.communicate(timeout=10 * TIMEOUT)
            assert process.returncode == STATUS, f"status {process.returncode}:\n{errors[-2000:]}"
            assert "Traceback" not in errors, errors[-4000:]
            said.append(errors.strip().splitlines()[-1])
        return time.time() - begun, said

    def kill(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def stalled(name: str, folder: Path) -> tuple[float, float, str]:
    """The seconds after which a run ended, those within which it had to, and what it said."""
    stuck, peer = name.startswith("read"), "peer" in name
    workers = 2 if name.startswith("worker") or name.endswith("a_worker") else 0
    run = Run(folder / name, workers, 2 if peer else 1, stuck)
    try:
        run.wait_for(run.began.is_file if stuck else run.trains)
        loaders = run.workers() if workers else []
        assert len(loaders) == workers, f"{loaders}: {workers} were to read"
        victim = None
        if peer:
            victim = 0 if name.startswith("first") else 1
            run.processes[victim].send_signal(signal.SIGSTOP)
        elif not stuck:
            os.kill(loaders[0], signal.SIGKILL if name == "worker_killed" else signal.SIGSTOP)
        begun = run.began.stat().st_mtime if stuck else time.time()
        seconds, said = run.end(begun, victim)
        left = [pid for pid in loaders if Path(f"/proc/{pid}").exists()]
        assert not left, f"{left} are left"
        assert NAMES[name] in said[0], said[0]
        return seconds, WORKER if name.startswith("worker") else 1.5 * TIMEOUT, said[0]
    finally:
        run.kill()


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="times that each is tried")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES), help="some of them")
    args = parser.parse_args(argv)
    found: dict[str, list[float]] = {}
    problems = []
    for name in args.only:
        for _ in range(args.repeat):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    seconds, most, said = stalled(name, Path(folder))
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    problems.append(f"{name}: {error}")
                    continue
            found.setdefault(name, []).append(round(seconds, 1))
            if seconds > most:
                problems.append(f"{name}: {seconds:.1f} s, {most:g} were allowed")
            print(f"{name}: {seconds:.1f} s of {most:g}: {said}", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    ends = ", ".join(f"{name.replace('_', ' ')} {max(seconds):g} s" for name, seconds in found.items())
    sentence = f"Ended after at most: {ends}; {WORKER:g} s are promised of workers, {1.5 * TIMEOUT:g} of the rest here"
    return common.end(sentence, not problems, timeout=TIMEOUT, seconds=found, not_as_promised=len(problems))


if __name__ == "__main__":
    sys.exit(main())
