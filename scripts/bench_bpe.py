"""The ECG-Byte tokenizer against the algorithm of the PyTorch framework, in one run; prints docs/benchmarks.md's table.

    python scripts/bench_bpe.py --recordings FOLDER [--tokenizer FILE]

FOLDER holds WFDB records (PTB-XL: records500); FILE is an ECG-Byte tokenizer (.pkl or .json; default: one trained
here). Needs cargo: the other algorithm is the crate in scripts/bench_bpe. Both sides get the same float32 arrays of
12 x 2500 samples and normalise and quantise them; all ids and merges are compared. Wall-clock times, the least of
several repetitions: run it on an idle machine.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from elm_jax.config import DataConfig
from elm_jax.data.ecg_tokens import EcgTokens
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.recording import read_ecg, to_segment
from elm_jax.symbols.coder import EcgByte

RATE, SAMPLES, BATCH, THREADS, MERGES, TRAINED_ON, COPIES = 250.0, 2500, 256, 2, 1000, 200, 10
CRATE = Path(__file__).with_suffix("")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of WFDB records with 12 leads")
    parser.add_argument("--tokenizer", type=Path, help="default: 1000 merges learnt from the recordings")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--skip-training", action="store_true", help="only encoding: training takes the other minutes")
    args = parser.parse_args()
    other = OtherAlgorithm()
    ecgs = _recordings(args.recordings)
    records = [EcgByte([]).to_symbols(ecg) for ecg in ecgs]
    coder = EcgByte.load(args.tokenizer) if args.tokenizer else EcgByte.train(records, MERGES)
    print(f"{machine('numpy')}; {len(ecgs)} recordings, {len(coder.merges)} merges\n")
    print("| what | other algorithm | ours | times faster |\n|---|---|---|---|")
    _encoding(other, coder, ecgs, args.repeat)
    _feeding(coder, ecgs[:100], args.repeat)
    if not args.skip_training:
        _training(other, records)


def _encoding(other: "OtherAlgorithm", coder: EcgByte, ecgs: np.ndarray, repeat: int) -> None:
    merges = other.merges(coder)
    for ecg in ecgs:
        np.testing.assert_array_equal(other.encode(merges, ecg), coder.encode(ecg))
    few = ecgs[:: max(1, len(ecgs) // 25)]
    theirs = np.mean([_least(lambda ecg=ecg: other.encode(merges, ecg), max(3, repeat // 4)) for ecg in few])
    ours = np.mean([_least(lambda ecg=ecg: coder.encode(ecg), repeat) for ecg in few])
    _row(f"encode one ECG (mean of {len(few)}), 1 thread", theirs, ours, "µs", 1e6)
    batch = np.resize(ecgs, (BATCH, *ecgs.shape[1:]))
    mean = np.mean([_least(lambda ecg=ecg: other.encode(merges, ecg), 1) for ecg in ecgs])
    ours = _least(lambda: coder.encode(batch, threads=THREADS), repeat)
    _row(f"encode {BATCH} ECGs, {THREADS} threads (other: 1)", mean * BATCH, ours, "ms", 1e3)
    ours = np.mean([_least(lambda ecg=ecg: coder.encode(ecg, "merges"), max(3, repeat // 4)) for ecg in few])
    print(f"| encode one ECG in merge order, 1 thread | - | {ours * 1e6:.0f} µs | - |")
    symbols = ecgs[0].size * len(few)
    for method in ("longest", "merges"):
        tokens = sum(len(coder.encode(ecg, method)) for ecg in few)
        print(f"| symbols per token, {method} | - | {symbols / tokens:.2f} | - |")


def _feeding(coder: EcgByte, ecgs: np.ndarray, repeat: int) -> None:
    """From a prepared file to the language model's tokens, as the loader does it."""
    tokens = EcgTokens(coder, np.arange(len(coder), dtype=np.int32), least=512)
    with tempfile.TemporaryDirectory() as root:
        for i, ecg in enumerate(ecgs):
            np.save(Path(root, f"{i}.npy"), ecg)
        data = DataConfig(root=root, representation="symbolic")
        spec = signal_spec(data, seed=0, tokens=tokens)
        whole = _least(lambda: [spec.load(f"{i}.npy", i) for i in range(len(ecgs))], repeat, time.process_time)
        read = _least(lambda: [spec.load_raw(f"{i}.npy", i) for i in range(len(ecgs))], repeat, time.process_time)
    for what, seconds in (("", whole), (", of it reading the file", read), (", of it tokenising", whole - read)):
        print(f"| feeding the LLM 100 ECGs/s{what} | - | {seconds / len(ecgs) * 1e4:.2f} % of a core | - |")


