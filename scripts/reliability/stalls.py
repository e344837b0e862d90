"""What no longer answers: a worker killed or stopped, a recording whose read never returns, a process of a run stopped.

    python scripts/reliability/stalls.py [--repeat 1] [--only worker_killed ...]

Each time a tiny run trains, one of its processes is killed or stopped or a read sticks, and it is measured after how
many seconds the run says so, in one sentence, and has ended, with status 75: within one and a half times the timeout,
and with no process left behind. Of a worker it is said within 10 s, without any timeout.
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

WORKER, TIMEOUT = 10.0, 12.0  # seconds in which a worker is named; what data.timeout and peers are given here
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

    def end(self, begun: float, words: str, but: int | None = None) -> tuple[float, float, str]:
        """After how many seconds one process, at last, has said so in a line with these words, when all but one have
        ended, with STATUS, and the line."""
        said, line = begun, ""
        for number, process in enumerate(self.processes):
            if number == but:
                continue
            assert process.stderr is not None
            errors = []
            for error in process.stderr:
                errors.append(error.rstrip())
                if words in error:
                    said, line = time.time(), errors[-1]
            process.wait(10 * TIMEOUT)
            told = "\n".join(errors[-40:])
            assert process.returncode == STATUS and words in errors[-1], f"status {process.returncode}:\n{told}"
            assert "Traceback" not in told, told
        return said - begun, time.time() - begun, line

    def kill(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def stalled(name: str, folder: Path) -> tuple[float, float, str]:
    """The seconds after which a run said what was the matter and had ended, and what it said."""
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
        found = run.end(begun, NAMES[name], victim)
        left = [pid for pid in loaders if Path(f"/proc/{pid}").exists()]
        assert not left, f"{left} are left"
        return found
    finally:
        run.kill()


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="times that each is tried")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES), help="some of them")
    args = parser.parse_args(argv)
    found: dict[str, list[tuple[float, float]]] = {}
    problems = []
    for name in args.only * args.repeat:
        with tempfile.TemporaryDirectory() as folder:
            try:
                said, ended, line = stalled(name, Path(folder))
            except (AssertionError, subprocess.TimeoutExpired) as error:
                problems.append(f"{name}: {error}")
                continue
        found.setdefault(name, []).append((round(said, 1), round(ended, 1)))
        timeout = WORKER if name.startswith("worker") else TIMEOUT
        if ended > 1.5 * timeout or (said > WORKER and name.startswith("worker")):
            problems.append(f"{name}: said after {said:.1f} s, ended after {ended:.1f} s")
        print(f"{name}: {said:.1f} s, {ended:.1f} s: {line}", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    ends = ", ".join(
        f"{name.replace('_', ' ')} {max(said for said, _ in seconds):g} and {max(ended for _, ended in seconds):g}"
        for name, seconds in found.items()
    )
    sentence = f"Seconds until said and until ended, at most: {ends}; of workers {WORKER:g} s count, else {TIMEOUT:g}"
    return common.end(sentence, not problems, timeout=TIMEOUT, seconds=found, not_as_promised=len(problems))


if __name__ == "__main__":
    sys.exit(main())
