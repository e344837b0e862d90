"""A step that would spoil a run changes nothing but the step number, and is told of with its samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SIGNAL_LAYOUT, RandomConversations, stack_micro_batches, tiny_elm

from elm_jax.config import MeshConfig, resolve
from elm_jax.data.batch import Batch, BatchShape, Group, collate
from elm_jax.errors import UserError
from elm_jax.runtime.mesh import array_shardings, batch_sharding, make_mesh, to_device
from elm_jax.training import step as step_module
from elm_jax.training.health import SKIPPED_LIMIT, Health
from elm_jax.training.loop import Trainer
from elm_jax.training.optim import make_optimizer
from elm_jax.training.report import Report
from elm_jax.training.spikes import LEAST, WINDOW, Recent
from elm_jax.training.state import abstract_state, new_state, split_names

FAULTS = ("none", "loss", "leaf", "infinite", "overflow", "statistic", "signal", "spike")
UPDATE = ("encoder", "connector", "llm")
SETTINGS = {"optim": {"accum_steps": 2, "grad_clip": 1.0, "skip_spikes": 6.0, "ema": 0.9}, "train": {"batch_size": 8}}


def spoiled(loss_and_gradients: Callable[..., Any]) -> Callable[..., Any]:
    """As it is, with what the batch's extras "fault" ask for put in."""

    def wrapped(structure: Any, trained: Any, statistics: Any, frozen: Any, batch: Batch, *rest: Any) -> Any:
        fault = batch.extras["fault"].max().astype(jnp.int32)
        batch = batch._replace(extras={})
        loss, gradients, statistics, sums = loss_and_gradients(structure, trained, statistics, frozen, batch, *rest)

        def put(value: jax.Array, name: str, wrong: float) -> jax.Array:
            flat = value.ravel()
            return jnp.where(fault == FAULTS.index(name), flat.at[-1].set(wrong), flat).reshape(value.shape)

        first, moved = min(gradients), min(statistics)
        leaf = put(put(put(gradients[first], "leaf", np.nan), "infinite", np.inf), "overflow", 1e25)
        statistics = {**statistics, moved: put(statistics[moved], "statistic", np.inf)}
        return put(put(loss, "loss", np.nan), "spike", 1e6), {**gradients, first: leaf}, statistics, sums

    return wrapped


class Run:
    """A small model on two devices, in two micro-batches; a spike is skipped."""

    def __init__(self) -> None:
        structure, arrays = tiny_elm()
        config, self.mesh = resolve(SETTINGS), make_mesh(MeshConfig(), jax.devices()[:2])
        shardings = array_shardings(structure, self.mesh)
        trained, moving, _ = split_names(structure, UPDATE)
        tx = make_optimizer(config.optim, config.train, 1000)
        like = abstract_state(structure, trained, moving, tx, self.mesh, shardings, averages=True)
        self.state: Any = new_state({n: jax.device_put(x, shardings[n]) for n, x in arrays.items()}, like, tx)
        layout = jax.tree.map(lambda x: x.sharding, like)
        self.step = step_module.make_train_step(structure, config, tx, self.mesh, layout, {})
        talk = RandomConversations(1)
        rows = [[Group(0, [talk.ask(talk.recording())])] for _ in range(8)]
        shape = BatchShape(32, 2, 4)
        self.batch = stack_micro_batches([collate(part, shape, SIGNAL_LAYOUT) for part in (rows[:4], rows[4:])])

    def take(self, fault: str = "none") -> dict[str, Any]:
        """A step; its metrics."""
        marked = np.zeros_like(self.batch.target_weights)
        marked[1, -1] = FAULTS.index(fault)  # what only the second device has, in the second micro-batch
        signals = {"ecg": self.batch.signals["ecg"].copy()}
        if fault == "signal":
            signals["ecg"][1, -1, 0, 0, 0] = np.nan
        batch = self.batch._replace(signals=signals, extras={"fault": marked})
        placed = jax.tree.map(lambda x: to_device(self.mesh, x, batch_sharding(self.mesh), row_axis=1), batch)
        self.state, metrics = self.step(self.state, {}, placed)
        return jax.device_get(metrics)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "loss_and_gradients", spoiled(step_module.loss_and_gradients))
        made = Run()
        assert made.take()["taken"]
        yield made


