"""Every file of a checkpoint damaged: is it found, or harmless, and does the run go on from an older one?

    python scripts/reliability/damage.py [--short] [--seed 0]

Trains a tiny run with two checkpoints once, by the train command. Then each file of the newer one is damaged in turn: a
bit flipped at several places, the end or one byte cut off, emptied, deleted. Each time both ways of reading are gone:
that of resume (all arrays, and what is in the way is moved aside) and that of evaluate, chat, export and init_from (the
model's arrays). Found means that the older checkpoint was taken, that a warning named the newer one, and that `--step`
with its number was refused; harmless, that the newer one was taken and its arrays hash as before. Anything else was
missed. The same again for a checkpoint without its lists of checksums, as a kill between writing and verifying leaves
it.

Then disks without room: files may not grow beyond a size, from none to that of the largest, while a checkpoint is
saved; and the train command as a process of its own whose second save meets such a disk, or a link to nowhere in the
place of its folder. Each must end with one sentence, and the checkpoint before it must be as it was. At last the train
command goes on from a damaged newest checkpoint, and must end bit for bit as the run did.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import runs

from elm_jax.errors import UserError
from elm_jax.models.encoders import merl
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.fingerprints import summaries
from elm_jax.run.weights import TrainedWeights
from elm_jax.training.loop import Trainer

STEPS, SAVE_EVERY, OLDER = 12, 3, 9
WAYS = ("resume", "read")


class Outcome(NamedTuple):
    """What became of one damage, read in one way: `found`, `harmless`, or what was wrong with the reading."""

    file: str
    damage: str
    way: str
    what: str


class Run(NamedTuple):
    """A run that has ended, its program, and the hash of what its two checkpoints hold, by way and step."""

    folder: Path
    trainer: Trainer
    hashes: Mapping[tuple[str, int], str]


def finished(folder: Path, trainer: Trainer) -> Run:
    """The run in `folder`, whose `trainer` has been built."""
    hashes = {(way, step): read(folder, trainer, way, str(step))[1] for way in WAYS for step in (OLDER, STEPS)}
    return Run(folder, trainer, hashes)


def read(folder: Path, trainer: Trainer, way: str, which: str = "latest") -> tuple[int, str]:
    """The step that is taken, and the hash of its arrays, as the commands read them."""
    checkpoints = Checkpoints(folder, read_only=way == "read")
    try:
        step = checkpoints.find(which)
        assert step is not None
        if way == "read":
            weights = TrainedWeights(folder, str(step), trainer.assembly, checkpoints=checkpoints)
            return step, _hash(dict(weights.arrays(sorted(weights.trained))))
        restored = jax.tree_util.tree_leaves_with_path(checkpoints.restore(step, trainer.program.state.items))
        return step, _hash({jax.tree_util.keystr(path): np.asarray(x) for path, x in restored})
    finally:
        checkpoints.close()


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(arrays[name].tobytes())
    return found.hexdigest()


def damages(content: bytes, places: int, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Names of damages, and what is left of the file; None: nothing."""
    size = len(content)
    for place in sorted({0, size // 2, size - 1, *(chance.randrange(size) for _ in range(places - 3))} if size else ()):
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        yield f"flip at {place}", bytes(flipped)
    if size > 1:
        yield "half cut off", content[: size // 2]
    if size:
        yield "a byte cut off", content[:-1]
        yield "emptied", b""
    yield "a byte too many", content + b"\0"
    yield "deleted", None


def sweep(run: Run, place: Path, places: int, seed: int, lists: bool = True, every: int = 1) -> Iterator[Outcome]:
    """Damage each `every`-th file of the newest checkpoint in each way; copies are made in `place`."""
    newest = run.folder / "checkpoints" / str(STEPS)
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    files = [file for file in files if lists or not file.name.startswith("checksums-")][::every]
    chance = random.Random(seed)
    for file in files:
        for damage, left in damages((newest / file).read_bytes(), places, chance):
            for way in WAYS:
                copy = place / "copy"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(run.folder / "checkpoints", copy / "checkpoints")
                if not lists:
                    for path in (copy / "checkpoints" / str(STEPS)).glob("checksums-*"):
                        path.unlink()
                target = copy / "checkpoints" / str(STEPS) / file
                target.unlink() if left is None else target.write_bytes(left)
                yield Outcome(str(file), damage, way, _judge(run, copy, way))


def _judge(run: Run, copy: Path, way: str) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            try:
                read(copy, run.trainer, "read", str(STEPS))
                refused = False
            except UserError:
                refused = True
            step, hashed = read(copy, run.trainer, way)
    except UserError as error:
        return f"missed: nothing was taken: {error}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    if hashed != run.hashes[way, step]:
        return f"missed: other arrays than those of step {step}"
    if step == STEPS:
        return "harmless"
    if f"checkpoint {STEPS} is damaged" not in said.getvalue():
        return "missed: not said"
    return "found" if refused or way == "resume" else "missed: --step was not refused"


# -- disks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disks(run: Run, place: Path, count: int) -> Iterator[tuple[int, str]]:
    """Room in bytes, and what is wrong (nothing: ""), of saves that do not fit."""
    items = run.trainer.state.items
    newest = run.folder / "checkpoints" / str(STEPS)
    largest = max(path.stat().st_size for path in newest.rglob("*") if path.is_file()) // 2
    for room in np.unique(np.geomspace(1, largest - 1, count).astype(int)) - 1:
        copy = place / f"room_for_{room}"  # its own: threads of a save that failed may still be at work in the last
        shutil.copytree(run.folder / "checkpoints", copy / "checkpoints")
        writer = Checkpoints(copy, 1)
        writer.find()
        problem = "no error"
        try:
            with no_file_beyond(int(room)):
                writer.save(STEPS + 1, items, {"frozen": {}})
                writer.wait()
        except UserError as error:
            problem = "" if f"step {STEPS} is whole" in str(error) else f"not said what is left: {error}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        writer.close()
        step, hashed = read(copy, run.trainer, "resume")
        if (step, hashed) != (STEPS, run.hashes["resume", STEPS]):
            problem = f"step {step} in place of {STEPS}"
        yield int(room), problem


_MEETS = """
import sys; sys.path[:0] = {paths!r}
import resource, runs
from elm_jax import cli, train
from elm_jax.models.encoders import merl
from elm_jax.run.checkpoint import Checkpoints
merl.LAYOUTS["tiny"] = (merl.basic, (1,))
save, saves = Checkpoints.save, []
def meets(self, step, *args):
    self.wait()
    saves.append(step)
    if len(saves) == 2:
        {does}
    return save(self, step, *args)
Checkpoints.save = meets
cli.run(train.main)
"""
MEETS = {
    "full disk": "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))",
    # Files and folders there Orbax takes away, as what a save that was killed has left.
    "link in the place of the folder": "(self.folder / f'{step}.orbax-checkpoint-tmp').symlink_to('nowhere')",
}


def command_meets(place: Path, what: str) -> str:
    """What is wrong with the train command when its second save meets this: nothing is ""."""
    folder = place / what.replace(" ", "_")
    code = _MEETS.format(does=MEETS[what], paths=[str(common.ROOT), str(common.ROOT / "tests")])
    command = [sys.executable, "-c", code, *runs.flags(folder, train__save_every=SAVE_EVERY, train__steps=STEPS)]
    process = runs.start_command(command, 1, {"ELM_JAX_CACHE": str(place / "cache")})
    try:
        _, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        return "it never ends"
    finally:
        process.kill()
    lines = [line for line in errors.splitlines() if line.startswith(("error:", "Traceback"))]
    if process.returncode != 2 or len(lines) != 1 or str(folder / "checkpoints") not in lines[0]:
        return f"status {process.returncode}: {errors[-2000:]}"
    return "" if common.newest(folder) == SAVE_EVERY else f"newest is {common.newest(folder)}"


def goes_on(run: Run, place: Path) -> str:
    """What is wrong when the train command starts on a damaged newest checkpoint: nothing is ""."""
    folder = place / "goes_on"
    shutil.copytree(run.folder, folder)
    (folder / "DONE").unlink()
    target = max((folder / "checkpoints" / str(STEPS) / "trained").rglob("*"), key=lambda path: path.stat().st_size)
    target.write_bytes(target.read_bytes()[:-1])
    errors = runs.train(folder)
    if f"step {OLDER} is taken" not in errors or not (folder / "damaged" / str(STEPS)).is_dir():
        return f"not said: {errors[-2000:]}"
    if runs.logged(folder) != runs.logged(run.folder):
        return "other values were logged"
    return "" if common.state_hash(folder) == common.state_hash(run.folder) else "it ends with other arrays"


def verification_costs(place: Path, megabytes: int) -> dict[str, float]:
    """Seconds of what saving a state of this size costs: until the loop goes on, of which so much for the sums on the
    devices; until it is on disk, and verified; of the processor, all threads, from disk to verified; and at the next
    start, until it is found to be whole."""
    rows = megabytes * 2**20 // (16 * 4096 * 4)
    items = {"trained": {f"w{i}": jax.random.normal(jax.random.key(i), (rows, 4096)) for i in range(16)}}
    seconds: dict[str, float] = {}
    for attempt in ("first", "second"):  # the first compiles
        folder = place / f"costs_{attempt}"
        begun = time.perf_counter()
        summaries(items["trained"])
        sums = time.perf_counter() - begun
        writer = Checkpoints(folder)
        on_disk, written = writer._library.wait_until_finished, []

        def wait(on_disk: Any = on_disk, written: list[tuple[float, float]] = written) -> None:
            on_disk()
            written.append((time.perf_counter(), time.process_time()))

        writer._library.wait_until_finished = wait  # type: ignore[method-assign]
        begun = time.perf_counter()
        writer.save(1, items, {})
        returned = time.perf_counter()
        writer.wait()
        seconds = {
            "save_returns": returned - begun, "sums": sums, "on_disk": written[-1][0] - begun,
            "verified": time.perf_counter() - begun, "processor": time.process_time() - written[-1][1],
        }  # fmt: skip
        writer.close()
        begun = time.perf_counter()
        reader = Checkpoints(folder)
        reader.find()
        seconds["found_again"] = time.perf_counter() - begun
        reader.close()
        shutil.rmtree(folder)
    return {name: round(value, 3) for name, value in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="each third file, three places, no commands")
    parser.add_argument("--seed", type=int, default=0, help="of the places where bits are flipped")
    parser.add_argument("--costs", type=int, metavar="MB", help="measure instead what verifying such a state takes")
    args = parser.parse_args(argv)
    merl.LAYOUTS["tiny"] = (merl.basic, (1,))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if args.costs:
            print(json.dumps({"megabytes": args.costs, "seconds": verification_costs(place, args.costs)}))
            return 0
        folder = place / "run"
        runs.train(folder)  # by the command, as `goes_on` will: in this process it would be compiled otherwise
        trainer = Trainer(runs.config(folder), folder)
        trainer._build()
        run = finished(folder, trainer)
        every, places = (3, 3) if args.short else (1, 6)
        figures: dict[str, Any] = {}
        outcomes: list[Outcome] = []
        for name, lists in (("verified", True), ("not_yet_verified", False)):
            mine = list(sweep(run, place, places, args.seed, lists, every))
            figures[name] = {way: dict(Counter(o.what.partition(":")[0] for o in mine if o.way == way)) for way in WAYS}
            outcomes += mine
            print(f"{name}: {figures[name]}", file=sys.stderr)
        disks = dict(full_disks(run, place, 4 if args.short else 16))
        problems = {f"{o.file}, {o.damage}, {o.way}": o.what for o in outcomes if o.what not in ("found", "harmless")}
        problems |= {f"room for {room} bytes": problem for room, problem in disks.items() if problem}
        if not args.short:
            commands = {what: command_meets(place, what) for what in MEETS} | {"goes on": goes_on(run, place)}
            figures["commands"] = len(commands)
            problems |= {what: problem for what, problem in commands.items() if problem}
    for what, problem in problems.items():
        print(f"{what}: {problem}", file=sys.stderr)
    files = len({outcome.file for outcome in outcomes})
    found, harmless = (sum(outcome.what == what for outcome in outcomes) for what in ("found", "harmless"))
    sentence = (
        f"{len(outcomes)} readings of a checkpoint with one of its {files} files damaged: {found} found, {harmless} "
        f"harmless by an equal hash, {len(outcomes) - found - harmless} missed; {len(disks)} saves on full disks, "
        f"{len(problems)} things not as promised"
    )
    return common.end(sentence, not problems, files=files, readings=len(outcomes), full_disks=len(disks), **figures)


if __name__ == "__main__":
    sys.exit(main())
