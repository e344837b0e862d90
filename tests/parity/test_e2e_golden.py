"""Whole models against the reference: loss, logits and gradients of every kind, and its training runs replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import e2e
from parity_log import compare, record

from elm_jax.data.batch import Batch
from elm_jax.training.step import loss_and_gradients

NAMES = [f"e2e_{kind}_{llm}" for kind in e2e.KINDS for llm in e2e.LLMS]
RUNS = [(name, run) for name in NAMES for run in goldens.config(name, "train_traces.json")]
FORWARD, GRADIENT = 1e-5, 1e-4
Golden = Callable[[str], Path]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, golden: Golden) -> e2e.Case:
    return e2e.load_case(request.param, golden)


def test_loss_logits_and_gradients_match(case: e2e.Case) -> None:
    expected = np.load(case.folder / "outputs.npz")
    batch, arrays = case.batch(0), jax.tree.map(jnp.asarray, dict(case.arrays))
    elm = case.structure.bind(arrays)
    logits = np.asarray(jax.jit(lambda: elm.llm.logits(elm.hidden(batch)))())
    valid = logits[np.asarray(batch.group_ids) > 0][::3]
    compare(case.name, "logits", valid, expected["logits_valid_rows"], FORWARD)
    if "projections" in expected:
        signals, weights = jax.tree.map(jnp.asarray, (batch.signals, batch.signal_weights))
        found = jax.jit(lambda: elm.signal_embeddings(signals, weights))()
        projections = expected["projections"]
        compare(case.name, "signal embeddings", found.reshape(projections.shape), projections, FORWARD)
    trained = {name: x for name, x in arrays.items() if not name.startswith("encoder.")}
    frozen = {name: x for name, x in arrays.items() if name not in trained}
    micro = Batch(*(jax.tree.map(lambda x: x[None], part) for part in batch))
    loss, gradients, *_ = jax.jit(lambda x: loss_and_gradients(case.structure, x, {}, frozen, micro))(trained)
    compare(case.name, "loss", loss, expected["loss"], FORWARD)
    named = case.published(gradients)
    for name in expected.files:
        if name.startswith("grad_"):
            compare(case.name, f"gradient of {name[5:]}", named[name[5:]], expected[name], GRADIENT)
    norms = json.loads((case.folder / "grad_norms.json").read_text())
    assert set(norms) == set(named)
    for name, norm in norms.items():
        error = abs(float(np.linalg.norm(named[name])) - norm) / norm
        record(case.name, f"norm of the gradient of {name}", error, GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_training_runs_match(golden: Golden, name: str, run: str) -> None:
    """Within the README's bounds, which are what float32 (and for Muon PyTorch's bfloat16) leaves uncertain."""
    case = e2e.load_case(name, golden)
    trace = case.traces[run]
    found, label = e2e.replay(case, trace), f"{name} {run}"
    muon = trace["args"]["optimizer"] == "muon"
    compare(label, "learning rates", found.rates, trace["lrs"], 1e-6)
    compare(label, "losses", found.losses, e2e.mean_losses(trace), 1e-3 if muon else 5e-5)
    if trace["grad_norms_before_clip"]:
        compare(label, "gradient norms", found.norms, trace["grad_norms_before_clip"], 5e-3 if muon else 3e-4)
    compare(label, "L2 norms of what is trained", found.lengths, trace["param_l2_after_step"], 2e-4 if muon else 1e-4)
    largest, most = (6e-3, None) if muon else (2 * max(trace["lrs"]), 2e-5)
    _compare_final(label, case, trace["final_checksums"], case.published(found.arrays), largest, most)


def _compare_final(
    label: str,
    case: e2e.Case,
    checksums: Mapping[str, Any],
    published: dict[str, np.ndarray],
    largest: float,
    most: float | None,
) -> None:
    """All final values are within `largest`, 99.9% of them within `most`; norms of each array agree."""
    for name, sums in checksums.items():
        ours = np.asarray(published[name], np.float64)
        assert list(ours.shape) == sums["shape"], name
        length = float(np.sqrt(np.sum(ours**2)))
        record(label, f"norm of {name}", abs(length - sums["l2"]) / sums["l2"], 2e-4 if most else 2e-3)
        ends = np.concatenate([ours.ravel()[:4], ours.ravel()[-2:]])
        record(label, f"ends of {name}", np.abs(ends - np.array(sums["first"] + sums["last"])).max(), largest)
    path = case.folder / f"final_{label.split()[1]}.npz"
    if path.is_file():
        off = [_difference(published, name, value) for name, value in np.load(path).items()]
        everything = np.concatenate(off)
        record(label, "final values", everything.max(), largest)
        if most is not None:
            record(label, "99.9% of the final values", float(np.quantile(everything, 0.999)), most)


def _difference(published: dict[str, np.ndarray], name: str, value: np.ndarray) -> np.ndarray:
    """Absolute differences of a stored array, which may be some of it: 'name[flat 0:8000]' or 'name[0:8]'."""
    base, _, part = name.partition("[")
    ours = np.asarray(published[base])
    if part.startswith("flat"):
        ours = ours.ravel()[: value.size]
    elif part:
        ours = ours[: value.shape[0]]
    return np.abs(ours.astype(np.float64) - value).ravel()
