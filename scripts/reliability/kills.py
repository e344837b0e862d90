"""SIGKILL at random moments: does the run, started again each time, end as the run that nobody stopped?

    python scripts/reliability/kills.py [--objective sft] [--kills 100] [--seed 0] [--out FOLDER]

Tiny runs on a CPU, with packing, in turn without and with worker processes (of a policy, which draws its answers
itself, without). Each is killed several times and started again at once by the same command; then it goes on to its
end. At least half of the kills hit a save: between the first file of a checkpoint and the moment from which it counts.
They are timed by the folders that appear. The others come at any time from start-up (the imports are done) to the end.

At the end all must be equal, bit by bit: the arrays of the last checkpoint, the optimizer's too; what was logged of
each step; and the samples of each step, in every attempt that took it. And a kill may cost no more than the steps since
a save was last due; where that one was still being written, those since the one before it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import runs

STEPS, SAVE_EVERY = 36, 6
WORKERS = (0, 2)
ANSWERED = {
    "data__max_len": 256, "rl__answers": 3, "rl__max_new_tokens": 4, "rl__rewards": ["of_length"], "rl__kl": 0.1,
    "rl__show_every": 6, "train__eval_every": 12,
}  # fmt: skip
REWARD = """import elm_jax

elm_jax.register_reward("of_length", lambda answered: len(answered.answer) % 5)
"""  # which an untrained model has, too
MASKED = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1,
          "decoder_num_heads": 1}  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sapo": ANSWERED,
    "grpo": ANSWERED,
    "dpo": {"data__max_len": 256},
    "st_mem": {"encoder__name": "st_mem", "encoder__config": MASKED, "update": "encoder", "optim__ema": 0.9},
}
POLL = 0.002  # seconds


class Usual(NamedTuple):
    """Seconds that things take when nobody kills."""

    run: float
    save: float


class Kill(NamedTuple):
    """What a kill hit: the phase, the last step that was logged, the last save that was begun or due, and the step of
    the newest checkpoint that counts."""

    phase: str
    done: int
    due: int
    kept: int

    @property
    def lost(self) -> int:
        """Steps that have to be taken again."""
        return max(0, self.done - self.kept)

    @property
    def good(self) -> bool:
        """Whether no more was lost than a kill may cost."""
        return self.kept >= self.due - (SAVE_EVERY if self.phase == "saving" else 0)


class Run:
    """One run, in as many processes as it takes."""

    def __init__(self, folder: Path, workers: int, objective: str = "sft") -> None:
        self.folder, self.workers, self.objective = folder, workers, objective
        self.samples = folder.with_suffix(".samples")
        self.kept = 0  # step of the newest checkpoint that counts

    def start(self) -> subprocess.Popen[str]:
        """Start it, or start it again: by the same command."""
        changes = {"train__steps": STEPS, "train__save_every": SAVE_EVERY, "data__workers": self.workers}
        changes |= {"objective": self.objective, **OBJECTIVES[self.objective]}
        if self.objective == "dpo":
            changes["data__names"] = [str(pairs(self.folder.parent))]
        reward = self.folder.parent / "reward.py"
        reward.write_text(REWARD)
        own = {"env": {"TEST_SAMPLES": str(self.samples)}, "more": ("--register", str(reward))}
        return runs.start(self.folder, **own, **changes)

    def unbroken(self) -> Usual:
        """Let it go from start to end."""
        process, begun = self.start(), time.time()
        saves: list[float] = []
        while process.poll() is None:
            saves += [time.time()] if self.unfinished(begun) else []
            time.sleep(POLL)
        runs.finish(process)
        return Usual(time.time() - begun, (saves[-1] - saves[0]) * SAVE_EVERY / STEPS)

    def kill(self, in_save: bool, chance: random.Random, usual: Usual) -> Kill | None:
        """Start it and kill it, in a save or at any time; None where it came to its end before."""
        starts, process, begun = len(self.starts()), self.start(), time.time()
        moment = begun + chance.uniform(0, usual.run)
        if in_save:
            save, seen = chance.choice((1, 1, 2)), set[int]()  # the first that it begins, or the second
            while process.poll() is None and len(seen) < save:
                time.sleep(POLL)
                seen |= self.unfinished(begun)
            moment = time.time() + chance.uniform(0, usual.save)
        while process.poll() is None and time.time() < moment:
            time.sleep(POLL)
        if process.poll() is not None:
            runs.finish(process)
            return None
        process.kill()
        process.communicate()  # its workers are gone too: they had its stderr
        return self._hit(begun, starts)

    def _hit(self, begun: float, starts: int) -> Kill:
        """What a kill has hit of the process that began then, after so many starts of the run."""
        before, done = self.kept, self.done()
        unfinished = self.unfinished(begun) if len(self.starts()) > starts else set()  # before, leftovers are removed
        self.kept = common.newest(self.folder)
        unfinished = {step for step in unfinished if step >= self.kept}  # the others are being removed
        assert self.kept >= before, f"checkpoint {before} is gone, the newest is {self.kept}"
        due = done // SAVE_EVERY * SAVE_EVERY
        if unfinished:
            return Kill("saving", done, max(unfinished), self.kept)
        if len(self.starts()) == starts:
            return Kill("starting", self.kept, self.kept, self.kept)
        if done == due:  # a step is logged before its save begins
            due = self.kept
        return Kill("finishing" if self.kept == STEPS else "training", done, due, self.kept)

    def end(self) -> dict[str, Any]:
        """What must be equal of two runs at their end."""
        return {
            "state": common.state_hash(self.folder, STEPS),
            "log": runs.logged(self.folder),
            "samples": self.order(),
            "end": (self.folder / "DONE").read_text(),
        }

    def order(self) -> dict[int, Any]:
        """The samples of each step. All attempts that took a step have read the same."""
        found: dict[int, Any] = {}
        for step, ids in map(json.loads, self.samples.read_text().splitlines()):
            assert found.setdefault(step, ids) == ids, f"an attempt read other samples for step {step}"
        return found

    # -- what is on disk -----------------------------------------------------------------------------------------

    def starts(self) -> list[int]:
        """The step from which each start of the run went on, as far as it came."""
        return [line["step"] for line in self._lines() if line.get("event") in ("start", "resume")]

    def done(self) -> int:
        """The last step that was logged."""
        return max((line["step"] for line in self._lines() if "loss" in line), default=0)

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last

    def unfinished(self, since: float) -> set[int]:
        """Steps of the checkpoints that were begun since then and are not verified yet."""
        found = set()
        for path in (self.folder / "checkpoints").glob("*"):
            try:
                if path.stat().st_mtime >= since and not any(path.glob("checksums-*-of-*.json")):
                    found.add(int(path.name.partition(".")[0]))
            except FileNotFoundError:  # it was moved to its final name meanwhile
                continue
        return found


def killed_runs(
    place: Path, count: int, seed: int, loaders: Sequence[int] = WORKERS, objective: str = "sft"
) -> tuple[list[Kill], int, list[str]]:
    """Kill runs in `place` at least `count` times, with so many workers in turn.

    Returns the kills, the number of runs, and what was not as promised.
    """
    chance = random.Random(seed)
    whole = [Run(place / f"unbroken_{workers}", workers, objective) for workers in loaders]
    usual = {run.workers: run.unbroken() for run in whole}
    expected = whole[0].end()
    problems = [f"{run.folder}: not as {whole[0].folder}" for run in whole if run.end() != expected]
    kills: list[Kill] = []
    number = 0
    while len(kills) < count or 2 * _in_saves(kills) < count:
        run = Run(place / f"killed_{number}", loaders[number % len(loaders)], objective)
        number += 1
        try:
            for _ in range(min(chance.randint(3, 12), max(1, count - len(kills)))):
                kept, starts = run.kept, len(run.starts())
                kill = run.kill(2 * _in_saves(kills) <= len(kills), chance, usual[run.workers])
                assert run.starts()[starts:] in ([], [kept]), f"{run.starts()}: went on from another step than {kept}"
                if kill is None:  # the machine has become faster
                    now = usual[run.workers]
                    usual[run.workers] = Usual(0.8 * now.run, 0.8 * now.save)
                    break
                kills.append(kill)
                assert kill.good, f"too much is lost: {kill}"
            runs.finish(run.start())
            ended = run.end()
            differs = [name for name in expected if ended[name] != expected[name]]
            assert not differs, f"not as the unbroken run: {differs}"
        except AssertionError as error:
            problems.append(f"{run.folder}: {error}")
            continue
        shutil.rmtree(run.folder)
        lost = max((kill.lost for kill in kills), default=0)
        bad, saving = len(problems), _in_saves(kills)
        print(f"{number} runs, {bad} bad; {len(kills)} kills, {saving} in saves, {lost} steps lost at most", flush=True)
    return kills, number, problems


def pairs(place: Path) -> Path:
    """Questions about noise, of which the longer answer is preferred."""
    path = place / "pairs.jsonl"
    if not path.exists():
        rows = [
            {"ecg_path": "noise", "patient_id": i, "prompt": f"How fast is number {i}?", "chosen": f"It is {i}.",
             "rejected": "No."} for i in range(64)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _in_saves(kills: list[Kill]) -> int:
    return sum(kill.phase == "saving" for kill in kills)


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, default="sft", help="what the runs learn")
    parser.add_argument("--kills", type=int, default=100, help="at least so many, half of them in saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder for the runs; those that fail stay (default: temporary)")
    args = parser.parse_args(argv)
    if args.out:
        args.out.mkdir(parents=True)
    begun = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.out or Path(temporary)
        loaders = WORKERS if OBJECTIVES[args.objective] is not ANSWERED else WORKERS[:1]
        kills, number, problems = killed_runs(place, args.kills, args.seed, loaders, args.objective)
    for problem in problems:
        print(problem, file=sys.stderr)
    lost = [kill.lost for kill in kills]
    figures = {
        "objective": args.objective,
        "kills": len(kills),
        "runs": number,
        "phases": dict(Counter(kill.phase for kill in kills)),
        "save_every": SAVE_EVERY,
        "lost_most": max(lost),
        "lost_mean": round(sum(lost) / len(lost), 2),
        "lost_more_than_save_every": sum(steps > SAVE_EVERY for steps in lost),
        "runs_not_as_promised": len(problems),
        "seconds": round(time.time() - begun),
    }
    sentence = (
        f"{len(kills)} kills, {_in_saves(kills)} of them in a save, of {number} runs: {number - len(problems)} of "
        f"{number} ended bit for bit as the unbroken one; at most {max(lost)} steps were lost, with a save every "
        f"{SAVE_EVERY}"
    )
    return common.end(sentence, not problems, **figures)


if __name__ == "__main__":
    sys.exit(main())
