"""How many recordings a second `prepare` makes, against the reference's filters in SciPy, whether its memory grows, and
what shards take and cost to read beside the reference's files.

    python scripts/bench_prepare.py [--records 400] [--workers 2] [--json FILE]

Recordings are as PTB-XL's: WFDB, 12 leads, 10 s at 500 Hz, 16 bits; generated. The reference's chain is the filters of
2025 as ECG-Bench 0.0.4 runs them: filtfilt of polynomials, the wavelet and interp1d, lead by lead. What is compared is
processor time, of the signal alone; the extrapolation to all of PTB-XL is of the whole command by the clock, with what
it reads, checks and writes. Recordings are read in a random order as the reference does, `numpy.load` of a float64
dictionary, and by their names from shards, in float32: cold, what was written dropped from memory before (no more than
the files' contents, which needs no root), and warm. Ends with status 1 where `clean` or `paper-2025` is not `--least`
times as fast as that chain, memory grows by more than `--growth` MB from a quarter of the recordings to all, shards are
not `--smaller` times as small, or do not take as many times fewer bytes from the disk when cold as `--fewer` says.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from machine import machine
from scipy import signal as scipy_signal
from scipy.interpolate import interp1d

from elm_jax.data.prepare import output
from elm_jax.data.prepare.profiles import PROFILES
from elm_jax.data.prepare.ptb_xl import INDEX, PTB_XL
from elm_jax.data.prepare.raw import read_double
from elm_jax.data.prepare.runner import prepare_dataset
from elm_jax.ecg.checks import check_signal
from elm_jax.ecg.filters import shrink
from elm_jax.ecg.names import LEADS
from elm_jax.ecg.shards import find

PTB_XL_RECORDS, FEW = 21_799, 200
SAID = {"report": "", "ecg_path": "w", "original_sf": 500.0, "target_sf": 250, "segment_len": 2500}
RATE, NEW_RATE, SAMPLES, GAIN = 500, 250, 5000, 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=20, help="recordings of which each stage's time is taken")
    parser.add_argument("--least", type=float, default=3.0, help="times as fast as the reference's chain")
    parser.add_argument("--growth", type=float, default=16.0, help="MB")
    parser.add_argument("--smaller", type=float, default=4.0, help="times, of shards to the reference's files")
    parser.add_argument("--fewer", type=float, default=3.0, help="times, of bytes read from the disk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        _make_raw(raw, args.records)
        stages = _stages(raw, Path(folder), args.repeat)
        _prepare(raw, Path(folder) / "quarter", args.records // 4, 1)
        before, start = _peak(), time.process_time()
        alone, _ = _prepare(raw, Path(folder) / "one", args.records, 1)
        processor = (time.process_time() - start) / args.records * 1000
        growth = _peak() - before
        several, count = _prepare(raw, Path(folder) / "several", args.records, args.workers)
        output.SHARD = 1 << 20  # so that there are several: each is held in memory three times while it is written
        _prepare(raw, Path(folder) / "few", args.records // 4, 1, "shards")
        before = _peak()
        packed, _ = _prepare(raw, Path(folder) / "shards", args.records, args.workers, "shards")
        shards_growth = _peak() - before
        kept_as = _kept(Path(folder) / "several", Path(folder) / "shards")
    figures = {
        "machine": machine("numpy", "scipy", "wfdb"), "records": args.records, "ms_a_record": stages,
        "times_as_fast": {name: stages["reference"] / stages[name] for name in ("clean", "elm-2026", "paper-2025")},
        "records_a_second": {"1": args.records / alone, str(args.workers): count / several},
        "processor_ms_a_record": processor,
        "processor_minutes_for_ptb_xl": PTB_XL_RECORDS * processor / 60_000,
        "records_a_second_into_shards": args.records / packed, "shards_growth_mb": shards_growth, "kept_as": kept_as,
        "minutes_for_ptb_xl": PTB_XL_RECORDS * several / count / 60, "peak_mb": _peak(), "growth_mb": growth,
    }  # fmt: skip
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    slow = [name for name in ("clean", "paper-2025") if figures["times_as_fast"][name] < args.least]
    times = kept_as["times"]
    kept = not slow and max(growth, shards_growth) <= args.growth
    kept = kept and times["smaller"] >= args.smaller and times["fewer_bytes_read"] >= args.fewer
    print(
        f"{'kept' if kept else 'broken'}: clean is {figures['times_as_fast']['clean']:.1f} times, paper-2025 "
        f"{figures['times_as_fast']['paper-2025']:.1f} times as fast as the reference's chain; all of PTB-XL takes "
        f"{figures['processor_minutes_for_ptb_xl']:.1f} minutes of one processor, "
        f"{figures['minutes_for_ptb_xl']:.1f} by the clock on {args.workers} processes; memory grew by "
        f"{growth:.1f} MB, into shards by {shards_growth:.1f}; shards are {times['smaller']:.1f} times smaller than "
        f"files, and one recording is {times['fewer_bytes_read']:.1f} times fewer bytes from the disk, read "
        f"{times['faster_cold']:.2f} times as fast cold, {times['faster_warm']:.2f} times warm"
    )
    return 0 if kept else 1


def _make_raw(raw: Path, count: int) -> None:
    """`ptbxl_database.csv` and records that drift, beat and hum."""
    folder = raw / "records500/00000"
    folder.mkdir(parents=True)
    seconds = np.arange(SAMPLES) / RATE
    rows = ["ecg_id,patient_id,report,strat_fold,filename_lr,filename_hr"]
    for number in range(1, count + 1):
        rng = np.random.default_rng(number)
        spikes = np.exp(-((((seconds * rng.uniform(0.8, 1.6)) % 1 - 0.5) / 0.02) ** 2))
        drift = np.cumsum(rng.normal(size=(12, SAMPLES)), axis=1) * 0.004
        values = rng.normal(size=(12, 1)) * spikes + drift + 0.02 * np.sin(2 * np.pi * 50 * seconds)
        name = f"{number:05d}_hr"
        (folder / f"{name}.dat").write_bytes((values.T * GAIN).astype("<i2").tobytes())
        lines = [f"{name} 12 {RATE} {SAMPLES}", *(f"{name}.dat 16 {GAIN}(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS)]
        (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
        rows.append(f"{number},{number}.0,sinusrhythmus,{1 + number % 10},,records500/00000/{name}")
    (raw / INDEX).write_text("\n".join(rows) + "\n")


def _stages(raw: Path, out: Path, repeat: int) -> dict[str, float]:
    """Processor ms of a recording in each stage, and of the reference's chain: the least of five goes over `repeat`."""
    paths = sorted((raw / "records500/00000").glob("*.hea"))[:repeat]
    recordings = [read_double(path) for path in paths]
    made = [PROFILES["clean"](one.signal, RATE, NEW_RATE) for one in recordings]
    store = output.NpyFiles(out / "w")
    stages: dict[str, Callable[[], object]] = {
        "read": lambda: [read_double(path) for path in paths],
        "check": lambda: [check_signal(one.signal, RATE) for one in recordings],
        "write": lambda: [
            store.leave(store.pack(f"w_{n}", signal[None], SAID, out, None)) for n, signal in enumerate(made)
        ],
        "reference": lambda: [_reference(one.signal) for one in recordings],
    }
    for name, profile in PROFILES.items():
        stages[name] = lambda profile=profile: [profile(one.signal, RATE, NEW_RATE) for one in recordings]
    return {name: _least(stage) / len(paths) * 1000 for name, stage in stages.items()}


