"""Give read_ecg and the tokenizer's loader damaged and hostile files: each must be read or refused with a UserError.

    python scripts/fuzz_files.py --minutes 30 --processes 2
    python scripts/fuzz_files.py --inputs 500 --target tokenizer --seed 7

Valid recordings (WFDB in several formats and layouts, .npy, pickled dictionaries) and ECG-Byte tokenizers are changed
at random: bits, lengths, slices, fields of headers, opcodes of pickles. An input is made of the seed and its number
alone. Workers are processes of their own, with a limit of memory and of seconds for each input, so that a crash, a hang
and a blow-up are seen; what led to one is kept in --keep, with what was said. Exit status 1 if anything was found.
"""

import argparse
import faulthandler
import io
import json
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from elm_jax.ecg.recording import LEADS, read_ecg
from elm_jax.errors import UserError
from elm_jax.symbols import files as symbolic_files
from elm_jax.symbols.coder import EcgByte

SECONDS = 20.0  # for one input; a machine may be busy
MEMORY = 3 << 30  # bytes of address space that an input may add to what a worker has at its start
CHUNK = 2000  # inputs of one worker
TARGETS = ("read_ecg", "tokenizer")
SAMPLES = 40
LONGEST = 2 << 20  # bytes of a file

Files = dict[str, bytes]  # a seed or an input: the first file is the one that is opened


def seeds(target: str) -> list[Files]:
    """Valid files."""
    return [*_npy(), *_wfdb()] if target == "read_ecg" else _tokenizers()


def _npy() -> list[Files]:
    signal = np.random.default_rng(0).normal(size=(12, SAMPLES))
    record = {"ecg": signal, "report": ["sinus rhythm"], "target_sf": 250, "leads": LEADS, "gain": np.float32(1)}
    objects = np.empty((), object)
    objects[()] = record | {"names": np.array(LEADS), "more": np.array([1, "a", None], object)}
    found = []
    for array in (signal, signal.astype("<f4"), np.asfortranarray(signal), (signal * 100).astype(">i2"), objects):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        found.append({"a.npy": file.getvalue()})
    header = found[-1]["a.npy"][: found[-1]["a.npy"].index(b"\n") + 1]
    return found + [{"a.npy": header + pickle.dumps(objects, protocol)} for protocol in (2, 3, 5)]


def _wfdb() -> list[Files]:
    values = np.random.default_rng(1).integers(-100, 100, (SAMPLES, 12))
    found = []
    for form in (16, 212, 80, 24, 32, 61, 160, 310, 311):
        lines = [f"a.dat {form} 1000/mV 12 0 {values[0, i]} 0 0 {lead}" for i, lead in enumerate(LEADS)]
        found.append({"a.hea": _header("a", 12, lines), "a.dat": _packed(values.ravel(), form)})
    lines = [f"a.dat 16x2+24 1000.5(-7)/uV 12 0 0 0 0 {lead}" for lead in LEADS]
    data = bytes(24) + np.repeat(values, 2).astype("<i2").tobytes()
    found.append({"a.hea": _header("a", 12, lines, "250/500(0) 40 10:00:00 01/02/2003"), "a.dat": data})
    parts = {}
    for name in ("p1", "p2"):
        lines = [f"{name}.dat 16 1000/mV 12 0 {values[0, i]} 0 0 {lead}" for i, lead in enumerate(LEADS)]
        parts |= {f"{name}.hea": _header(name, 12, lines), f"{name}.dat": _packed(values.ravel(), 16)}
    master = f"a/2 12 500 {2 * SAMPLES}\np1 {SAMPLES}\np2 {SAMPLES}\n".encode()
    found.append({"a.hea": master, **parts})
    layout = _header("lay", 12, [f"~ 0 1000/mV 12 0 0 0 0 {lead}" for lead in LEADS], "500 0")
    master = f"a/3 12 500 {2 * SAMPLES}\nlay 0\np1 {SAMPLES}\np2 {SAMPLES}\n".encode()
    found.append({"a.hea": master, "lay.hea": layout, **parts})
    return found


def _header(name: str, count: int, lines: list[str], rest: str = f"500 {SAMPLES}") -> bytes:
    return "\n".join([f"{name} {count} {rest}", *lines, "# a comment", ""]).encode()