def differences(one: Any, other: Any) -> list[str]:
    """Which leaves are not the same bits."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    return [jax.tree_util.keystr(path) for (path, a), b in pairs if a.tobytes() != b.tobytes()]


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("none", "spike")])
def test_what_is_not_finite_never_enters_the_state(run: Run, fault: str) -> None:
    """In a loss, one leaf of the gradients, a norm that overflows, a statistic, or the signals of one device."""
    before = jax.device_get(run.state)
    metrics = run.take(fault)
    assert not metrics["finite"] and not metrics["taken"]
    after = jax.device_get(run.state)
    assert differences(before, after) == [".step"] and after.step == before.step + 1
    assert run.take()["taken"] and len(differences(after, jax.device_get(run.state))) > 20


def test_a_spike_is_skipped_and_known(run: Run) -> None:
    while run.state.optimizer.recent.seen < LEAST:
        assert run.take()["taken"]
    before = jax.device_get(run.state)
    metrics = run.take("spike")
    assert metrics["finite"] and not metrics["taken"]
    after = jax.device_get(run.state)
    assert differences(before, after) == [".step", ".optimizer.recent.values", ".optimizer.recent.seen"]
    assert after.optimizer.recent.values.max() < 1e3, "a spike would hide those after it"
    assert run.take()["taken"] and not run.take("spike")["taken"]


def judged(values: list[float], xp: Any) -> tuple[list[bool], Recent]:
    recent, found = Recent.none(xp), []
    for value in values:
        spike, _, recent = recent.judge(xp.stack([xp.asarray(value), xp.asarray(1.0)]), 6.0, xp)
        found.append(bool(spike))
    return found, recent


def test_both_places_judge_alike_and_a_level_that_stays_is_learnt() -> None:
    rng = np.random.default_rng(0)
    usual = (2 + 0.1 * rng.standard_normal(WINDOW + 40)).tolist()
    values = [9.0, *usual, 5.0, *usual[:3], *(np.asarray(usual[:60]) + 4).tolist()]
    found, recent = judged(values, np)
    spikes = np.flatnonzero(found)
    shift = len(usual) + 5
    assert spikes[0] == len(usual) + 1 and spikes[1] == shift and 5 < len(spikes) < 30
    assert not any(found[spikes[-1] + 1 :]), "the new level is the usual one"
    assert np.isclose(recent.values[0].max(), max(values[-60:]), rtol=0.2)
    on_device, _ = judged(values, jnp)
    assert on_device == found


def test_after_steps_that_were_all_alike_none_is_a_spike() -> None:
    found, _ = judged([*[0.0] * 2 * LEAST, 1.0], np)
    assert not any(found)


@pytest.mark.parametrize(("losses", "stops"), [
    ([2.0, 1.0, 1.0, 1.0], True), ([np.nan, 1.0, 1.0, 1.0], True), ([1.0, np.nan, np.nan], True),
    ([np.nan, np.nan, 1.0], False), ([np.nan, 2.0, np.nan, 3.0], True), ([2.0, 1.0, np.nan], False),
])  # fmt: skip
def test_a_validation_that_is_not_finite_beats_nothing(losses: list[float], stops: bool) -> None:
    config = resolve({"train": {"early_stopping": True, "patience": 2}})
    run: Any = SimpleNamespace(config=config, history={"val_losses": losses})
    assert Trainer._stops_early(run) is stops


# -- what is told -------------------------------------------------------------------------------------------------

Watch = Callable[..., Health]
IDS = ["records.jsonl:4", "records.jsonl:0", "records.jsonl:2", "records.jsonl:1"]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Health of a run of so many steps, each of which has the samples 4, 0, 2 and 1."""
    made = []

    def build(steps: int = 1000, arrays: dict[str, Any] | None = None, **optim: Any) -> Health:
        config, mesh = resolve({"log": {"progress": False}, "optim": optim}), make_mesh(MeshConfig(), jax.devices()[:1])
        report = Report(tmp_path, config, mesh, None, 0, steps)
        made.append(report)
        records = [SimpleNamespace(id=f"records.jsonl:{n}", ecg_paths=(f"ecg_{n // 2}.npy",)) for n in range(5)]
        plan = SimpleNamespace(index=SimpleNamespace(length=np.ones(5)), rows=lambda step: [
            [SimpleNamespace(samples=(4, 0))], [SimpleNamespace(samples=(2,)), SimpleNamespace(samples=(1,))], []
        ])  # fmt: skip
        dataset: Any = type("Dataset", (), {"__len__": lambda self: 5, "records": records})()
        told = {"dataset": dataset, "plan": plan, "updates": 1}
        source: Any = type("Steps", (), {"__len__": lambda self: steps, **told})()
        return Health(config, report, source, 0, [], mesh, lambda: arrays or {"weight": jnp.ones(2)})

    yield build
    for report in made:
        report.close()