def _training(other: "OtherAlgorithm", records: list[bytes]) -> None:
    text = b"".join(records)
    start = time.perf_counter()
    expected = other.train(text, MERGES, THREADS)
    theirs = time.perf_counter() - start
    made = EcgByte.train(records, MERGES, across_records=True)
    assert list(made.merges) == expected, "the two algorithms learnt other merges"
    name = f"train {MERGES} merges on {len(records)} ECGs"
    ours = _least(lambda: EcgByte.train(records, MERGES, across_records=True), 3)
    _row(f"{name}, across records (ours: 1 thread, other: {THREADS})", theirs, ours, "s", 1)
    ours = _least(lambda: EcgByte.train(records, MERGES, threads=THREADS), 3)
    _row(f"{name}, within records, {THREADS} threads", theirs, ours, "s", 1)
    rng = np.random.default_rng(0)
    leads = np.frombuffer(text, np.uint8).reshape(len(records), -1, SAMPLES)
    more = [np.roll(ecg, rng.integers(SAMPLES), axis=-1).tobytes() for _ in range(COPIES) for ecg in leads]
    tenfold = _least(lambda: EcgByte.train(more, MERGES, threads=THREADS), 2)
    print(f"| {COPIES} times the corpus (shifted copies) | - | {tenfold:.2f} s | {tenfold / ours:.1f} times the time |")


class OtherAlgorithm:
    """The crate beside this script, built and called."""

    def __init__(self) -> None:
        target = Path(tempfile.gettempdir(), "elm_jax_bench_bpe")
        build = ["cargo", "build", "--release", "--quiet", "--manifest-path", CRATE / "Cargo.toml"]
        subprocess.run([*build, "--target-dir", target], check=True)
        suffix = {"darwin": "libbench_bpe.dylib", "win32": "bench_bpe.dll"}.get(sys.platform, "libbench_bpe.so")
        self._library: Any = ctypes.CDLL(str(target / "release" / suffix))
        self._library.bench_merges.restype = ctypes.c_void_p
        self._library.bench_encode.restype = ctypes.c_size_t
        self._library.bench_train.restype = ctypes.c_size_t

    def merges(self, coder: EcgByte) -> ctypes.c_void_p:
        lengths = np.array([len(merge) for merge in coder.merges], np.uint32)
        return ctypes.c_void_p(
            self._library.bench_merges(b"".join(coder.merges), _pointer(lengths), ctypes.c_size_t(len(lengths)))
        )

    def encode(self, merges: ctypes.c_void_p, ecg: np.ndarray) -> np.ndarray:
        ids = np.empty(ecg.size, np.uint32)
        count = self._library.bench_encode(merges, _pointer(ecg), ctypes.c_size_t(ecg.size), _pointer(ids))
        return ids[:count].astype(np.int32)

    def train(self, text: bytes, num_merges: int, threads: int) -> list[bytes]:
        pairs = np.empty((num_merges, 2), np.uint32)
        size, wanted, workers = map(ctypes.c_size_t, (len(text), num_merges, threads))
        done = self._library.bench_train(text, size, wanted, workers, _pointer(pairs))
        spelled = [bytes([i]) for i in range(256)]
        for first, second in pairs[:done].tolist():
            spelled.append(spelled[first] + spelled[second])
        return spelled[256:]


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous and array.dtype in (np.float32, np.uint32)
    return array.ctypes.data_as(ctypes.c_void_p)


def _recordings(folder: Path) -> np.ndarray:
    """The first 200 by name: (B, 12, 2500) float32 at 250 Hz."""
    headers = sorted(folder.rglob("*.hea"))[:TRAINED_ON]
    if not headers:
        raise SystemExit(f"error: {folder} holds no WFDB record (.hea)")
    return np.stack([to_segment(read_ecg(path.with_suffix("")), RATE, SAMPLES) for path in headers])


def _row(what: str, theirs: float, ours: float, unit: str, scale: float) -> None:
    print(f"| {what} | {theirs * scale:.3g} {unit} | {ours * scale:.3g} {unit} | {theirs / ours:.0f} |", flush=True)


def _least(work: Callable[[], object], repeat: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds."""
    times = []
    for _ in range(repeat):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


if __name__ == "__main__":
    main()
