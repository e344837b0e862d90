"""Give everything that reads a file or a command line damaged and hostile inputs: each must be read or refused.

    python -m scripts.fuzz --inputs 1000000
    python -m scripts.fuzz --minutes 30 --processes 2 --target npy --target wfdb
    python -m scripts.fuzz --target render --seed 0 --only 4711

Valid inputs are changed at random; an input is made of the seed, the target and its number alone. Workers are
processes of their own, so that a crash is seen, and watch each input: a second of processor time, a gigabyte of memory,
no code run, no module imported, nothing fetched, no file touched but its own. What did more, or raised what is no clear
refusal, is kept in --keep with what was said. Prints a line of JSON of each target. Exit status 1 if anything was
found.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from scripts.fuzz.targets import TARGETS, made, place
from scripts.fuzz.worker import TMPFS, work

CHUNK = 5000  # inputs of one worker
ROOT = Path(__file__).resolve().parents[2]


def run_worker(target: str, seed: int, first: int, count: int, keep: Path) -> tuple[int, Counter[str]]:
    """Run inputs `first` and on in a process: how many were tried, and how they ended."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory(dir=TMPFS, prefix="fuzz-") as folder:
        progress = Path(folder, "progress")
        progress.write_bytes(b"\xff" * 8)  # the number of the input that is tried
        command = [sys.executable, "-X", "faulthandler", "-m", "scripts.fuzz", "--worker", target]
        command += [str(seed), str(first), str(count), str(progress)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            counts.update(said.get("counts", {}))
            counts["peak"] = max(counts["peak"], said.get("peak", 0))
            if "found" in said:
                keep_input(keep, target, seed, said["found"], said["said"])
        if not process.wait():
            return count, counts
        at = int.from_bytes(progress.read_bytes(), "little")
        errors.seek(0)
        text = f"the worker ended with status {process.returncode}\n{errors.read()[-3000:]}"
    if not first <= at < first + count:
        raise RuntimeError(text)
    counts.update({"found": 1, "lost with it": at - first})
    keep_input(keep, target, seed, at, text)
    return at + 1 - first, counts


def keep_input(keep: Path, target: str, seed: int, number: int, said: str) -> None:
    """Leave an input and what was said of it in a folder."""
    folder = keep / f"{target}-{seed}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    place(made(seed, number, target), folder)
    (folder / "said.txt").write_text(said)
    print(f"found: {folder}: {said.strip().splitlines()[-1][:200]}", flush=True)


def fuzz(target: str, seed: int, keep: Path, inputs: int | None, minutes: float) -> Counter[str]:
    """Try so many inputs of a target, or for so long."""
    counts: Counter[str] = Counter()
    begun = time.monotonic()
    while counts["inputs"] < inputs if inputs is not None else time.monotonic() < begun + 60 * minutes:
        count = min(CHUNK, inputs - counts["inputs"]) if inputs is not None else CHUNK
        tried, ended = run_worker(target, seed, counts["inputs"], count, keep)
        peak = max(counts["peak"], ended.pop("peak", 0))
        counts.update({"inputs": tried, **ended})
        counts["peak"] = peak
    counts["seconds"] = round(time.monotonic() - begun)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="one of them, repeated; default: all")
    parser.add_argument("--inputs", type=int, help="in all, divided by what targets cost; default: by the clock")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each target, where --inputs is not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="at once; each has a seed of its own")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_found"), help="a folder for inputs that were found")
    parser.add_argument("--only", type=int, help="try this input of the one target alone, and show its traceback")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, *numbers, progress = args.worker
        work(name, *map(int, numbers), Path(progress))
        return 0
    names = args.target or [name for name, target in TARGETS.items() if target.seeds]
    if args.only is not None:
        _, ended = run_worker(names[0], args.seed, args.only, 1, args.keep)
        print(json.dumps(ended))
        return int(ended["found"] > 0)
    whole = sum(TARGETS[name].share for name in names)
    total: Counter[str] = Counter()

    def one(seed: int) -> None:
        for name in names:
            share = None if args.inputs is None else -(-args.inputs * TARGETS[name].share // (whole * args.processes))
            counts = fuzz(name, seed, args.keep, share, args.minutes)
            print(json.dumps({"target": name, "seed": seed, **counts}), flush=True)
            total.update({key: counts[key] for key in ("inputs", "read", "refused", "found", "seconds")})

    threads = [threading.Thread(target=one, args=(args.seed + i,)) for i in range(args.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(total))
    return 1 if total["found"] or not total["inputs"] else 0


if __name__ == "__main__":
    sys.exit(main())
