"""Numbers that are not finite, put into runs: nothing of them stays, the run goes on, and who brought them is named.

    python scripts/reliability/nonfinite.py            all cases
    python scripts/reliability/nonfinite.py --short    the first one alone

Tiny runs of the demo are trained with faults in some of their steps: a loss of NaN, a NaN or an infinity in one leaf of
the gradients, gradients whose norm overflows, a running statistic of infinity, a NaN in the signals of one process.
After each step the state is hashed. Of a faulty step the hash must be that before it, of any other another one; the
run must end with status 0, and metrics.jsonl must name the faulty steps with their samples and no others. Further
cases: ten faulty steps in a row, which end the run with status 2 and leave its checkpoint as it was; weights that are
infinite from the start; a recording with a NaN in its file, which is a bad record and no faulty step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import runs
import warm

FAULTS = ("", "loss", "leaf", "infinite", "overflow", "statistic", "signal", "weights")
ALL = {3: "loss", 5: "leaf", 6: "infinite", 8: "overflow", 9: "statistic", 11: "signal"}
ROW = list(range(5, 15))
LORA = {"update": ["connector", "llm"], "llm.lora.rank": 4, "optim.name": "muon"}
# What of a run is changed, its faults by step, and the number of its processes and of the devices of each.
CASES: dict[str, tuple[dict[str, Any], dict[int, str], int, int]] = {
    "all faults, two micro-batches": ({"optim.accum_steps": 2}, ALL, 1, 1),
    "LoRA and Muon": (LORA, {3: "loss", 5: "leaf", 8: "overflow"}, 1, 1),
    "a mesh of 2 x 2 x 2": ({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, ALL, 1, 8),
    "one of two processes": ({}, {3: "loss", 5: "leaf", 11: "signal"}, 2, 4),
    "spikes are skipped as well": ({"optim.skip_spikes": 6}, ALL, 1, 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the first case alone")
    parser.add_argument("--workdir", type=Path, help="keep the runs there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        names = list(CASES)[:1] if options.short else list(CASES)
        found = {name: goes_on(folder / f"case_{n}", *CASES[name]) for n, name in enumerate(names)}
        if not options.short:
            found["ten steps in a row"] = stops(folder / "row", {step: "loss" for step in ROW}, "10 steps in a row")
            found["infinite weights from the start"] = stops(folder / "weights", {0: "weights"}, "not finite in llm.")
            found["a NaN in a recording's file"] = bad_file(folder / "file")
    wrong = {name: problem for name, problem in found.items() if problem}
    steps = sum(len(CASES[name][1]) for name in names)
    sentence = (
        f"{steps} faulty steps in {len(names)} runs left the state's hash as it was, named their samples, and the runs "
        f"went on; {len(found) - len(names)} further cases as promised" if not wrong
        else "; ".join(f"{name}: {problem}" for name, problem in wrong.items())
    )  # fmt: skip
    return common.end(sentence, not wrong, cases=len(found), faulty_steps=steps, wrong=wrong)


# -- the cases: each returns what is wrong, "" for nothing ----------------------------------------------------------


def goes_on(folder: Path, changes: dict[str, Any], faults: dict[int, str], processes: int, devices: int) -> str:
    errors = run(folder, changes, faults, processes, devices)
    samples: dict[int, set[str]] = {}
    for path in sorted(folder.glob("steps-*.jsonl")):
        for step, before, after, ids in map(json.loads, path.read_text().splitlines()):
            samples.setdefault(step, set()).update(ids)
            if (before == after) != (step in faults):
                return f"step {step} of {path.name} {'left' if before == after else 'changed'} the state"
    events = [line for line in runs.lines(folder / "run") if line.get("event") == "non_finite"]
    if [event["step"] for event in events] != sorted(faults):
        return f"named were the steps {[event['step'] for event in events]}"
    if any(set(event["samples"]) != samples[event["step"]] or not event["recordings"] for event in events):
        return "other samples are named than those of the step"
    if sum("is skipped" in line for line in errors.splitlines()) != 1:
        return "the terminal is not told once"
    return "" if len(samples) == runs.STEPS else f"{len(samples)} of {runs.STEPS} steps were taken"


def stops(folder: Path, faults: dict[int, str], says: str) -> str:
    whole = folder.with_name(f"{folder.name}_whole")
    errors = run(folder, {"train.steps": 20}, faults, expect=2)
    last = errors.strip().splitlines()[-1]
    if not (last.startswith("error: ") and says in last):
        return f"it ended with: {last}"
    if "weights" in faults.values():
        return f"infinite weights were saved: {saved}" if (saved := runs.committed(folder / "run")) else ""
    run(whole, {"train.steps": 20}, {})
    same = common.state_hash(folder / "run", 3) == common.state_hash(whole / "run", 3)
    return "" if same else "its checkpoint is another than that of a run without faults"


def bad_file(folder: Path) -> str:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for n in range(32):
        signal = rng.normal(size=(12, 500)).astype(np.float32)
        if n == 7:
            signal[3, 100] = np.nan
        np.save(folder / f"{n}.npy", signal)
        turns = [{"from": "human", "value": "Is it regular?"}, {"from": "gpt", "value": "yes"}]
        rows.append({"ecg_path": f"{n}.npy", "text": turns, "name": "x", "patient_id": str(n), "split": "train"})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data.names": ["records.jsonl"], "data.root": str(folder), "data.max_bad_records": 0.1}
    run(folder, {**data, "data.val_fraction": 0.0}, {})
    events = [line for line in runs.lines(folder / "run") if line.get("event") in ("bad_record", "non_finite")]
    (event,) = events
    told = (event["event"], event["id"]) == ("bad_record", "records.jsonl:7") and "7.npy" in event["error"]
    return "" if told else f"told was {events}"


def run(
    folder: Path, changes: dict[str, Any], faults: dict[int, str], processes: int = 1, devices: int = 1, expect: int = 0
) -> str:
    """Train a tiny run with these faults; what the first process said on stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = runs.flags(folder / "run", **{name.replace(".", "__"): value for name, value in changes.items()})
    own = {"ELM_JAX_CACHE": str(folder / "cache"), "FAULTS": json.dumps(faults), "STEPS_FILE": str(folder / "steps")}
    places = runs.two() if processes == 2 else [{}]
    started: list[subprocess.Popen[str]] = [
        runs.start_command([*warm.python(own), __file__, *flags], devices, {**own, **place}) for place in places
    ]
    return runs.finish_all(started, expect)[0]


