"""A run that starts from another one: what it inherits and freezes is there when it resumes, answers, is started from.

In bfloat16, the default, with the parts that stages usually freeze.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runs

from elm_jax.run.checkpoint import Checkpoints

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


LORA = {"llm__lora__rank": 4, "llm__lora__alpha": 8.0}


@pytest.mark.slow  # long: four trainings, each from the one before
def test_an_adapter_goes_from_stage_to_stage_and_in_and_out_of_a_folder(first: Path) -> None:
    one, two, three = (first.parent / f"adapter_{n}" for n in (1, 2, 3))
    train(one, update="connector,llm", init_from=str(first), llm__lora__dropout=0.1, **LORA)
    train(two, update="connector", init_from=str(one), **LORA)  # the adapter is frozen now, and kept
    train(three, update="connector,llm", init_from=str(two), **LORA)
    frozen = Checkpoints(two, read_only=True).meta(3)["frozen"]
    assert set(frozen) == {"encoder", "llm", "llm.lora"}
    assert set(Checkpoints(three, read_only=True).meta(3)["frozen"]) == {"encoder", "llm"}
    assert not (two / "adapter").exists(), "what is not trained is not written"
    fields = json.loads((one / "adapter" / "adapter_config.json").read_text())
    assert fields["r"] == 4 and fields["lora_alpha"] == 8
    fourth = first.parent / "adapter_4"
    train(fourth, update="connector,llm", init_from=str(first), llm__lora__adapter=str(one / "adapter"))
    trained = Checkpoints(fourth, read_only=True)
    assert any("lora" in name for name in runs.saved_arrays(fourth, 3)) and trained.find("latest") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llm__lora__rank": 4, "llm__lora__alpha": 1.0}, "llm.lora: found rank 4, alpha 1, targets all; expected"),
        ({}, "llm.lora: found none; expected that of"),
        ({"llm__lora__rank": 4, "update": "connector"}, ""),
    ],
)
def test_an_adapter_that_would_mean_something_else_is_refused(first: Path, changes: dict, says: str) -> None:
    source = first.parent / "adapted"
    if not source.exists():
        train(source, update="connector,llm", init_from=str(first), **LORA)
    options = {**HALF, "update": "connector,llm", "init_from": str(source), **changes}
    if not says:  # an adapter that nothing trains and nothing brings
        options["init_from"], says = "None", "llm.lora.rank: found 4; expected 0 where update leaves the LLM out"
    (errors,) = runs.finish_all([runs.start(first.parent / f"refused_{len(changes)}", **options)], expect=2)
    assert says in errors
