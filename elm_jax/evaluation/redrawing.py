"""What a model of an encoder alone rebuilds, makes or continues, measured on a split: W/eval/<datasets>-<split>/.

Measures are those of `scoring.generation`: of rebuilt ECGs their errors, PSNR and SSIM; of those made of nothing FID
and MMD by the model's own features; of forecasts the share of right ids, and how the signals that these spell compare.

N recordings, C leads, L samples, T ids.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from elm_jax import stopping
from elm_jax.assemble import Assembly
from elm_jax.config import Config
from elm_jax.data.batch import Batch, BatchShape, Conversation, Group, collate
from elm_jax.data.dataset import Dataset
from elm_jax.errors import UserError, printable
from elm_jax.evaluation.evaluator import results_folder
from elm_jax.evaluation.results import asked_with
from elm_jax.folders import writable_folder, write_json
from elm_jax.objectives import Redrawn
from elm_jax.pictures.redrawn import draw_redrawn
from elm_jax.run.weights import TrainedWeights, frozen_fingerprints
from elm_jax.runtime.mesh import array_shardings, batch_sharding, batch_ways, make_mesh, to_device
from elm_jax.scoring.generation import forecasting, frechet_distance, mean_discrepancy, rebuilding
from elm_jax.scoring.statistics import Patients, ci95
from elm_jax.training.step import make_redraw

PICTURES = 4  # recordings of a picture
Rows = dict[str, np.ndarray]  # by name, (N,): what is averaged over recordings


def redraw_split(config: Config, split: str = "test", which: str = "best") -> Path:
    """Evaluate the encoder that the run in `config.workdir` pretrains; returns the folder with the results.

    Writes `metrics.json`, and of each thing that the objective has it redraw a picture of the first recordings and, of
    those that are made, `<name>.npy` (N, C, L) float32. Random draws come from the seed.

    Raises:
        UserError: no checkpoint, no such split, an objective that redraws nothing, or too many bad records.
    """
    stopping.doing("loading the model")
    if jax.process_count() > 1:
        raise UserError("JAX_NUM_PROCESSES", str(jax.process_count()), "one process for an encoder alone", "start one")
    out = results_folder(config, split)
    writable_folder(out, "config.workdir")
    mesh, weights = make_mesh(config.mesh), TrainedWeights(Path(config.workdir), which, config, alone=True)
    assembly = weights.assembly
    if not assembly.objective.redraws:
        expected, fix = "an objective that rebuilds, makes or continues ECGs", "judge it by python -m elm_jax.probe"
        raise UserError("config.objective", config.objective, expected, fix)
    arrays = weights.place(array_shardings(assembly.structure, mesh))
    weights.check(frozen_fingerprints(weights.leaves, {name: arrays[name] for name in weights.frozen}))
    rows = -(-config.eval.batch_size // (ways := batch_ways(mesh))) * ways
    redraws = {name: make_redraw(assembly.structure, config, mesh, name) for name in assembly.objective.redraws}
    found: dict[str, list[Rows]] = {name: [] for name in redraws}
    shown: dict[str, list[Redrawn]] = {name: [] for name in redraws}
    patients: list[str] = []
    place, key = batch_sharding(mesh, micro_batches=False), jax.random.key(config.seed)
    batches = tqdm(_batches(assembly.dataset(split), config, rows), disable=not config.log.progress, mininterval=1.0)
    for number, (batch, of) in enumerate(batches):
        on_devices = jax.tree.map(lambda x: to_device(mesh, x, place, row_axis=0), batch)
        for name, redraw in redraws.items():
            made = jax.device_get(redraw(arrays, on_devices, jax.random.fold_in(key, number)))
            made = jax.tree.map(lambda x, there=made.there: np.asarray(x)[there], made)
            found[name].append(_rows(made, assembly))
            if len(patients) < PICTURES:
                shown[name].append(made)
        patients += of
    people, metrics = Patients(patients, config.seed), dict[str, Any]()
    for name, parts in found.items():
        _draw(jax.tree.map(lambda *each: np.concatenate(each), *shown[name]), assembly, out / f"{name}.png")
        whole = {measure: np.concatenate([part[measure] for part in parts]) for measure in parts[0]}
        metrics |= {f"{name}.{m}": v for m, v in _measured(whole, people, out / f"{name}.npy").items()}
    asked = {**asked_with(config), "guidance": config.eval.guidance, "ema": config.eval.ema}
    facts = {"protocol": "redrawn", "split": split, "step": weights.step, "n": len(patients)}
    write_json(out / "metrics.json", {**facts, "asked_with": asked, "metrics": metrics})
    told = ", ".join(f"{name} {of['value']:.4g}" for name, of in metrics.items() if of["value"] is not None)
    print(printable(f"{told}; results are in {out}"), file=sys.stderr)
    return out


def _batches(dataset: Dataset, config: Config, rows: int) -> Iterator[tuple[Batch, list[str]]]:
    """Batches (B, ...) of the split's records, and whom each of their recordings is about.

    Raises:
        UserError: more than `data.max_bad_records` of them cannot be read, or there are none.
    """
    numbers = range(min(len(dataset), config.eval.limit or len(dataset)))
    good: list[Conversation] = []
    bad = 0
    for i in stopping.each(iter(numbers), "record"):
        try:
            good += dataset.conversations(i, dataset.signals(i), 0)
        except UserError as error:
            bad += 1
            if bad > config.data.max_bad_records * len(numbers):
                raise
            print(printable(f"left out: {error}"), file=sys.stderr)
    if not good:
        raise UserError("--split", "no record that can be read", "at least one", "name another split")
    tokens, slots = max(len(c.ids) for c in good), max(len(c.signals or ()) for c in good)
    shape = BatchShape(tokens, slots, 1)
    for start in range(0, len(good), rows):
        part = good[start : start + rows]
        packed = [[Group(0, [c])] for c in part] + [[]] * (rows - len(part))
        of = [dataset.records[c.sample].patient or dataset.records[c.sample].id for c in part for _ in c.signals or ()]
        yield collate(packed, shape, dataset.signal.layout), of


def _rows(made: Redrawn, assembly: Assembly) -> Rows:
    """The measures of a batch's recordings; of ECGs made of nothing these (`made`) and `real` and `own` features."""
    data, ids = assembly.config.data, assembly.signal.ids
    if ids is not None:
        return _forecasts(made, ids.decode)
    if made.features is not None:
        return {"made": made.made.astype(np.float32), "real": made.features[0], "own": made.features[1]}
    of_lead, counted = rebuilding(made.made, made.truth, data.sampling_rate), made.hidden.any(-1)
    share = counted / np.maximum(counted.sum(1, keepdims=True), 1)
    return {name: (x * share).sum(1) for name, x in of_lead._asdict().items()}


