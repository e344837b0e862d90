"""SIGKILL at random moments: does the run, started again each time, end as the run that nobody stopped?

    python scripts/reliability/kills.py [--objective sft] [--kills 100] [--workers 0,2] [--wait] [--seed 0]
                                        [--out FOLDER]
    python scripts/reliability/kills.py --objective all --kills 5

Tiny runs on a CPU, with packing, in turn without and with worker processes (of a policy, which draws its answers
itself, without). Each is killed several times and started again at once by the same command; then it goes on to its
end. Half of the kills hit a save, or the script fails (of all kinds together it only says so): between the first file
of a checkpoint and the moment from which it counts. They are timed by the folders that appear. The others come at any
time from start-up (the imports are done) to the end.

At the end all must be equal, bit by bit: the arrays of the last checkpoint, the optimizer's too; what was logged of
each step; the samples of each step, in every attempt that took it; and the tables of answers. And a kill may cost no
more than the steps since a save was last due; where that one was still being written, those since the one before it.
With `--wait` (`train.save_wait`) it may never cost more than those between two saves.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
import runs

STEPS, SAVE_EVERY = 36, 6
WORKERS = (0, 2)
POLL = 0.002  # seconds
REWARD = """import elm_jax

elm_jax.register_reward("of_length", lambda answered: len(answered.answer) % 5)
"""  # which an untrained model has, too


def alone(name: str, sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of an encoder that learns by itself; without validations, which would draw pictures."""
    return {"encoder__name": name, "encoder__config": sizes, "update": "encoder", "data__val_fraction": 0.0, **more}


def published(folder: str) -> dict[str, Any]:
    """Of an encoder that begins with a pair of towers."""
    return {"ssl__text": folder, "encoder__checkpoint": folder, "data__max_len": 16}


ANSWERED = {
    "data__max_len": 256, "rl__answers": 3, "rl__max_new_tokens": 4, "rl__rewards": ["of_length"], "rl__kl": 0.1,
    "rl__show_every": 6, "train__eval_every": 12,
}  # fmt: skip
MASKED = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1,
          "decoder_num_heads": 1}  # fmt: skip
BLOCKS = {"d_model": 16, "n_heads": 2, "dim_ff": 32, "num_layers": 1}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
          "image_size": 32, "patch_size": 8}  # fmt: skip
COCA = {"width": 32, "layers": 1, "heads": 2, "embed_dim": 16, "decoder_layers": 1, "decoder_heads": 2}
SHORT = {"data__segment_len": 100, "data__sampling_rate": 10}
SYMBOLIC = {"data__representation": "symbolic", "data__ecg_tokenizer": "PLACE/ecg_byte.json",
            "data__leads": ["II", "V1"], **SHORT}  # fmt: skip
REPORTS = {"ssl__text": "PLACE/bert", "data__max_len": 16}
# What a run of each has beside the usual; PLACE/NAME is made as `MADE` says.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "pretrain": {},
    "sapo": ANSWERED,
    "grpo": ANSWERED,
    "dapo": {**ANSWERED, "rl__resample": 2},
    "dpo": {"data__max_len": 256, "data__names": ["PLACE/pairs.jsonl"]},
    "st_mem": alone("st_mem", MASKED, data__val_fraction=0.02, optim__ema=0.9),
    "mtae": alone("mtae", MASKED),
    "mlae": alone("mlae", MASKED),
    "mae_vit": alone("mae_vit", {**BLOCKS, "num_decoder_layers": 1}),
    "nepa": alone("nepa", BLOCKS, **SHORT),
    "merl": alone("merl", {**runs.TINY["encoder.config"], "proj_hidden": 16, "proj_out": 16}, **REPORTS),
    "next_token": alone("next_token", {**BLOCKS, "max_seq_len": 320, "lead_tokens": True}, **SYMBOLIC),
    "signal2vec": alone("signal2vec", {"dim": 16, "max_seq_len": 320}, **SYMBOLIC),
    "clip": alone("clip", {}, **published("PLACE/clip"), data__representation="stacked_signal"),
    "siglip": alone("siglip_ecg", {"patch_size": 25}, **published("PLACE/siglip2")),
    "coca": alone("ecg_coca", COCA, **REPORTS, data__normalize="none"),
    "vit": alone("vit", IMAGES, data__representation="stacked_signal"),
    "dit": alone("dit", {**BLOCKS, "num_steps": 4}, **SHORT, optim__ema=0.9),
}  # fmt: skip