# -- a run with faults ----------------------------------------------------------------------------------------------


def train_with_faults() -> None:
    import elm_jax.train
    from elm_jax import cli
    from elm_jax.data.loader import StepSource
    from elm_jax.models.encoders import merl
    from elm_jax.training import loop
    from elm_jax.training import step as step_module

    merl.LAYOUTS["tiny"] = (merl.basic, (1,))
    faults = {int(step): name for step, name in json.loads(os.environ["FAULTS"]).items()}
    StepSource.fill = marking(StepSource.fill, faults)
    step_module.loss_and_gradients = spoiling(step_module.loss_and_gradients)
    loop.Trainer._advance = hashing(loop.Trainer._advance)
    if "weights" in faults.values():
        loop.first_arrays = infinite(loop.first_arrays)
    cli.run(elm_jax.train.main)


def marking(fill: Callable[..., Any], faults: dict[int, str]) -> Callable[..., Any]:
    """Steps as they are loaded, with the number of a fault in the last process's part of the batch."""

    def filled(source: Any, step: int, *rest: Any) -> Any:
        import jax

        loaded = fill(source, step, *rest)
        name = faults.get(step + 1, "") if jax.process_index() == jax.process_count() - 1 else ""
        marks = np.zeros_like(loaded.batch.target_weights)
        marks[-1, 0, 0] = FAULTS.index(name)
        if name == "signal":
            loaded.batch.signals["ecg"][-1, 0, 0, 0, 0] = np.nan
        return loaded._replace(batch=loaded.batch._replace(extras={"fault": marks}))

    return filled


def spoiling(loss_and_gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Loss, gradients and statistics with the fault that the batch is marked with."""
    import jax
    import jax.numpy as jnp

    def spoiled(structure: Any, trained: Any, statistics: Any, frozen: Any, batch: Any, *rest: Any) -> Any:
        fault = batch.extras["fault"].max().astype(jnp.int32)
        batch = batch._replace(extras={})
        loss, gradients, statistics, sums = loss_and_gradients(structure, trained, statistics, frozen, batch, *rest)

        def put(value: jax.Array, name: str, wrong: float) -> jax.Array:
            """The value with its first number wrong."""
            first = jnp.zeros(value.shape, bool).at[(0,) * value.ndim].set(True)
            return jnp.where(first & (fault == FAULTS.index(name)), wrong, value)

        leaf = max(gradients)
        spoilt = put(put(put(gradients[leaf], "leaf", np.nan), "infinite", np.inf), "overflow", 1e25)
        moved = {name: put(x, "statistic", np.inf) for name, x in statistics.items()}
        return put(loss, "loss", np.nan), {**gradients, leaf: spoilt}, moved, sums

    return spoiled


def hashing(advance: Callable[..., Any]) -> Callable[..., Any]:
    """A step, of which a line goes to a file: its number, the state's hash before and after, its samples."""
    import jax

    def digest(state: Any) -> str:
        found = hashlib.sha256()
        for leaf in jax.tree.leaves(state._replace(step=0)):
            for shard in getattr(leaf, "addressable_shards", ()):
                found.update(np.asarray(shard.data).tobytes())
        return found.hexdigest()

    def advanced(trainer: Any, loaded: Any) -> Any:
        with jax.transfer_guard("allow"):
            before = digest(trainer.state)
        line = advance(trainer, loaded)
        with jax.transfer_guard("allow"):
            after = digest(trainer.state)
        ids = [trainer.dataset.records[i].id for i in loaded.batch.sample_ids.ravel().tolist() if i >= 0]
        with open(f"{os.environ['STEPS_FILE']}-{jax.process_index()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([loaded.step + 1, before, after, ids]) + "\n")
        return line

    return advanced


def infinite(first_arrays: Callable[..., Any]) -> Callable[..., Any]:
    """The first weights, one of which is infinite."""

    def made(*rest: Any) -> Any:
        arrays = first_arrays(*rest)
        name = next(name for name in arrays if name.startswith("llm."))
        return {**arrays, name: arrays[name] * np.float32(np.inf)}

    return made


if __name__ == "__main__":
    if "FAULTS" in os.environ:
        train_with_faults()
    else:
        sys.exit(main())
