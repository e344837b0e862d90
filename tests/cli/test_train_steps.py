"""The steps of a run: nothing passes between host and devices unasked, and few shapes are compiled."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import runs

from elm_jax.data.batch import Batch
from elm_jax.errors import UserError
from elm_jax.training import loop
from elm_jax.training.step import StepPrograms

STEPS, EPOCHS = 8, 4
SHAPES = 4  # one for each length of a row; signals and targets are not cut finer than half of the fullest row


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs.prepare(monkeypatch, tmp_path / "cache")


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where values of arrays were read on the host, unasked, while the loop forbids it. The guard itself lets them pass
    on a CPU, where the host reads an array in its place."""
    found: list[str] = []
    modes, asked = ["allow"], [0]
    guard, get, array = jax.transfer_guard, jax.device_get, type(jnp.zeros(1))
    value = array._value  # pyright: ignore[reportAttributeAccessIssue]

    @contextlib.contextmanager
    def noted(mode: str) -> Iterator[None]:
        modes.append(mode)
        with guard(mode):
            yield
        modes.pop()

    def explicit(x: Any) -> Any:
        asked[0] += 1
        try:
            return get(x)
        finally:
            asked[0] -= 1

    def watched(self: Any) -> Any:
        if modes[-1] != "allow" and not asked[0]:
            found.append("".join(traceback.format_stack(limit=6)))
        return value.fget(self)

    monkeypatch.setattr(jax, "transfer_guard", noted)
    monkeypatch.setattr(jax, "device_get", explicit)
    monkeypatch.setattr(array, "_value", property(watched))
    return found


@pytest.mark.slow
def test_nothing_is_read_from_the_devices_between_lines(
    tmp_path: Path, unasked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation, a checkpoint and several lines; then the same loop with a look at the loss in each step."""
    options = {"train__steps": STEPS, "train__log_every": 4, "train__save_every": 4}
    loop.train(runs.config(tmp_path / "run", **options))
    assert not unasked, unasked[0]
    assert [line["step"] for line in runs.lines(tmp_path / "run") if "loss" in line] == [4, 8]
    take = StepPrograms.__call__

    def curious(self: StepPrograms, *arguments: Any) -> Any:
        state, metrics = take(self, *arguments)
        assert float(metrics["loss"]) > 0
        return state, metrics

    monkeypatch.setattr(StepPrograms, "__call__", curious)
    loop.train(runs.config(tmp_path / "curious", **options))
    assert len(unasked) == STEPS and "curious" in unasked[0]


@pytest.mark.slow
def test_what_goes_to_the_devices_unasked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Trainer, "_on_devices", lambda _, batch: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(runs.config(tmp_path / "run", train__steps=2))


@pytest.mark.slow
def test_a_packed_run_of_several_epochs_compiles_few_shapes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    loop.train(runs.config(folder, train__steps=None, train__epochs=EPOCHS, data__val_fraction=0, train__log_every=5))
    lines = runs.lines(folder)
    compiled = [line for line in lines if line.get("event") == "compile"]
    shapes = [tuple(line["shape"].values()) for line in compiled]
    assert 1 <= len(set(shapes)) == len(shapes) <= SHAPES
    finish = lines[-1]
    assert (finish["event"], finish["compile_count"]) == ("finish", len(compiled)) and finish["steps"] > 4 * EPOCHS
    assert finish["compile_seconds"] == pytest.approx(sum(line["seconds"] for line in compiled), abs=0.01)
    attention = next(line for line in lines if line.get("event") == "attention")
    assert (attention["implementation"], attention["reason"]) == ("xla", "platform cpu")


@pytest.mark.slow
def test_a_step_of_conversations_is_the_same_packed_or_not_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """20 in two micro-batches, in the last of an epoch what is left of 54. `eps` keeps Adam from dividing roundings."""
    options = {
        "train__batch_size": None, "train__conversations": 20, "optim__accum_steps": 2, "data__share": "ecg",
        "optim__eps": 1e-3, "optim__schedule": "constant", "optim__warmup_ratio": 0.0,
        "data__names": ["demo:train=24,val=8,test=8"],
    }  # fmt: skip
    loop.train(runs.config(tmp_path / "packed", train__steps=4, **options))
    loop.train(runs.config(tmp_path / "alone", train__steps=2, data__pack=False, **options))
    loop.train(runs.config(tmp_path / "alone", train__steps=4, data__pack=False, **options))
    told = capfd.readouterr().err
    assert "a step has 18.0 of them on average, with 46.7 supervised tokens, in " in told and "3 steps an epoch" in told
    packed, alone = runs.logged(tmp_path / "packed"), runs.logged(tmp_path / "alone")
    assert [packed[step]["conversations"] for step in range(1, 5)] == [20, 20, 14, 20]
    for step, line in packed.items():
        assert alone[step]["conversations"] == line["conversations"]
        assert alone[step]["supervised_tokens"] == line["supervised_tokens"]
        assert alone[step]["loss"] == pytest.approx(line["loss"], rel=1e-5), step
        assert alone[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4), step
    start = runs.lines(tmp_path / "packed")[0]
    assert (start["event"], start["steps_per_epoch"], start["conversations_per_step"]) == ("start", 3, 18.0)
    with pytest.raises(UserError, match="conversations"):
        loop.train(runs.config(tmp_path / "packed", train__steps=8, **{**options, "train__conversations": 10}))


def test_a_shape_is_compiled_once() -> None:
    @jax.jit
    def step(state: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        return state + batch.tokens.sum(), {}

    def batch(tokens: int) -> Batch:
        return Batch(*(jnp.ones((1, 2, tokens), jnp.int32),) * len(Batch._fields))

    programs: Any = StepPrograms(step)
    state: Any = jnp.int32(0)
    for tokens in (4, 8, 4):
        if not programs.has(batch(tokens)):
            assert programs.compile(state, {}, batch(tokens)) > 0
        state, _ = programs(state, {}, batch(tokens))
    assert int(state) == 2 * (4 + 8 + 4) and len(programs._programs) == 2
