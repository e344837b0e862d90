"""Toys of each shape of objective, trained through the real loop: a pair with a reference, an encoder without an LLM,
answers that the model makes itself. What a new objective needs is a row such as these."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import logged, saved_arrays

from elm_jax.assemble import assemble
from elm_jax.config import Config
from elm_jax.data.batch import Batch, BatchShape, Group, collate
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.data.samples import Experience, Sample, Samples
from elm_jax.data.sources import Record
from elm_jax.errors import UserError
from elm_jax.inference.model import TrainedModel
from elm_jax.models.elm import ELM
from elm_jax.objectives import OBJECTIVES, Objective, Sums, log_probs, register_objective, sums_of_samples
from elm_jax.run.folder import open_folder
from elm_jax.run.weights import Weights
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.text.turns import to_turns
from elm_jax.training import loop
from elm_jax.training.rollouts import Rollouts

STEPS, CUT = 4, 2
RECORDS = "demo:train=24,val=4,test=4"

# -- a pair and a reference -----------------------------------------------------------------------------------


def pairs(record: Record) -> list[Sample]:
    *before, answer = ({"role": turn.role, "content": turn.text} for turn in to_turns(record.text))
    worse = {**answer, "content": f"not {answer['content']}, no"}
    return [Sample([*before, answer], {"better": 1.0}), Sample([*before, worse])]


def prefer(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
    mine = log_probs(model.llm, model.hidden(batch, trained, key), batch)
    margins = sums_of_samples((mine - batch.extras["reference"]) * batch.target_weights, batch).reshape(-1, 2)
    margins = 5.0 * (margins[:, 0] - margins[:, 1])
    there = _pairs(batch)
    return {"loss": -(jax.nn.log_sigmoid(margins) * there).sum(), "margin": (margins * there).sum()}


def _pairs(batch: Batch) -> jax.Array:
    return (sums_of_samples(batch.target_weights, batch).reshape(-1, 2) > 0).all(1)


def count_pairs(batch: Batch) -> Sums:
    return dict.fromkeys(("loss", "margin"), _pairs(batch).sum())


# -- an encoder alone -----------------------------------------------------------------------------------------


def contrast(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
    """Two noisy versions of one recording are nearer to each other than to those of others."""
    assert key is not None and model.llm is None and model.encoder is not None
    signals, weights = (x.reshape(-1, *x.shape[2:]) for x in (batch.signals["ecg"], batch.signal_weights))
    noisy = [signals + 0.05 * jax.random.normal(k, signals.shape) for k in jax.random.split(key)]
    found = [model.encoder(x, weights, train="encoder" in trained).mean(1) for x in noisy]
    one, two = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in found)
    alike = jnp.where(weights > 0, one @ two.T / 0.2, -1e9)
    right, own = jnp.argmax(alike, 1) == jnp.arange(len(alike)), jnp.diagonal(jax.nn.log_softmax(alike))
    return {"loss": -jnp.where(weights > 0, own, 0.0).sum(), "accuracy": (right & (weights > 0)).sum()}


def count_recordings(batch: Batch) -> Sums:
    return dict.fromkeys(("loss", "accuracy"), (batch.signal_weights > 0).sum())


# -- answers of its own ---------------------------------------------------------------------------------------


def brief(record: Record, answer: str, truth: str) -> float:
    assert truth and record.ecg_paths
    return -float(len(answer))


def centred(rewards: np.ndarray) -> np.ndarray:
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)


def reinforce(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
    mine, weights = log_probs(model.llm, model.hidden(batch, trained, key), batch), batch.target_weights
    return {
        "loss": -(batch.extras["advantage"] * mine * weights).sum(),
        "reward": (batch.extras["reward"] * weights).sum(),
    }


def count_tokens(batch: Batch) -> Sums:
    return dict.fromkeys(("loss", "reward"), batch.target_weights.sum())


TOYS = {
    "toy_pairs": Objective(prefer, count_pairs, Samples(pairs, extras=("better",)), frozenset({"llm", "reference"})),
    "toy_contrast": Objective(contrast, count_recordings, Samples(phase=None), frozenset({"encoder", "key"})),
    "toy_answers": Objective(
        reinforce, count_tokens,
        Samples(extras=("advantage", "reward"), experience=Experience(brief, centred, answers=3, tokens=4)),
    ),
}  # fmt: skip
OF_TOYS: dict[str, dict[str, Any]] = {
    "toy_pairs": {"data__max_len": 128},
    "toy_contrast": {"update": "encoder", "encoder__tokens": 2},
    "toy_answers": {"data__max_len": 128, "optim__lr": 1e-2},
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The toys are registered, and a run has one device: what is compiled for eight takes long."""
    runs.prepare(monkeypatch, tmp_path_factory.getbasetemp() / "objectives")
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    for name, toy in TOYS.items():
        register_objective(name, toy)
    yield
    for name in TOYS:
        del OBJECTIVES[name]


def config(folder: Path, name: str, **changes: Any) -> Config:
    usual = {
        "objective": name, "data__names": [RECORDS], "train__steps": STEPS, "train__batch_size": 4,
        "train__save_every": CUT, "train__eval_every": CUT, "optim__schedule": "constant", "optim__warmup_ratio": 0.0,
    }  # fmt: skip
    return runs.config(folder, **{**usual, **OF_TOYS[name], **changes})


def step_of(made: Config, dataset: Any = None) -> tuple[Any, StepSource]:
    """The parts of a run, and the source of its steps."""
    parts = assemble(made)
    dataset = parts.dataset("train") if dataset is None else dataset
    index = dataset.length_index("none", 0)
    return parts, StepSource(dataset, Plan(index, rows=2, max_len=128, pack=True, seed=0), steps=STEPS)


