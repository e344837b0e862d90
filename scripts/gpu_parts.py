"""The parts of `gpu_round.py`, each in a process of its own: `gpu_parts.py NAME --figures FILE [--keep FILE] [--tiny]`.

A part tells its figures as it finds them: names and numbers as docs/gpu.md shows them, written at once, so that what
was found before a crash is not lost. It ends with an error where a figure is not what it must be. --keep is the file
of lines that the round keeps: the plan is held against what is measured there, and a profile is put beside it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_mfu
import numpy as np
from gpu_round import latest, read
from machine import machine

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
TOKENIZER = ROOT / "tests" / "data" / "golden" / "text_tokenizer_qwen"
PACKAGES = ("elm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "torch", "numpy",
            "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")  # fmt: skip
CARD = "name,memory.total,power.limit,driver_version,clocks.max.sm,clocks.sm,clocks.mem,temperature.gpu"


@dataclass
class Place:
    """Where a part runs: `tiny` on the CPU, its current folder is its round's."""

    figures: Path
    keep: Path | None
    tiny: bool
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "gpu"

    def tell(self, figures: dict[str, Any]) -> None:
        """Add these, rounded to what anyone reads."""
        self.found |= {n: float(f"{x:.6g}") if isinstance(x, float | np.floating) else x for n, x in figures.items()}
        fresh = self.figures.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.found))
        fresh.replace(self.figures)

    def earlier(self, part: str) -> dict[str, Any]:
        """The figures of another part, if it is recorded."""
        return next((line["figures"] for line in latest(read(self.keep)) if line["part"] == part), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    PARTS[args.part](Place(args.figures, args.keep, args.tiny))


def script(name: str, *flags: Any) -> dict[str, Any]:
    """What a script of this folder leaves with --json."""
    out = Path(f"{name}.json").absolute()
    if subprocess.run([sys.executable, SCRIPTS / name, "--json", out, *map(str, flags)]).returncode:
        raise SystemExit(f"error: {name} ended with an error, above")
    return json.loads(out.read_text())


def metrics(run: Path) -> tuple[dict[int, float], dict[str, dict[str, Any]]]:
    """The losses by step, and the last event of each name."""
    lines = read(run / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line and "event" not in line}
    return losses, {line["event"]: line for line in lines if "event" in line}


# -- 1: the machine ---------------------------------------------------------------------------------------------


def the_machine(place: Place) -> None:
    versions = {package: _version(package) for package in PACKAGES}
    place.tell({"processor": machine("numpy"), "versions": [f"{name} {it}" for name, it in versions.items() if it]})
    if not place.tiny:
        query = ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True)
        values = told.stdout.strip().splitlines()[0].split(", ") if not told.returncode else []
        found = dict(zip(CARD.split(","), values, strict=False)) or {"name": told.stderr.strip()}
        place.tell({"card": found.pop("name"), **found})
    import elm_jax

    place.tell({"elm_jax": str(Path(elm_jax.__file__).parent)})
    out = Path("doctor.json").absolute()
    subprocess.run([sys.executable, "-m", "elm_jax.doctor", "--json", out])
    findings = json.loads(out.read_text())["findings"]
    failed = [finding["text"] for finding in findings if finding["status"] == "FAIL"]
    devices = next(finding["text"] for finding in findings if finding["check"] == "devices")
    place.tell({"devices": devices, "checks of the doctor": len(findings), "of them failed": len(failed)})
    if failed:
        raise SystemExit(f"error: the doctor: {'; '.join(failed)}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- 3 to 5: what other scripts measure -------------------------------------------------------------------------


def demo(place: Place) -> None:
    """The demo for 60 seconds, or to its end where that is sooner."""
    small = {"data.names": '["demo:train=48,val=8,test=8"]', "train.epochs": 1, "encoder.config.width": 4,
             "train.log_every": 1} if place.tiny else {}  # fmt: skip
    begun, wanted = time.monotonic(), {0}
    process = start(Path("demo"), **small)
    try:
        status = process.wait(None if place.tiny else 60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        status, wanted = process.wait(), {0, 143, -signal.SIGTERM}  # the last in the evaluation
    seconds = time.monotonic() - begun
    losses, events = metrics(Path("demo"))
    last = events.get("finish") or events.get("stop")
    if last is None:
        raise SystemExit(f"error: the demo ended with status {status}, and neither stopped nor finished")
    keys = {"conversations_per_s": "conversations/s", "compile_seconds": "seconds of compiling",
            "host_wait_share": "host wait", "device_memory_gb": "peak GB"}  # fmt: skip
    place.tell({"seconds": seconds, "steps": last["steps"], "trained to its end": "finish" in events})
    place.tell({"last loss": next(reversed(losses.values()), None), **{keys[key]: last[key] for key in keys}})
    results = sorted(Path("demo/eval").glob("*/metrics.json"))
    place.tell({"evaluated": bool(results), **(scores(json.loads(results[-1].read_text())) if results else {})})
    if status not in wanted:
        raise SystemExit(f"error: the demo ended with status {status}")


def scores(told: dict[str, Any]) -> dict[str, float]:
    """Those of an evaluation's metrics.json that README.md shows, and what they are without the signal."""
    parts = {"": told["metrics"], ", shuffled ECGs": told["controls"].get("shuffled", {})}
    names = ("signal_type.accuracy", "heart_rate.within_5_bpm", "regularity.accuracy")
    return {f"{name}{how}": of[name]["value"] for how, of in parts.items() for name in names if name in of}


def train(place: Place) -> None:
    prepared = prepare(place)
    tiny = ["--tiny"] if place.tiny else []
    for name in ("system",) if place.tiny else ("system", "equal"):  # each told as soon as it is there
        flags = ["--data", prepared, "--tokenizer", TOKENIZER, "--device", place.device, "--cases", name, *tiny]
        ours, theirs = (script("bench_train.py", *flags)["cases"][0][side] for side in ("ours", "theirs"))
        place.tell({
            f"{name}: ours conversations/s": ours["rate"], f"{name}: theirs": theirs["rate"],
            f"{name}: times": ours["rate"] / theirs["rate"], f"{name}: first loss, ours": ours["loss"],
            f"{name}: first loss, theirs": theirs["loss"], f"{name}: GB above the state, ours": ours["memory_gb"],
            f"{name}: GB above the state, theirs": theirs["memory_gb"],
        })  # fmt: skip


def prepare(place: Place) -> Path:
    """A folder as `prepare` leaves it, of generated recordings: questions in ECG-QA's form about one ECG each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from elm_jax.data.demo import DemoRecords, load_demo_ecg
    from elm_jax.ecg.recording import LEADS

    folder, rows = Path("prepared").absolute(), []
    (folder / "ptb_xl").mkdir(parents=True, exist_ok=True)
    for row in DemoRecords("train", 12 if place.tiny else 256):
        if not row["ecg_path"].startswith("demo:"):
            continue  # noise and flat lines
        question, answer = (turn["value"] for turn in json.loads(row["text"]))
        path = f"ptb_xl/{row['ecg_path'].rpartition(':')[2]}_0.npy"
        if not (folder / path).exists():
            signal_ = load_demo_ecg(row["ecg_path"], 250.0, 2500)
            told = {"ecg": signal_, "report": "", "leads": list(LEADS), "target_sf": 250}
            np.save(folder / path, np.array(told, dtype=object), allow_pickle=True)
        text = json.dumps(["single-query", question, [answer]])
        rows.append({"ecg_path": path, "text": text, "name": "single-query", "patient_id": row["patient_id"],
                     "split": {6: "val", 7: "test"}.get(len(rows) % 8, "train"), "sample_id": len(rows)})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "ecg_qa.parquet")
    return folder


def mfu(name: str) -> Callable[[Place], None]:
    def part(place: Place) -> None:
        sizes = ["--tiny", "--steps", 4, "--rows", 2, "--recordings", 16] if place.tiny else ["--steps", 20]
        found = script("bench_mfu.py", "--cases", name, *sizes)[name]
        attention = found["attention"]
        place.tell({
            "MFU": found["mfu"], "tokens/s": found["tokens_per_s"], "ms a step": found["step_ms"],
            "host wait": found["host_wait_share"], "padding": found["padding_fraction"], "rows": found["rows"],
            "tokens a row": found["tokens"], "peak GB": found["device_memory_gb"], "loss": found["loss"],
            "seconds of compiling": found["compile_seconds"],
            "attention": f"{attention['implementation']} ({attention['reason']})",
            "signals a row": found["shape"]["signals"], "targets a row": found["shape"]["targets"],
            "key blocks": found["shape"]["key_blocks"], "mark": bench_mfu.CASES[name][3],
        })  # fmt: skip

    return part


def plan(place: Place) -> None:
    """The plan of what was measured: memory and time."""
    kind = "h200" if "H200" in place.earlier("machine").get("card", "") else "h100"
    topology = "cpu:1" if place.tiny else f"{kind}:1x1"
    for name in bench_mfu.CASES:
        was = place.earlier(f"mfu-{name}")
        if not was:
            place.tell({name: "not measured"})
            continue
        out = Path(f"plan_{name}.json").absolute()
        shape = {"rows": "rows", "signals": "signals a row", "targets": "targets a row", "key-blocks": "key blocks"}
        given = [word for flag, key in shape.items() if was[key] for word in (f"--{flag}", str(was[key]))]
        command = [sys.executable, "-m", "elm_jax.plan", "--topology", topology, "--json", str(out), *given]
        # On the CPU: the processor is idle else, and no memory of the card is taken.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, *bench_mfu.flags(name, 20, place.tiny)], check=True, env=environment)
        told = json.loads(out.read_text())
        held, step = told["bytes_per_device"]["total"] / 1e9, told["predicted"]["step_ms"]
        peak = was["peak GB"]
        place.tell({
            f"{name}: GB planned": held, f"{name}: GB measured by planned": peak / held if peak else None,
            f"{name}: ms planned": step, f"{name}: ms measured by planned": was["ms a step"] / step,
            f"{name}: attention planned": told["attention"],
        })  # fmt: skip


def generate(place: Place) -> None:
    sizes = ["--tiny", "--theirs", 2, "--limit", 4, "--rows", 2] if place.tiny else []
    flags = ["--data", prepare(place), "--tokenizer", TOKENIZER, "--device", place.device, *sizes]
    found = script("bench_generate.py", *flags)
    ours, theirs = found["ours"], found["theirs"]
    place.tell({
        "ours answers/s": ours["rate"], "theirs": theirs["rate"], "times": ours["rate"] / theirs["rate"],
        "equal answers": found["equal"], "rows": found["rows"], "tokens, ours": ours["new"],
        "seconds of compiling": ours["first"] - ours["seconds"],
    })  # fmt: skip
    if place.tiny and found["equal"] < 1:  # float32: in bfloat16 two programs may choose otherwise
        raise SystemExit("error: ours and theirs answer differently in float32")


# -- 6: stopping and going on, and a profile --------------------------------------------------------------------


def start(run: Path, **changes: Any) -> subprocess.Popen[bytes]:
    """The train command on the demo, in the folder `run`."""
    values = {"workdir": run.absolute(), "log.progress": False, **changes}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return subprocess.Popen([sys.executable, "-m", "elm_jax.train", "--config", "configs/demo.py", *flags])


def short(place: Place, steps: int) -> dict[str, Any]:
    """Flags of a short run that logs each step."""
    small = {"encoder.config.width": 4, "train.batch_size": 4} if place.tiny else {}
    return {
        "data.names": '["demo:train=256,val=8,test=8"]', "data.val_fraction": 0, "train.steps": steps,
        "train.log_every": 1, "train.save_every": 10**6, "eval.at_end": False, **small,
    }  # fmt: skip


def resume(place: Place) -> None:
    """A run, and one that is stopped by SIGTERM and goes on: the same losses and weights?"""
    steps, least = (12, 3) if place.tiny else (300, 20)
    flags = short(place, steps)
    run, whole = Path("stopped"), Path("whole")
    process = start(run, **flags)
    while process.poll() is None and len(metrics(run)[0]) < least:
        time.sleep(0.02)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status, seconds = process.wait(), time.monotonic() - asked
    stopped_at = max(metrics(run)[0], default=0)
    place.tell({"status after SIGTERM": status, "seconds to the checkpoint": seconds, "stopped after step": stopped_at})
    if status != 143:
        raise SystemExit(f"error: status {status} after SIGTERM at step {stopped_at} of {steps}, expected 143")
    for folder in (run, whole):
        if status := start(folder, **flags).wait():
            raise SystemExit(f"error: status {status} of the run in {folder}")
    (found, events), (expected, _) = metrics(run), metrics(whole)
    if "resume" not in events or list(found) != list(expected):
        raise SystemExit(f"error: it did not go on: {len(found)} steps logged of {len(expected)}")
    apart = {step: abs(found[step] - loss) / abs(loss) for step, loss in expected.items()}
    differs = next((step for step, distance in apart.items() if distance), None)
    weights = _apart(run, whole, steps)
    place.tell({
        "bitwise": weights == 0 and differs is None, "first step whose loss differs": differs or "none",
        "largest difference of a loss": max(apart.values()), "of weights and moments": weights,
    })  # fmt: skip
    # Kernels of a GPU may add up in any order, and training enlarges that: going on may add nothing to it.
    before = max(apart[step] for step in apart if step <= stopped_at)
    if apart[stopped_at + 1] > max(1e-3, 10 * before):
        raise SystemExit("error: the first loss after going on differs by more than rounding")


def _apart(run: Path, other: Path, step: int) -> float:
    """The largest difference of two runs' arrays at a step, each by the largest of its own."""
    import jax
    import orbax.checkpoint as ocp

    worst = 0.0
    for item in ("trained", "optimizer"):
        read_ = []
        for folder in (run, other):
            path = folder.absolute() / "checkpoints" / str(step) / item
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(path).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                read_.append(reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy)))
        for a, b in zip(*map(jax.tree.leaves, read_), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) if a.size else 0.0)
    return worst


