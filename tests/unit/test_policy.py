"""Policy and preference objectives through the real loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import logged, saved_arrays

from elm_jax.assemble import assemble
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config, DataConfig
from elm_jax.data.batch import BLOCK, BatchShape, empty_batch, visible_blocks
from elm_jax.data.loader import Loaded, StepSource
from elm_jax.data.plan import Plan
from elm_jax.data.represent import SignalSpec
from elm_jax.data.samples import _last_of
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.beats.measurements import measure
from elm_jax.ecg.beats.words import describe
from elm_jax.errors import UserError
from elm_jax.objectives import objective_of
from elm_jax.objectives.policy import ADVANTAGES, judge_of
from elm_jax.objectives.preference import Preference
from elm_jax.runtime.mesh import make_mesh
from elm_jax.scoring.rewards import REWARDS, judged, register_reward
from elm_jax.text.render import decode
from elm_jax.training import loop

RECORDS = "demo:train=24,val=4,test=4"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run has one device: what is compiled for eight takes long."""
    runs.prepare(monkeypatch, tmp_path_factory.getbasetemp() / "policy")
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    register_reward("even", lambda answered: len(answered.answer) % 5)
    yield
    del REWARDS["even"]


def config(folder: Path, **changes: Any) -> Config:
    usual = {
        "objective": "sapo", "data__names": [RECORDS], "train__steps": 4, "train__batch_size": 4,
        "train__save_every": 2, "train__eval_every": 2, "optim__schedule": "constant", "optim__warmup_ratio": 0.0,
        "data__max_len": 256, "optim__lr": 1e-2, "rl__answers": 3, "rl__max_new_tokens": 4, "rl__show_every": 1,
        "rl__rewards": ["exact", "even"],
    }  # fmt: skip
    return runs.config(folder, **{**usual, **changes})