def _packed(values: np.ndarray, form: int) -> bytes:
    if form in (16, 61, 160):
        return (values + (32768 if form == 160 else 0)).astype({16: "<i2", 61: ">i2", 160: "<u2"}[form]).tobytes()
    if form in (24, 32):
        whole = values.astype("<i4").view(np.uint8).reshape(-1, 4)
        return whole[:, : form // 8].tobytes()
    if form == 80:
        return (values + 128).astype(np.uint8).tobytes()
    if form == 212:
        a, b = (values[i::2] & 0xFFF for i in (0, 1))
        return np.stack([a & 0xFF, a >> 8 | b >> 4 & 0xF0, b & 0xFF], 1).astype(np.uint8).tobytes()
    return (values & 0x3FF).astype("<i4").tobytes()  # three of ten bits in four bytes: what they are does not matter


def _tokenizers() -> list[Files]:
    tokenizer = EcgByte([b"aa", b"ab", b"aab", b"\xff\x00"], settings={"seed": 0})
    order = [256, *range(256), 257, 258, 259]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.json", "a.pkl"):
            tokenizer.save(Path(folder, name))
            found.append({name: Path(folder, name).read_bytes()})
    merges = [(list(merge), 256 + i) for i, merge in enumerate(tokenizer.merges)]
    contents = ({i: str(i) for i in order}, merges)
    return found + [{"a.pkl": pickle.dumps(contents, protocol)} for protocol in (2, 3, 4, 5)]


# ---- what is done to them

NUMBERS = (
    *("0", "-1", "1", "2", "255", "65536", "2147483648", "-2147483649", "99999999999999999999", "1e-9", "1e400", "nan"),
    *("inf", "0x10", "9" * 5000, "1.5", "", "~", "16x9", "212:999", "1/0", "0/mV", "1(99)/uV", "None", "\u0663"),
)
WORDS = (
    *(b"numpy", b"dtype", b"O8", b"f8", b"U9", b"\xff" * 8, b"\x7f\xff\xff\xff", bytes(8), b"c__main__\nx\n"),
    *(b"h\x00", b"h\x05", b"\x8a\xff", b"B\xff\xff\xff\x7f", b"\x85", b"\x93", b"\x94"),
    *(bytes([code]) for code in b"(tRb]}eusa"),
)


def changed(rng: random.Random, files: Files, others: list[Files]) -> Files:
    """An input: a seed with one to six changes, mostly to one of its files."""
    files = dict(files)
    name = rng.choice(list(files))
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        if rng.random() < 0.1:
            name = rng.choice(list(files))
        ways = _TEXT_WAYS if name.endswith((".hea", ".json")) and rng.random() < 0.7 else _WAYS
        way = rng.choice(ways)
        files[name] = way(rng, files[name]) if way is not _spliced else _spliced(rng, files[name], rng.choice(others))
        files[name] = files[name][:LONGEST]
    if rng.random() < 0.03 and len(files) > 1:
        del files[rng.choice(list(files)[1:])]
    if name == "a.json" and rng.random() < 0.7:
        files[name] = _signed(files[name])
    return files


def _flipped(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16)) if found else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _overwritten(rng: random.Random, data: bytes) -> bytes:
    at, put = _place(rng, data), rng.choice(WORDS) if rng.random() < 0.5 else bytes([rng.randrange(256)])
    return data[:at] + put + data[at + len(put) :]


def _put_in(rng: random.Random, data: bytes) -> bytes:
    at, times = _place(rng, data), rng.choice((1, 1, 1, 2, 5000))
    return data[:at] + (rng.choice(WORDS) if rng.random() < 0.6 else bytes([rng.randrange(256)])) * times + data[at:]


def _cut(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] if rng.random() < 0.5 else data[:at] + data[at + rng.choice((1, 2, 4, 40)) :]


def _moved(rng: random.Random, data: bytes) -> bytes:
    at, to, size = _place(rng, data), _place(rng, data), rng.choice((1, 4, 16, 100))
    return data[:to] + data[at : at + size] * rng.choice((1, 1, 2, 50)) + data[to:]


def _spliced(rng: random.Random, data: bytes, other: Files) -> bytes:
    behind = rng.choice(list(other.values()))
    return data[: _place(rng, data)] + behind[_place(rng, behind) :]


