"""The options of a run that the demo leaves as they are: each trains in bfloat16, and is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from texts import write_records

from elm_jax.config import MeshConfig
from elm_jax.evaluation.evaluator import evaluate, results_folder
from elm_jax.folders import read_json
from elm_jax.inference import model
from elm_jax.runtime.mesh import make_mesh
from elm_jax.training import loop

STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "pretrain": {"phase": "pretrain"},
    "only_text": {"data__perturb": "only_text", "data__share": "none"},
    "unpacked": {"data__pack": False, "llm__scan": False},
    "thinking": {"data__explicit_thinking": True, "data__share": "ecg"},
    "two_ecgs": {"data__share": "system"},
}
RECORDINGS = 12


def questions(folder: Path, kind: str) -> None:
    """Records with answers that begin with a thought, some without one; or about two ECGs each."""
    numbers = range(RECORDINGS)
    if kind == "thinking":
        said = ["<think>\nIt beats.</think> yes" if i % 3 else "no" for i in numbers]
        texts = [["x", "Is it regular?", [answer]] for answer in said]
        paths: list[Any] = [f"demo:train:{i}" for i in numbers]
    else:
        texts = [["x", f"From <ecg> to <ecg>: {'faster' if i % 2 else 'worse'}?", ["no"]] for i in numbers]
        paths = [[f"demo:train:{i}", f"demo:train:{i + 1}"] for i in numbers]
    write_records(folder, texts, paths)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_learns_and_is_evaluated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.prepare(monkeypatch, tmp_path / "cache")
    for module in (loop, model):  # eight devices compile several times as long
        monkeypatch.setattr(module, "make_mesh", lambda _: make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    changes = {
        "data__names": ["demo:train=8,val=4,test=4"], "data__val_fraction": 0.0, "data__max_len": 128,
        "llm__compute_dtype": "bfloat16", "optim__lr": 1e-2, "train__batch_size": 4, "train__steps": STEPS,
        "train__save_every": STEPS, "eval__controls": [], "eval__limit": 6, "eval__batch_size": 8,
        "eval__max_new_tokens": 4,
    } | OPTIONS[name]  # fmt: skip
    if name in ("thinking", "two_ecgs"):
        questions(tmp_path, name)
        changes |= {"data__names": ["records.jsonl"], "data__root": str(tmp_path)}
    config = runs.config(tmp_path / "run", **changes)
    loop.train(config)
    losses = [values["loss"] for values in runs.logged(tmp_path / "run").values()]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < 0.8 * losses[0], losses
    evaluate(config, "train")
    results = read_json(results_folder(config, "train") / "metrics.json")
    assert results["n"] == 6 and results["bad"] == 0