@pytest.mark.slow  # trains three times
@pytest.mark.parametrize("name", ["sapo", "dapo"])
def test_a_policy_trains_and_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = {"rl__kl": 0.1, "rl__skip_truncated": False} if name == "dapo" else {}
    assert loop.train(config(whole, objective=name, **more))
    assert loop.train(config(stopped, objective=name, train__steps=2, **more))
    assert loop.train(config(stopped, objective=name, **more))
    assert logged(stopped) == logged(whole) and set(logged(whole)) == {1, 2, 3, 4}
    first, last = saved_arrays(whole, 4), saved_arrays(stopped, 4)
    for array, value in first.items():
        np.testing.assert_array_equal(value, last[array], err_msg=array)
    lines = [line for line in runs.lines(whole) if "loss" in line]
    told = {"reward", "reward.exact", "reward.even", "degenerate", "empty", "truncated", "answer_tokens", "ratio"}
    assert all(told <= line.keys() for line in lines) and "val_reward" in lines[1]
    # The first update learns from answers of its own weights, the second one no longer.
    assert [line["ratio"] for line in lines[::2]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(abs(line["kl_from_old"]) < 1e-5 for line in lines[::2])
    assert any(abs(line["kl_from_old"]) > 1e-6 for line in lines[1::2])
    tables = sorted(path.name for path in (whole / "rollouts").iterdir())
    assert tables == ["step-000000.md", "step-000002.md"]
    assert "| reward | exact | even | answer |" in (whole / "rollouts" / tables[0]).read_text()


def pairs(folder: Path) -> Path:
    """Questions about noise, of which the longer answer is preferred; in three forms."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(24):
        asked, good, bad = f"What is the rate of number {i}?", f"It is {60 + i} a minute.", "No."
        form = i % 3
        row: dict[str, Any] = {"ecg_path": "noise", "patient_id": i, "rejected": bad}
        if form == 0:
            row |= {"prompt": asked, "chosen": good}
        elif form == 1:
            row |= {
                "prompt": [{"role": "user", "content": asked}], "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }  # fmt: skip
        else:
            row |= {"text": [{"from": "human", "value": asked}, {"from": "gpt", "value": good}]}
        rows.append(row)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow  # trains
def test_preferences_move_the_margin(tmp_path: Path) -> None:
    made = config(
        tmp_path / "run", objective="dpo", data__names=[str(pairs(tmp_path / "data"))], data__val_fraction=0.2,
        train__steps=6, optim__lr=1e-3, train__eval_every=3, train__save_every=3,
    )  # fmt: skip
    assert loop.train(made)
    lines = [line for line in runs.lines(tmp_path / "run") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and abs(lines[0]["margin"]) < 1e-3
    assert lines[-1]["val_margin"] > lines[2]["val_margin"] > 0 and lines[-1]["val_accuracy"] == 1.0
    assert (tmp_path / "run" / "reference").is_dir()


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_the_margin_moves_as_theory_says(loss: str, smoothing: float) -> None:
    """A model that is a table of three answers: what a gap of log probabilities gains in a step is known."""
    beta, rate, gap = 0.5, 0.1 if loss == "ipo" else 1.0, 0.0
    rules, reference = Preference(loss, beta, smoothing), jnp.asarray([0.3, -0.2, 1.0])
    batch = empty_batch(BatchShape(64, 1, 2), {}, 1)._replace(
        target_weights=np.ones((1, 2), np.float32), target_sample=np.array([[0, 1]], np.int32),
        extras={"reference": jax.nn.log_softmax(reference)[None, :2]},
    )  # fmt: skip

    def total(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = rules.pairs(jax.nn.log_softmax(table)[None, :2], batch)
        return found["loss"].sum(), found["margin"].sum()

    step, table = jax.jit(jax.grad(total, has_aux=True)), reference
    for _ in range(400):
        gradient, margin = step(table)
        assert float(margin) == pytest.approx(beta * gap, abs=1e-4)
        x = beta * gap
        if loss == "ipo":
            slope = 2 * (gap - 1 / (2 * beta))
        else:
            slope = beta * (smoothing / (1 + np.exp(-x)) - (1 - smoothing) / (1 + np.exp(x)))
        gap -= 2 * rate * slope  # it has a part in both answers; the normaliser has none
        table = table - rate * gradient
    end = {("sigmoid", 0.2): np.log(4.0), ("ipo", 0.0): 0.5}.get((loss, smoothing))
    assert beta * gap > 1.5 if end is None else beta * gap == pytest.approx(end, abs=1e-3)


def test_the_chosen_answer_can_be_held_likely() -> None:
    """RPO adds the mean of -log p over the chosen answer's tokens, against no reference."""
    weights, samples = np.array([[1, 1, 1, 0]], np.float32), np.array([[0, 0, 1, 1]], np.int32)
    batch = empty_batch(BatchShape(64, 1, 4), {}, 1)._replace(
        target_weights=weights, target_sample=samples, extras={"reference": jnp.asarray([[-2.0, -0.5, -1.0, 0.0]])}
    )  # fmt: skip
    new = jnp.asarray([[-1.0, -0.2, -3.0, -9.0]])
    plain, held = (Preference(rpo_alpha=alpha).pairs(new, batch) for alpha in (0.0, 0.5))
    assert float((held["loss"] - plain["loss"]).sum()) == pytest.approx(0.5 * 0.6)
    assert all((held[name] == plain[name]).all() for name in plain if name != "loss")


def test_of_a_pair_the_last_answer_alone_is_learnt(tmp_path: Path) -> None:
    made = config(tmp_path / "run", objective="dpo", data__max_len=256)
    dataset = assemble(made).dataset("train")
    turns = [("user", "Is it regular?"), ("assistant", "It is."), ("user", "How fast?"), ("assistant", "60.")]
    text = [{"role": role, "content": said} for role, said in turns]
    record = replace(dataset.records[0], text=text, rejected="90.")
    assert dataset.samples.of is not None
    for sample, answer in zip(dataset.samples.of(record), ("60.", "90."), strict=True):
        found = dataset.conversation(0, dataset.signals(0), 0, sample.text)
        ids = found.ids[_last_of(found.supervised)]
        assert sample.last and answer in decode(ids, dataset.tokenizer, dataset.text.family)
        assert found.supervised.sum() > len(ids)
    with pytest.raises(UserError, match="rejected: found an empty answer"):
        dataset.samples.of(replace(record, rejected=" "))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_answers_that_are_equally_good_teach_nothing(name: str) -> None:
    found = ADVANTAGES[name](np.array([[0.7, 0.7, 0.7], [0.0, 0.7, 1.0]]))
    assert (found[0] == 0).all() and found[1, 0] < 0 < found[1, 2]


@pytest.mark.parametrize("averages", [True, False])
def test_validations_are_answered_by_the_weights_that_are_judged(averages: bool, tmp_path: Path) -> None:
    trainer: Any = object.__new__(loop.Trainer)
    made: list[Any] = []
    trainer.config = config(tmp_path, optim__ema=0.9, eval__ema=averages)
    trainer.mesh, trainer.validation, trainer.probe = make_mesh(trainer.config.mesh, jax.devices()[:1]), "val", None
    trainer.frozen, trainer.better = {}, ""
    trainer.state = SimpleNamespace(trained={"w": "raw"}, statistics={}, average={"w": "average"})
    trainer.history = {"best_val_loss": None, "val_losses": []}
    trainer.health = SimpleNamespace(note=lambda step, bad: None)
    trainer.rollouts = SimpleNamespace(
        steps=lambda source, first, arrays: made.append(arrays()) or iter([Loaded(0, cast(Any, {}), 0, 0, ())])
    )
    judged = SimpleNamespace(eval_step=lambda arrays, batch: made.append(arrays) or ({"loss": 1}, {"loss": 1}))
    trainer.program = SimpleNamespace(eval_step=judged.eval_step, redraw=None)
    assert trainer._validate(1) == {"val_loss": 1.0}
    assert made == 2 * [{"w": "average" if averages else "raw"}]


def test_rows_of_answers_may_be_shorter_than_planned(tmp_path: Path) -> None:
    """Where those behind a short answer stand, and which blocks they see, is known when it is given."""
    sizes = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64, "max_len": 1024}
    made = config(tmp_path / "run", data__max_len=1024, llm__scratch=sizes)
    dataset = assemble(made).dataset("train")
    index = dataset.length_index("none", 0)
    source = StepSource(dataset, Plan(index, rows=2, max_len=1024, pack=True, seed=0), steps=1)
    rows = source.plan.rows(0)
    most, rng = source.empty(rows).key_blocks.shape[-1], np.random.default_rng(0)
    assert 0 < most < 1024 // BLOCK
    prompts = (index.length - index.targets)[[i for group in rows[0] for i in group.samples]].tolist()
    for _ in range(50):
        spans = [(prompt, rng.integers(1, 5, 3).tolist()) for prompt in prompts]
        assert visible_blocks(spans, 1024).sum(1).max() <= most


