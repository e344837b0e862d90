"""SIGTERM, SIGINT and SIGUSR1 in every phase of a run: a verified checkpoint or a word why not, and nothing lost?

    python scripts/reliability/signals.py [--signals TERM,INT,USR1] [--processes 1,2] [--phases saving,validation]

Tiny runs on a CPU. For each signal and number of processes one run is stopped in each phase in turn, and goes on by the
same command up to the next one; in the end it must equal, bit by bit, the run that nobody stopped. Each stop must end
in status 143 (130 for SIGINT where nothing was trained yet), without a traceback, in one line: `stopped after step N`
with a verified checkpoint of that step, or `stopped by` with the phase and the command that goes on. Of two processes
one gets the signal in some phases, both in others. Evaluate, export, chat and prepare are stopped, too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import runs
import warm

from elm_jax.run.checkpoint import Checkpoints

STEPS, EVERY = 48, 4
AT_ONCE = {"TERM": 143, "USR1": 143, "INT": 130}  # status where nothing was trained yet
OPTIONS = {
    "train__steps": STEPS, "train__save_every": EVERY, "train__eval_every": EVERY, "update": ["connector", "llm"],
    "encoder__cache": True, "eval__at_end": True, "eval__controls": "zeros", "eval__limit": 4,
    "eval__max_new_tokens": 4,
}  # fmt: skip


class Phase(NamedTuple):
    """A moment in which a run gets the signal: `kind` and `moment` are those of `runs.arm`.

    trained: whether a step has been taken in the process; None where either may be. times: how often it comes.
    all: whether every process gets it, or the last one alone.
    """

    name: str
    kind: str
    moment: str
    trained: bool | None = False
    times: int = 1
    all: bool = True


PHASES = (
    Phase("imports", "import", "orbax.checkpoint"),
    Phase("opening the folder", "call", "elm_jax.run.folder:open_folder#1", all=False),
    Phase("tokenizer", "call", "elm_jax.run.folder:keep_tokenizer#1"),
    Phase("length index", "doing", "^conversation 3$#1"),  # which one process may find that the other has made
    Phase("weights", "doing", "^loading the weights#1", times=3),
    Phase("encoder cache", "doing", "^encoding recordings#1"),
    Phase("compiling", "doing", "^compiling#1", all=False),
    Phase("first step", "doing", "^step#1", None),
    Phase("a step", "doing", r"^step \d+$#5", True, all=False),
    Phase("a step thrice", "doing", r"^step \d+$#5", True, times=3),
    Phase("reading", "doing", r"^reading step \d+$#4", True),
    Phase("validation", "doing", "^validating#3", True, all=False),
    Phase("saving", "doing", "^saving,#2", True),
    Phase("saving thrice", "doing", "^saving,#2", True, times=3, all=False),
    Phase("verifying a save", "call", "elm_jax.run.verification:own_checksums#2", True, times=2),
    Phase("finishing", "doing", "^finishing#1"),
    Phase("evaluation", "doing", "^real answer 2$#1", all=False),
)  # fmt: skip


class Run:
    """One run, in one or two processes."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes

    def start(self, ask: str = "", everywhere: bool = True, cold: bool = False) -> list[subprocess.Popen[str]]:
        """Start it, or start it again; `ask` as in `runs.arm`, of all processes or the last."""
        cache = self.folder.with_suffix(".cache")
        shutil.rmtree(cache, ignore_errors=True)  # so that lengths and the encoder's outputs are made each time
        own = {"ELM_JAX_CACHE": str(cache), **({"PYTHONNOUSERSITE": "1"} if cold else {})}
        environments = runs.two() if self.processes == 2 else [{}]
        asked = [ask if everywhere or i + 1 == self.processes else "" for i in range(self.processes)]
        return [
            runs.start(self.folder, devices=2 // self.processes, env={**env, **own}, ask=one, **OPTIONS)
            for env, one in zip(environments, asked, strict=True)
        ]

    def stopped(self, phase: Phase, name: str) -> list[str]:
        """What is wrong with how it ends where it gets the signal in this phase; nothing, where all is well."""
        ask = f"{name}*{phase.times}@{phase.kind}={phase.moment}"
        processes = self.start(ask, phase.all, cold=phase.kind == "import")
        told = "".join([ended(process) for process in processes])
        after = re.search(rf"^stopped after step (\d+) by SIG{name}", told, re.M)
        statuses = [process.returncode for process in processes]
        wrong = [] if set(statuses) == {143 if after else AT_ONCE[name]} else [f"status {statuses}"]
        if "Traceback" in told:
            wrong.append("a traceback")
        if not after and f"stopped by SIG{name} (" not in told:
            wrong.append("no word")
        if phase.trained is not None and phase.trained != bool(after):
            wrong.append("stopped at once" if phase.trained else "went on to a step")
        if after and int(after[1]) != self.newest():
            wrong.append(f"stopped after step {after[1]}, the newest verified checkpoint is {self.newest()}")
        return [*wrong, told[-1500:]] if wrong else []

    def newest(self) -> int | None:
        """The newest verified checkpoint."""
        checkpoints = Checkpoints(self.folder, read_only=True)
        try:
            return checkpoints.find("latest")
        finally:
            checkpoints.close()

    def end(self) -> dict[str, Any]:
        """Let it go to its end; what must be equal then."""
        for process in self.start():
            errors = ended(process)
            if process.returncode:
                raise SystemExit(f"error: status {process.returncode} of a run that nobody stopped: {errors[-3000:]}")
        answers = sorted((self.folder / "eval").rglob("predictions.jsonl"))
        told = [re.sub(r'"seconds": [\d.]+', "", path.read_text()) for path in answers]
        done = (self.folder / "DONE").read_text()
        return {"state": common.state_hash(self.folder, STEPS), "log": runs.logged(self.folder), "done": done,
                "answers": told}  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for its end; its stderr."""
    try:
        return process.communicate(timeout=900)[1]
    finally:
        process.kill()


def other_commands(run: Run, name: str, folder: Path) -> dict[str, list[str]]:
    """What is wrong where a signal comes while another command works on this run."""
    found, out = {}, folder / "exported"
    commands = {
        "evaluate": ("doing=^loading the model#1", ["--checkpoint", str(run.folder)]),
        "export": ("call=elm_jax.exchange.export:write_card#1", ["--checkpoint", str(run.folder), "--out", str(out)]),
        "chat": ("call=elm_jax.chat:talk#1", ["--checkpoint", str(run.folder)]),
        "prepare": ("call=elm_jax.prepare:_parser#1", ["ptb_xl", "--raw", str(folder), "--out", str(out)]),
    }
    for command, (moment, arguments) in commands.items():
        own = {"TEST_COMMAND": command, "TEST_SIGNAL": f"{name}@{moment}"}
        process = runs.start_command([*warm.python(own), runs.__file__, *arguments], 2, own)
        errors = ended(process)
        good = process.returncode == AT_ONCE[name] and f"stopped by SIG{name} (" in errors and not out.exists()
        found[command] = [] if good and "Traceback" not in errors else [f"{process.returncode}: {errors[-1500:]}"]
    return found


def main() -> int:
    """Run what is asked for, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", default="TERM,INT,USR1", help="some of these; default: all")
    parser.add_argument("--processes", default="1,2", help="1, 2 or both (default)")
    parser.add_argument("--phases", default="", help="names, separated by commas; default: all")
    args = parser.parse_args()
    names = [name for name in args.signals.split(",") if AT_ONCE[name]]
    phases = [phase for phase in PHASES if not args.phases or phase.name in args.phases.split(",")]
    wrong: dict[str, list[str]] = {}
    stops, begun = 0, time.time()
    with tempfile.TemporaryDirectory() as place:
        for count in map(int, args.processes.split(",")):
            unbroken = Run(Path(place) / f"unbroken{count}", count)
            expected = unbroken.end()
            for name in names:
                run = Run(Path(place) / f"{name}{count}", count)
                for phase in phases:
                    stops += 1
                    problem = run.stopped(phase, name)
                    print(f"{count} processes, {name}, {phase.name}: {problem or 'good'}", file=sys.stderr, flush=True)
                    wrong |= {f"{count} {name} {phase.name}": problem} if problem else {}
                found = run.end()
                for what, value in expected.items():
                    if found[what] != value:
                        wrong[f"{count} {name} at the end"] = [f"another {what}"]
                if count == 1:
                    for command, problem in other_commands(run, name, Path(place)).items():
                        stops += 1
                        print(f"{name}, {command}: {problem or 'good'}", file=sys.stderr, flush=True)
                        wrong |= {f"{name} {command}": problem} if problem else {}
    good = not wrong
    sentence = f"{stops} stops in {len(phases)} phases: " + (
        "each ended as promised, and each run went on to the same end" if good else f"wrong: {wrong}"
    )
    return common.end(
        sentence, good, stops=stops, signals=names, processes=args.processes, phases=[p.name for p in phases],
        seconds=round(time.time() - begun),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