def _draw(made: Redrawn, assembly: Assembly, path: Path) -> None:
    """The picture of the first ECGs; there is none of ids."""
    if assembly.signal.ids is not None:
        return
    data, few = assembly.config.data, slice(PICTURES)
    named = data.leads if made.made.shape[1] == len(data.leads) else ()
    truth = None if made.features is not None else made.truth[few]
    draw_redrawn(path, truth, made.made[few], made.hidden[few], data.sampling_rate, named)


def _measured(rows: Rows, people: Patients, path: Path) -> dict[str, dict[str, Any]]:
    """The measures of a split's `_rows`; writes ECGs made of nothing to `path`."""
    if "made" not in rows:
        return _with_intervals(rows, people)
    np.save(path, rows["made"])
    real, own = (rows[name].astype(np.float64) for name in ("real", "own"))
    found = {"mmd": mean_discrepancy(real, own)} | ({"fid": frechet_distance(real, own)} if len(real) > 1 else {})
    return {name: {"value": value if np.isfinite(value) else None, "ci95": None} for name, value in found.items()}


def _forecasts(made: Redrawn, decode: Callable[[np.ndarray], np.ndarray]) -> Rows:
    """Of forecasts (N, T): the part of the ids that is right, and how the samples compare that they spell."""
    found: list[dict[str, float]] = []
    for truth, own, hidden in zip(made.truth, made.made, made.hidden, strict=True):
        samples = forecasting(decode(own[hidden]), decode(truth[hidden]), decode(truth[~hidden]))
        found.append({"accuracy": float((own == truth)[hidden].mean()), **samples})
    return {name: np.array([each[name] for each in found]) for name in found[0]}


def _with_intervals(rows: Rows, people: Patients) -> dict[str, dict[str, Any]]:
    """Means over recordings, with intervals by patient; what is undefined of a recording is left out of them."""
    found = {}
    for name, values in rows.items():
        known = np.isfinite(values)
        sums = people.resampled(np.stack([np.where(known, values, 0.0), known], 1))
        value = float(values[known].mean()) if known.any() else None
        found[name] = {"value": value, "ci95": ci95(sums[:, 0] / np.maximum(sums[:, 1], 1)) if known.any() else None}
    return found