@pytest.mark.slow  # three runs of each toy
@pytest.mark.parametrize("name", TOYS)
def test_a_toy_trains_and_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert loop.train(config(whole, name))
    assert loop.train(config(stopped, name, train__steps=CUT))
    assert loop.train(config(stopped, name))
    assert logged(stopped) == logged(whole) and set(logged(whole)) == set(range(1, STEPS + 1))
    own = {"toy_pairs": "margin", "toy_contrast": "accuracy", "toy_answers": "reward"}[name]
    lines = [line for line in runs.lines(whole) if "loss" in line]
    assert all(np.isfinite(line["loss"]) and own in line for line in lines)
    assert [f"val_{own}" in line for line in lines] == [False, True] * (STEPS // CUT)
    if name != "toy_answers":  # whose loss is no measure
        assert lines[-1]["val_loss"] < lines[CUT - 1]["val_loss"]
    first, last = saved_arrays(whole, STEPS), saved_arrays(stopped, STEPS)
    assert first.keys() == last.keys()
    for array, value in first.items():
        np.testing.assert_array_equal(value, last[array], err_msg=array)
    assert (whole / "tokenizer").exists() == ("llm" in TOYS[name].needs)
    assert (whole / "reference").exists() == ("reference" in TOYS[name].needs)


@pytest.mark.slow  # two models are compiled
def test_what_an_encoder_has_learnt_alone_begins_a_model_that_answers(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert loop.train(config(alone, "toy_contrast", train__steps=1))
    with pytest.raises(UserError, match="toy_contrast, of an encoder alone; expected one with an LLM"):
        TrainedModel(config(alone, "toy_contrast", train__steps=1))
    begun = runs.config(
        tmp_path / "begun", data__names=[RECORDS], init_from=str(alone), init_missing_ok="connector,llm",
        train__batch_size=4, update="connector,llm", encoder__tokens=2,
    )  # fmt: skip
    trainer = loop.Trainer(begun, open_folder(begun))
    trainer._build()
    saved = {name.partition("['"): value for name, value in saved_arrays(alone, 1).items()}
    learnt = {array.removesuffix("']"): x for (item, _, array), x in saved.items() if item in ("trained", "statistics")}
    assert learnt.keys() == {name for name in trainer.frozen if name.startswith("encoder.")}
    for name, value in learnt.items():
        np.testing.assert_array_equal(np.asarray(trainer.frozen[name]), value, err_msg=name)


def test_a_pair_begins_at_log_two_and_is_computed_as_in_rows_of_its_own(tmp_path: Path) -> None:
    made = config(tmp_path, "toy_pairs")
    parts, source = step_of(made)
    batch = jax.tree.map(lambda x: x[0], source[0].batch)
    samples = [sample for sample in batch.sample_ids.reshape(-1).tolist() if sample >= 0]
    assert samples[::2] == samples[1::2] and (batch.branch_ids > 1).any()  # both, behind a prefix
    mesh = make_mesh(made.mesh, jax.devices()[:1])
    arrays = Weights(parts).place(array_shardings(parts.structure, mesh))

    def of_samples(batch: Batch) -> np.ndarray:
        elm = parts.structure.bind(arrays)
        return np.asarray(sums_of_samples(log_probs(elm.llm, elm.hidden(batch), batch), batch))

    packed = of_samples(batch)
    dataset = source.dataset
    alone = []
    for index in samples[::2]:
        for c in dataset.conversations(index, dataset.signals(index), 0):
            row = collate([[Group(0, [c])]], BatchShape(128, 1, 64), parts.signal.layout, ("better",))
            alone.append(of_samples(row)[0, 0])
    np.testing.assert_allclose(packed[batch.sample_ids >= 0], alone, rtol=2e-4)
    batch.extras["reference"] = log_probs_of(parts, arrays, batch)
    sums, counts = prefer(parts.structure.bind(arrays), batch, None, ()), count_pairs(batch)
    assert float(sums["loss"] / counts["loss"]) == pytest.approx(np.log(2), abs=1e-5)
    assert int(counts["loss"]) == len(samples) // 2


def log_probs_of(parts: Any, arrays: Any, batch: Batch) -> Any:
    elm = parts.structure.bind(arrays)
    return log_probs(elm.llm, elm.hidden(batch), batch)


def test_answers_depend_on_seed_step_and_record_alone(tmp_path: Path) -> None:
    parts, source = step_of(config(tmp_path, "toy_answers"))
    mesh = make_mesh(parts.config.mesh, jax.devices()[:1])
    arrays = Weights(parts).place(array_shardings(parts.structure, mesh))
    first = list(Rollouts(parts, mesh).steps(source, 0, lambda: arrays))
    later = next(Rollouts(parts, mesh).steps(source, 2, lambda: arrays))
    jax.tree.map(np.testing.assert_array_equal, first[2].batch, later.batch)
    batch = jax.tree.map(lambda x: x[0], later.batch)
    told = {int(i): set() for i in batch.sample_ids[batch.sample_ids >= 0]}
    for row, place in np.argwhere(batch.target_weights > 0):
        told[int(batch.sample_ids[row, batch.target_sample[row, place]])].add(float(batch.extras["reward"][row, place]))
    assert told and any(len(rewards) > 1 for rewards in told.values())  # one prompt is answered in several ways
    assert abs(float((batch.extras["advantage"] * (batch.target_weights > 0)).max())) > 0
