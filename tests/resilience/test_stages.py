"""A run that starts from another one: what it inherits and freezes is there when it resumes, answers, is started from.

In bfloat16, the default, with the parts that stages usually freeze.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runs

from elm_jax.runtime.checkpoint import Checkpoints

HALF = {"llm__compute_dtype": "bfloat16", "train__steps": 3}


def train(workdir: Path, **changes: object) -> None:
    runs.finish_all([runs.start(workdir, **{**HALF, **changes})])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains everything."""
    folder = tmp_path_factory.mktemp("stages") / "first"
    train(folder, update="encoder,connector,llm")
    return folder


@pytest.mark.slow
def test_a_frozen_part_that_was_inherited_stays_with_the_run(first: Path) -> None:
    second, third = first.parent / "second", first.parent / "third"
    train(second, update="connector", init_from=str(first))
    train(second, update="connector", init_from=str(first), train__steps=6)  # goes on, with the same encoder
    assert [line["step"] for line in runs.lines(second) if line.get("event") == "resume"] == [3]
    train(third, update="connector", init_from=str(second))
    frozen = [Checkpoints(folder, read_only=True).meta(step)["frozen"] for folder, step in ((second, 6), (third, 3))]
    assert frozen[0] == frozen[1] and set(frozen[0]) == {"encoder", "llm"}


@pytest.mark.slow
def test_a_part_may_be_frozen_first_and_trained_later(first: Path) -> None:
    one, two = first.parent / "connector", first.parent / "all"
    train(one, update="connector")
    train(two, update="connector,llm", init_from=str(one))
    losses = [line["loss"] for line in runs.lines(two) if "loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.slow
def test_other_data_on_resume_is_refused(first: Path) -> None:
    folder = first.parent / "data"
    prompt = first.parent / "prompt.txt"
    prompt.write_text("Read the ECG.")
    train(folder, data__system_prompt=str(prompt), data__max_len=96)
    prompt.write_text("Read this ECG now.")
    process = runs.start(folder, **{**HALF, "data__system_prompt": str(prompt), "data__max_len": 96, "train__steps": 6})
    errors = runs.finish_all([process], expect=2)
    assert "other data" in errors[0]


@pytest.mark.slow
def test_a_run_that_diverges_is_no_success(first: Path) -> None:
    folder = first.parent / "diverged"
    process = runs.start(folder, **{**HALF, "optim__lr": 1e30, "train__steps": 30, "train__log_every": 10})
    errors = runs.finish_all([process], expect=2)
    assert "optim.lr" in errors[0] and not (folder / "DONE").exists()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(event.get("event") == "non_finite" for event in events)