def profile(place: Place) -> None:
    steps = (2, 4) if place.tiny else (30, 33)
    run = Path("profiled")
    flags = {**short(place, steps[1] + 2), "log.profile_steps": "{}:{}".format(*steps)}
    if status := start(run, **flags).wait():
        raise SystemExit(f"error: status {status} of the profiled run")
    traces = sorted((run / "profile").rglob("*.trace.json.gz"))
    if not traces:
        raise SystemExit(f"error: no trace: {[str(path) for path in (run / 'profile').rglob('*')]}")
    size = traces[-1].stat().st_size / 1e6
    place.tell({"MB of the trace": size})
    if place.keep and size < 15:
        kept = place.keep.with_name("gpu_round.trace.json.gz")
        shutil.copy(traces[-1], kept)
        place.tell({"kept as": kept.name})


def _checks(name: str) -> Callable[[Place], None]:
    def part(place: Place) -> None:
        import gpu_checks

        getattr(gpu_checks, name)(place.tell, place.tiny)

    return part


PARTS: dict[str, Callable[[Place], None]] = {
    "machine": the_machine, "attention": _checks("attention_paths"), "goldens": _checks("goldens"), "demo": demo,
    "train": train, **{f"mfu-{name}": mfu(name) for name in bench_mfu.CASES}, "generate": generate, "resume": resume,
    "plan": plan, "profile": profile,
}  # fmt: skip

if __name__ == "__main__":
    main()