def _number(rng: random.Random, data: bytes) -> bytes:
    """Another number in place of one, or of one's part."""
    words = data.split(b" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice(NUMBERS).encode() if rng.random() < 0.5 else _overwritten(rng, words[at])
    return b" ".join(words)


def _lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    if rng.random() < 0.3:
        del lines[at]
    elif rng.random() < 0.5:
        lines[at], lines[to] = lines[to], lines[at]
    else:
        lines[at:at] = [lines[to]] * rng.choice((1, 2, 300))
    return b"\n".join(lines)


def _deep(rng: random.Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.choice((b"[", b'{"a":', b'"\\ud800"', b"9" * 5000)) * rng.choice((1, 3000)) + data[at:]


_WAYS: tuple[Callable[..., bytes], ...] = (_flipped, _overwritten, _put_in, _cut, _moved, _spliced)
_TEXT_WAYS: tuple[Callable[..., bytes], ...] = (_number, _number, _number, _lines, _deep, _cut, _overwritten)


def _place(rng: random.Random, data: bytes) -> int:
    """Mostly near the beginning, where headers and opcodes are."""
    return rng.randrange(min(len(data), rng.choice((64, 400, 1 << 30))) + 1)


def _signed(data: bytes) -> bytes:
    """JSON of ours with the checksum that fits, where it is JSON still."""
    try:
        contents = json.loads(data)
        contents.pop("sha256", None)
        return json.dumps({**contents, "sha256": symbolic_files.checksum(contents)}).encode()
    except (ValueError, AttributeError, RecursionError):
        return data


# ---- trying them


def made(seed: int, number: int, target: str) -> Files:
    """Input `number` of a seed."""
    rng = random.Random(f"{seed}:{number}:{target}")
    known = _KNOWN.setdefault(target, seeds(target))
    return changed(rng, rng.choice(known), known)


_KNOWN: dict[str, list[Files]] = {}


def tried(target: str, files: Files, folder: Path) -> str:
    """`read` or `refused`. What else is raised is a finding."""
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    path = folder / next(iter(files))
    try:
        if target == "tokenizer":
            tokenizer = EcgByte.load(path)
            assert len(tokenizer) == 256 + len(tokenizer.merges)
        else:
            found = read_ecg(path)
            assert found.signal.shape[0] == 12 and np.isfinite(found.signal).all() and found.sampling_rate > 0
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 20_000, f"an error that cannot be shown: {error!r}"
        return "refused"
    return "read"


def work(target: str, seed: int, first: int, count: int) -> None:
    """A worker: inputs one after the other; a line of JSON before each, and for each finding."""
    warnings.simplefilter("ignore")
    made(seed, first, target)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for files in _KNOWN[target]:  # this imports what readers import late; each must be read as it is
            assert tried(target, files, folder) == "read", f"a seed is refused: {list(files)}"
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        counts: Counter[str] = Counter()
        for number in range(first, first + count):
            print(json.dumps({"at": number}), flush=True)
            files = made(seed, number, target)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                counts[tried(target, files, folder)] += 1
            except BaseException:
                counts["found"] += 1
                print(json.dumps({"found": number, "said": traceback.format_exc()[-3000:]}), flush=True)
            faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"counts": counts}), flush=True)


def run_worker(target: str, seed: int, first: int, count: int, keep: Path) -> tuple[int, Counter[str]]:
    """Run inputs `first` and on in a process: how many were tried, and how they ended."""
    command = [sys.executable, "-X", "faulthandler", __file__, "--worker", target, str(seed), str(first), str(count)]
    counts: Counter[str] = Counter()
    at = first - 1
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            at = said.get("at", at)
            counts.update(said.get("counts", {}))
            if "found" in said:
                keep_input(keep, target, seed, at, said["said"])
        if process.wait():
            errors.seek(0)
            text = f"the worker ended with status {process.returncode}\n{errors.read()[-3000:]}"
            if at < first:
                raise RuntimeError(text)
            counts.update({"found": 1, "lost with it": at - first})
            keep_input(keep, target, seed, at, text)
    return at + 1 - first, counts


def keep_input(keep: Path, target: str, seed: int, number: int, said: str) -> None:
    """Leave an input and what was said of it in a folder."""
    folder = keep / f"{target}-{seed}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in made(seed, number, target).items():
        (folder / name).write_bytes(data)
    (folder / "said.txt").write_text(said)
    print(f"found: {folder}: {said.strip().splitlines()[-1][:200]}", flush=True)


def fuzz(targets: list[str], seed: int, keep: Path, inputs: int | None, minutes: float) -> Counter[str]:
    """Try inputs of each target in turn, so many or for so long."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    nexts = dict.fromkeys(targets, 0)
    while any(inputs is None or n < inputs for n in nexts.values()) and (inputs is not None or time.monotonic() < end):
        for target in targets:
            count = min(CHUNK, (inputs - nexts[target]) if inputs is not None else CHUNK)
            if count > 0:
                tried_now, ended = run_worker(target, seed, nexts[target], count, keep)
                nexts[target] += tried_now
                counts.update(ended)
                counts[target] += tried_now
        if inputs is None:
            print(json.dumps({"seed": seed, **counts}), flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, help="so many of each target, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="at once; each has a seed of its own")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_found"), help="a folder for inputs that were found")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], *map(int, args.worker[1:]))
        return 0
    targets: list[str] = list(TARGETS) if args.target == "all" else [args.target]
    total: Counter[str] = Counter()

    def one(seed: int) -> None:
        total.update(fuzz(targets, seed, args.keep, args.inputs, args.minutes))

    threads = [threading.Thread(target=one, args=(args.seed + i,)) for i in range(args.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(total))
    return 1 if total["found"] or not total else 0


if __name__ == "__main__":
    sys.exit(main())
