"""Make inputs small, and choose few that show all refusals: what lies in tests/data/fuzz.

    python -m scripts.fuzz.corpus --target npy --inputs 3000 --out tests/data/fuzz
    python -m scripts.fuzz.corpus --found fuzz_found/npy-0-17 --name too_long --out tests/data/fuzz

The first tries inputs and keeps of each line of the package that refuses the smallest one, made smaller as long as the
same line refuses it. The second makes a finding smaller, as long as it ends the same way.
"""

import argparse
import itertools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from scripts.fuzz.changes import Files
from scripts.fuzz.targets import TARGETS, made, place
from scripts.fuzz.worker import try_one

PACKAGE = "/elm_jax/"
TRIES = 400  # of making one input smaller


def how_it_ended(target: str, files: Files, base: Path) -> str:
    """`read`, or who refused it: exception, file and line of the package."""
    chosen = TARGETS[target]
    raised: list[str] = []

    def read(at: object) -> object:
        try:
            return chosen.read(at)
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if PACKAGE in f.filename]
            places = (f"{Path(f.filename).stem}.{f.name}:{f.lineno}" for f in reversed(frames) if f.name not in HELPERS)
            raised.append(f"{type(error).__name__} {next(places, '')}")
            raise

    watched = type(chosen)(chosen.valid, read, 0, chosen.in_memory, refusals=(Exception,))
    return raised[0] if try_one(watched, files, base) == "refused" else "read"


HELPERS = ("refused", "_refuse", "_fail", "__init__", "error")  # which raise for their callers


def smaller(files: Files, ends_so: Callable[[Files], bool]) -> Files:
    """The files with as many pieces left out as may be, largest pieces first."""
    tries = itertools.count()
    for name in list(files):
        rest = {other: data for other, data in files.items() if other != name}
        if name != next(iter(files)) and ends_so(rest):
            files = rest
            continue
        size = len(files[name]) // 2
        while size and next(tries) < TRIES:
            at = 0
            while at < len(files[name]) and next(tries) < TRIES:
                shorter = {**files, name: files[name][:at] + files[name][at + size :]}
                if ends_so(shorter):
                    files = shorter
                else:
                    at += size
            size //= 2
    return files


def covering(target: str, seed: int, inputs: int, base: Path) -> dict[str, Files]:
    """Of each refusal an input."""
    known: dict[str, Files] = {}
    for number in range(inputs):
        files = made(seed, number, target)
        end = how_it_ended(target, files, base)
        if end != "read" and (end not in known or _size(files) < _size(known[end])):
            known[end] = files
    return {
        end: smaller(files, lambda some, end=end: how_it_ended(target, some, base) == end)
        for end, files in known.items()
    }


def _size(files: Files) -> int:
    return sum(map(len, files.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, help="folder of a finding")
    parser.add_argument("--name", help="what to call it")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.stdout.flush()
    shown = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        if args.found:
            target = args.found.name.split("-")[0]
            files = made(*map(int, args.found.name.split("-")[1:]), target)
            end = how_it_ended(target, files, base)
            files = smaller(files, lambda some: how_it_ended(target, some, base) == end)
            place(files, _made(args.out / target / args.name))
            return
        for target in args.target or TARGETS:
            for number, (end, files) in enumerate(sorted(covering(target, args.seed, args.inputs, base).items())):
                place(files, _made(args.out / target / f"refused_{number:02}"))
                os.write(shown, f"{target} {number}: {end}, {_size(files)} bytes\n".encode())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