def pairs(path: Path) -> None:
    """Questions about noise, of which the longer answer is preferred."""
    rows = [
        {"ecg_path": "noise", "patient_id": i, "prompt": f"How fast is number {i}?", "chosen": f"It is {i}.",
         "rejected": "No."} for i in range(64)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def letters(path: Path) -> None:
    """A symbolic tokenizer."""
    from elm_jax.symbols.coder import EcgByte

    EcgByte([bytes([letter]) * 2 for letter in b"abcdefghijklmnopqrstuvwxyz"]).save(path)


def tower(path: Path) -> None:
    """A text tower, alone or with that of images, of this name."""
    import towers

    if path.name == "bert":
        towers.bert_folder(path)
    else:
        towers.pair_folder(path, path.name)


MADE: dict[str, Callable[[Path], Any]] = {
    "pairs.jsonl": pairs, "ecg_byte.json": letters, "bert": tower, "clip": tower, "siglip2": tower,
    "reward.py": lambda path: path.write_text(REWARD),
}  # fmt: skip


class Usual(NamedTuple):
    """Seconds that things take when nobody kills: until the first step, all, and a save."""

    start: float
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

    def good(self, waits: bool) -> bool:
        """Whether no more was lost than a kill may cost, where each save is waited for or not."""
        if waits:
            return self.lost <= SAVE_EVERY
        return self.kept >= self.due - (SAVE_EVERY if self.phase == "saving" else 0) and self.lost <= 2 * SAVE_EVERY


class Run:
    """One run, in as many processes as it takes."""

    def __init__(self, folder: Path, workers: int, objective: str = "sft", waits: bool = False) -> None:
        self.folder, self.workers, self.objective, self.waits = folder, workers, objective, waits
        self.samples = folder.with_suffix(".samples")
        self.kept = 0  # step of the newest checkpoint that counts

    def start(self) -> subprocess.Popen[str]:
        """Start it, or start it again: by the same command."""
        place, told = self.folder.parent, json.dumps(OBJECTIVES[self.objective])
        for name, make in MADE.items():
            if not (place / name).exists() and (f"PLACE/{name}" in told or name == "reward.py"):
                make(place / name)
        usual = {"train__steps": STEPS, "train__save_every": SAVE_EVERY, "train__save_wait": self.waits}
        changes = {**usual, "data__workers": self.workers, **json.loads(told.replace("PLACE", str(place)))}
        own = {"env": {"TEST_SAMPLES": str(self.samples)}, "more": ("--register", str(place / "reward.py"))}
        return runs.start(self.folder, **own, objective=self.objective, **changes)

    def unbroken(self) -> Usual:
        """Let it go from start to end."""
        process, begun, start = self.start(), time.time(), 0.0
        seen: dict[int, list[float]] = {}  # of each save when it was seen
        while process.poll() is None:
            for step in self.unfinished(begun):
                seen.setdefault(step, []).append(time.time())
            start = start or (time.time() - begun if self.done() else 0.0)
            time.sleep(POLL)
        runs.finish(process)
        skipped = [line["step"] for line in self._lines() if line.get("event") == "non_finite"]
        assert not skipped, f"{self.folder}: steps {skipped} were not finite"
        return Usual(start, time.time() - begun, median(times[-1] - times[0] for times in seen.values()))

    def kill(self, in_save: bool, chance: random.Random, usual: Usual) -> Kill | None:
        """Start it and kill it, in a save or at any time; None where it came to its end before."""
        starts, process, begun = len(self.starts()), self.start(), time.time()
        left = (STEPS - self.kept) / STEPS
        moment = begun + chance.uniform(0, usual.start + left * (usual.run - usual.start))
        if in_save:
            # The first that it begins, or the second.
            save, seen = chance.choice((1, 1, 2)) if self.kept < STEPS - SAVE_EVERY else 1, set[int]()
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
            "answers": {path.name: path.read_text() for path in (self.folder / "rollouts").glob("*.md")},
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
        return max((line["step"] for line in self._lines() if "loss" in line and "event" not in line), default=0)

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
    place: Path, count: int, seed: int, loaders: Sequence[int] = WORKERS, objective: str = "sft", waits: bool = False
) -> tuple[list[Kill], int, list[str]]:
    """Kill runs in `place` at least `count` times, with so many workers in turn; up to three times as often until half
    of `count` have hit a save.

    Returns the kills, the number of runs, and what was not as promised.
    """
    chance = random.Random(seed)
    whole = [Run(place / f"unbroken_{workers}", workers, objective, waits) for workers in loaders]
    usual = {run.workers: run.unbroken() for run in whole}
    expected = whole[0].end()
    problems = [f"{run.folder}: not as {whole[0].folder}" for run in whole if run.end() != expected]
    kills: list[Kill] = []
    number = 0
    while number < 3 * count and (len(kills) < count or 2 * _in_saves(kills) < count and len(kills) < 3 * count):
        run = Run(place / f"killed_{number}", loaders[number % len(loaders)], objective, waits)
        number += 1
        try:
            for _ in range(min(chance.randint(min(5, count), 12), max(1, count - len(kills)))):
                kept, starts = run.kept, len(run.starts())
                kill = run.kill(2 * _in_saves(kills) <= len(kills), chance, usual[run.workers])
                assert run.starts()[starts:] in ([], [kept]), f"{run.starts()}: went on from another step than {kept}"
                if kill is None:  # the machine has become faster
                    usual[run.workers] = Usual(*(0.8 * seconds for seconds in usual[run.workers]))
                    break
                kills.append(kill)
                assert kill.good(waits), f"too much is lost: {kill}"
            runs.finish(run.start())
            ended = run.end()
            differs = [name for name in expected if ended[name] != expected[name]]
            assert not differs, f"not as the unbroken run: {differs}"
        except AssertionError as error:
            problems.append(f"{run.folder}: {error}")
            continue
        shutil.rmtree(run.folder)
        lost = max((kill.lost for kill in kills), default=0)
        told = f"{objective}: {number} runs, {len(problems)} bad; {len(kills)} kills, {_in_saves(kills)} in saves"
        print(f"{told}, {lost} steps lost at most", file=sys.stderr, flush=True)
    if len(kills) < count:
        problems.append(f"{objective}: {len(kills)} kills in {number} runs, which came to their end before")
    return kills, number, problems