def _least(stage: Callable[[], object]) -> float:
    stage()
    taken = []
    for _ in range(5):
        start = time.process_time()
        stage()
        taken.append(time.process_time() - start)
    return min(taken)


def _reference(signal: np.ndarray) -> np.ndarray:
    """The chain of 2025 by its specification, lead by lead."""
    nyquist = RATE / 2
    filters: list[Any] = [scipy_signal.iirnotch(mains, 30, RATE) for mains in (50, 60)]
    filters.append(scipy_signal.butter(4, [0.5 / nyquist, 100 / nyquist], "bandpass"))
    filters.append(scipy_signal.butter(4, 0.05 / nyquist, "highpass"))
    old = np.linspace(0, SAMPLES / RATE, SAMPLES)
    new = np.linspace(0, SAMPLES / RATE, SAMPLES * NEW_RATE // RATE)
    leads = []
    for lead in signal:
        for b, a in filters:
            lead = scipy_signal.filtfilt(b, a, lead)
        lead = shrink(lead[None])[0]
        leads.append(interp1d(old, lead, "cubic", bounds_error=False, fill_value="extrapolate")(new))
    return np.array(leads, np.float32)


def _kept(files: Path, packed: Path) -> dict[str, Any]:
    """Of the reference's files and of shards: KB of a recording, and what it takes to read one at random.

    Milliseconds by the clock cold, microseconds of processor time warm (the least of five goes), KB from the disk.
    """
    found: dict[str, Any] = {}
    ways: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "npy": (files, lambda path: np.load(path, allow_pickle=True).item()["ecg"]),
        "shards": (packed, lambda path: find(str(path)).read(np.float32)["ecg"]),  # type: ignore[union-attr]
    }
    for form, (out, read) in ways.items():
        folder = out / "ptb_xl/preprocessed_2500"
        rows = pq.read_table(out / "ptb_xl_records.parquet", columns=["ecg_path"]).to_pylist()
        paths = [out / row["ecg_path"] for row in rows]
        np.random.default_rng(0).shuffle(paths)
        stored = [path for path in folder.iterdir() if path.suffix != ".jsonl" and path.name != "settings.json"]
        for path in stored:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        few, asked = paths[:FEW], _from_disk()
        start = time.perf_counter()
        for path in few:
            read(path)
        cold, asked = time.perf_counter() - start, _from_disk() - asked
        warm = _least(lambda few=few, read=read: [read(path) for path in few])
        found[form] = {
            "kb": sum(path.stat().st_size for path in stored) / len(paths) / 1000,
            "cold_ms": cold / len(few) * 1000, "cold_kb": asked / len(few) / 1000, "warm_us": warm / len(few) * 1e6,
        }  # fmt: skip
    npy, shards = found["npy"], found["shards"]
    names = {"smaller": "kb", "fewer_bytes_read": "cold_kb", "faster_cold": "cold_ms", "faster_warm": "warm_us"}
    return {**found, "times": {name: npy[key] / max(shards[key], 1e-9) for name, key in names.items()}}


def _from_disk() -> int:
    """Bytes that this process has had read from a disk."""
    said = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(said["read_bytes"])


def _prepare(raw: Path, out: Path, count: int, workers: int, form: str = "npy") -> tuple[float, int]:
    """Seconds by the clock, and the number of records."""
    lines = (raw / INDEX).read_text().splitlines()
    (raw / INDEX).write_text("\n".join(lines[: count + 1]) + "\n")
    try:
        start = time.perf_counter()
        report = prepare_dataset("ptb_xl", PTB_XL, raw, out, progress=False, workers=workers, form=form)
        return time.perf_counter() - start, report["records"]
    finally:
        (raw / INDEX).write_text("\n".join(lines) + "\n")


def _peak() -> float:
    """MB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())