def metrics(loss: float = 2.0, finite: bool = True, taken: bool = True) -> dict[str, jax.Array]:
    values = {"loss": loss, "grad_norm": loss if finite else np.nan, "finite": finite, "taken": taken}
    return {name: jnp.asarray(value) for name, value in values.items()}


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_are_named_with_their_samples_and_once_in_the_terminal(
    watch: Watch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    health = watch()
    for step in range(1, 30):
        good = step not in (3, 4, 21)
        health.took(step, metrics(finite=good, taken=good))
        if step % 10 == 9:
            health.check()
    found = events(tmp_path)
    assert [(e["event"], e["step"], e["steps_in_a_row"]) for e in found] == [
        ("non_finite", 3, 1), ("non_finite", 4, 2), ("non_finite", 21, 1)
    ]  # fmt: skip
    assert all(e["samples"] == IDS and e["recordings"] == ["ecg_2.npy", "ecg_0.npy", "ecg_1.npy"] for e in found)
    assert found[0]["grad_norm"] is None and found[0]["skipped"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "step 3 is skipped" in line and ", ".join(IDS[:3]) in line and IDS[3] not in line and "1 more" in line


@pytest.mark.parametrize("skips", [0.0, 6.0])
def test_a_spike_is_named_with_what_is_usual(watch: Watch, tmp_path: Path, skips: float) -> None:
    health = watch(skip_spikes=skips)
    for step in range(1, 101):
        health.took(step, metrics(50.0 if step == 100 else 2 + step % 2, taken=step < 100 or not skips))
    health.check()
    (event,) = events(tmp_path)
    assert (event["event"], event["step"], event["loss"], event["skipped"]) == ("spike", 100, 50.0, bool(skips))
    assert event["usual_loss"] == pytest.approx(2.5, abs=0.02) and event["samples"] == IDS


@pytest.mark.parametrize("steps", [3, 1000])
def test_a_run_that_takes_no_step_any_more_stops(watch: Watch, steps: int) -> None:
    health = watch(steps)
    least = min(steps, SKIPPED_LIMIT)
    for step in range(1, least):
        health.took(step, metrics(finite=False, taken=False))
    health.check()
    health.took(least, metrics(finite=False, taken=False))
    health.took(least + 1, metrics())  # whenever it is looked at
    with pytest.raises(UserError, match=f"optim.lr: found {least} steps in a row skipped, last step {least}"):
        health.check()


def test_weights_that_are_not_finite_stop_the_run_at_once(watch: Watch) -> None:
    health = watch(1000, {"llm.norm.scale": jnp.ones(3), "llm.head.kernel": jnp.array([[1.0, jnp.inf]])})
    health.took(1, metrics(finite=False, taken=False))
    with pytest.raises(UserError, match=r"weights: found values that are not finite in llm\.head\.kernel; exp"):
        health.check()