def test_a_record_without_a_rejected_answer_is_named(tmp_path: Path) -> None:
    made = config(tmp_path / "run", objective="dpo", data__max_len=256)
    parts = assemble(made)
    assert "reference" in parts.objective.needs
    with pytest.raises(UserError, match="record demo:.*: found no rejected answer"):
        parts.objective.samples.measure(parts.dataset("train"), 0)


def test_a_pair_that_cannot_be_learnt_is_said_with_how_many_may_be_so(tmp_path: Path) -> None:
    path = pairs(tmp_path / "data")
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({"ecg_path": "noise", "prompt": "What?", "chosen": "No.", "rejected": "No."})
    lines[6] = json.dumps({"ecg_path": "noise", "prompt": "What?", "chosen": "No."})
    path.write_text("\n".join(lines))
    made = config(tmp_path / "run", objective="dpo", data__names=[str(path)], data__val_fraction=0.0)
    dataset = assemble(made).dataset("train")
    beside = [dataset.samples.beside(record) for record in dataset.records]
    assert beside == [True if i == 3 else None for i in range(24)]  # so that no run that has learnt it goes on
    with pytest.raises(UserError, match="pairs.jsonl:3: found the chosen answer again; .*bad_records"):
        dataset.length_index("none", 0.0)
    says = r"pairs.jsonl:6: found no rejected answer; .*; at most 1 of 24 bad records .data.max_bad_records.;"
    with pytest.raises(UserError, match=says):
        dataset.length_index("none", 0.05)
    assert (dataset.length_index("none", 0.1).length == 0).nonzero()[0].tolist() == [3, 6]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rl__rewards": ["formt"]}, "rl.rewards: found 'formt'"),
        ({"rl__rewards": []}, "rl.rewards"),
        ({"rl__rewards": ["numeric(0)"]}, "above 0"),
        ({"rl__rewards": ["exact"], "rl__reward_weights": [1.0, 2.0]}, "rl.reward_weights"),
        ({"objective": "dpo", "dpo__loss": "ipo", "dpo__label_smoothing": 0.1}, "dpo.label_smoothing"),
        ({"objective": "dpo", "dpo__label_smoothing": 0.6}, "below 0.5"),
        ({"objective": "dpoo"}, "config.objective: found 'dpoo'"),
    ],
)
def test_what_cannot_be_learnt_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        objective_of(config(tmp_path, **changes))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("2", "even='2'"),
        (None, "even=None"),
        ([1.0], "even=[1.0]"),
        (float("inf"), "even=inf"),
        (KeyError("rate"), "KeyError: 'rate'"),
    ],
)
def test_what_a_reward_returns_is_a_number_or_said(
    returned: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reward(_: Any) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    monkeypatch.setitem(REWARDS, "even", reward)
    judge = judge_of(config(tmp_path, rl__rewards=["exact", "even"], rl__reward_weights=[1.0, 2.0]))
    with pytest.raises(UserError) as error:
        judged(judge, None, "60", "60")
    assert str(error.value) == f"the reward: found {says}; expected a finite number; mend its function"
    monkeypatch.setitem(REWARDS, "even", lambda _: np.int64(3))
    judge = judge_of(config(tmp_path, rl__rewards=["exact", "even"], rl__reward_weights=[1.0, 2.0]))
    assert judged(judge, None, "60", "60") == {"exact": 1.0, "even": 6.0}


def test_a_run_is_saved_where_new_answers_are_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.save_every: found 3; expected a multiple of rl\.updates=2"):
        loop.train(config(tmp_path / "run", train__save_every=3))


@pytest.mark.parametrize("name", ["dpo", "rl/sapo", "rl/grpo", "rl/dapo"])
def test_a_config_names_its_objective(name: str) -> None:
    made = ConfigFlags.parse(["--config", f"configs/{name}.py", "--config.init_from=runs/before"]).load()
    objective, experience = objective_of(made), objective_of(made).samples.experience
    assert made.objective == name.removeprefix("rl/") and (experience is None) == (name == "dpo")
    if experience is not None:
        answers = experience.answers * experience.tokens
        assert made.data.max_len > answers and made.train.save_every % experience.updates == 0
    assert ("reference" in objective.needs) == (name == "dpo")


def test_the_reward_of_evidence_knows_the_ecg_and_measures_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[str] = []
    load = SignalSpec.recorded
    monkeypatch.setattr(SignalSpec, "recorded", lambda self, path, key: times.append(path) or load(self, path, key))
    data = {"data__names": [RECORDS], "data__segment_len": 2500, "data__sampling_rate": 250, "data__perturb": "noise"}
    judge = judge_of(runs.config(Path("x"), rl__rewards=["grounding", "exact"], **data))
    record = load_records(runs.config(Path("x"), **data).data, "train", 0)[0]
    signal = load(signal_spec(DataConfig(), 0), record.ecg_paths[0], 0)[0]
    right = describe(measure(signal, 250.0))
    assert judged(judge, record, right, "")["grounding"] == 1.0
    worse = judged(judge, record, f"{right} Heart rate 300 bpm.", "")["grounding"]
    assert 0.5 < worse < 1.0 and judged(judge, record, "yes", "")["grounding"] == 0.0
    assert times == [record.ecg_paths[0]]
    assert judged(judge, replace(record, ecg_paths=()), right, "")["grounding"] == 0.0