def _in_saves(kills: list[Kill]) -> int:
    return sum(kill.phase == "saving" for kill in kills)


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objective", choices=[*OBJECTIVES, "all"], default="sft", help="what the runs learn")
    parser.add_argument("--kills", type=int, default=100, help="of each at least so many, and half of these in saves")
    parser.add_argument("--workers", default="0,2", help="of the runs in turn (of all kinds: of each one); policies: 0")
    parser.add_argument("--wait", action="store_true", help="with train.save_wait")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder for the runs; those that fail stay (default: temporary)")
    args = parser.parse_args(argv)
    if args.out:
        args.out.mkdir(parents=True)
    begun = time.time()
    kills: list[Kill] = []
    of_each: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for turn, name in enumerate(OBJECTIVES if args.objective == "all" else [args.objective]):
            place = (args.out or Path(temporary)) / name
            place.mkdir()
            loaders = [*map(int, args.workers.split(","))]
            if ANSWERED.items() <= OBJECTIVES[name].items():
                loaders = [0]
            elif args.objective == "all":
                loaders = [loaders[turn % len(loaders)]]
            found, number, wrong = killed_runs(place, args.kills, args.seed + turn, loaders, name, args.wait)
            if 2 * _in_saves(found) < args.kills:
                few = f"{name}: {_in_saves(found)} of {len(found)} kills in saves; half of {args.kills} were to be"
                if args.objective == "all":
                    print(few, file=sys.stderr)
                else:
                    wrong.append(few)
            of_each[name] = {
                "kills": len(found), "in_saves": _in_saves(found), "runs": number, "not_as_promised": len(wrong),
                "lost_most": max((kill.lost for kill in found), default=0),
            }  # fmt: skip
            kills, problems = [*kills, *found], [*problems, *wrong]
    for problem in problems:
        print(problem, file=sys.stderr)
    lost, number = [kill.lost for kill in kills] or [0], sum(each["runs"] for each in of_each.values())
    figures = {
        "objectives": of_each,
        "waits": args.wait,
        "kills": len(kills),
        "runs": number,
        "phases": dict(Counter(kill.phase for kill in kills)),
        "save_every": SAVE_EVERY,
        "lost_most": max(lost),
        "lost_mean": round(sum(lost) / len(lost), 2),
        "lost_more_than_save_every": sum(steps > SAVE_EVERY for steps in lost),
        "not_as_promised": len(problems),
        "seconds": round(time.time() - begun),
    }
    sentence = (
        f"{len(kills)} kills, {_in_saves(kills)} of them in a save, of {number} runs of {len(of_each)} kinds: "
        f"{len(problems)} things not as promised; at most {max(lost)} steps were lost, with a save every {SAVE_EVERY}"
    )
    return common.end(sentence, not problems, **figures)


if __name__ == "__main__":
    sys.exit(main())
