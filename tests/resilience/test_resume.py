"""A run that is stopped in any way and started again ends as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import kills
import numpy as np
import order
import pytest
import runs
from runs import SAVE_EVERY, STEPS, committed, logged, saved_arrays

from elm_jax import cli
from elm_jax import train as train_command
from elm_jax.config import Config
from elm_jax.data.loader import Loaded
from elm_jax.errors import UserError
from elm_jax.folders import read_json
from elm_jax.models.encoders import build_encoder
from elm_jax.models.functional import structure_of
from elm_jax.run import verification
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.folder import open_folder
from elm_jax.training import program
from elm_jax.training.loop import Trainer, train
from elm_jax.weights.encoders import to_published

SEED = 2008
EVERYWHERE = {"mesh__data": 8}  # for runs in this process, which has eight devices


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    folder = place / "unbroken"
    runs.train(folder)
    assert committed(folder) == [STEPS - SAVE_EVERY, STEPS]
    return folder


def meta(folder: Path) -> dict[str, Any]:
    reader = Checkpoints(folder, read_only=True)
    found = reader.meta(STEPS)
    reader.close()
    return found


def assert_same_end(found: Path, expected: Path) -> None:
    """Bitwise the same arrays and logged values, and the same history."""
    assert (found / "DONE").read_text() == (expected / "DONE").read_text()
    assert logged(found) == logged(expected)
    assert meta(found) == meta(expected)
    mine, theirs = saved_arrays(found, STEPS), saved_arrays(expected, STEPS)
    assert mine.keys() == theirs.keys() and len(mine) > 50
    for name, value in theirs.items():
        np.testing.assert_array_equal(mine[name], value, err_msg=name)


# -- stopped by a signal --------------------------------------------------------------------------------------


@pytest.mark.slow  # 25 s: a run to its end, and another in four or five processes
def test_killed_in_saves_and_at_any_time(tmp_path: Path) -> None:
    """The short form of scripts/reliability/kills.py, without workers."""
    found, _, problems = kills.killed_runs(tmp_path, 3, SEED, loaders=[0])
    assert not problems
    assert len(found) >= 3 and sum(kill.phase == "saving" for kill in found) >= 2


@pytest.mark.slow
def test_asked_to_stop(place: Path, unbroken: Path) -> None:
    """Before its first step and, more than once, while it saves. scripts/reliability/signals.py has all phases."""
    folder = place / "asked"
    message = runs.train(folder, 143, ask="USR1@doing=^loading the weights#1")
    assert "stopped by SIGUSR1 (loading the weights)" in message and "Traceback" not in message
    message = runs.train(folder, 143, ask="TERM*3@doing=^saving,#2")
    assert "stopped after step 7 by SIGTERM" in message and "SIGTERM again: the step ends" in message
    assert committed(folder) == [6, 7] and not (folder / "DONE").exists()
    runs.train(folder)
    assert_same_end(folder, unbroken)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_found_and_the_run_goes_on_from_an_older_one(
    unbroken: Path, tmp_path: Path
) -> None:
    """The short form of scripts/reliability/damage.py."""
    shutil.copytree(unbroken, tmp_path / "run")
    trainer = Trainer(config_of(tmp_path / "run"), tmp_path / "run")
    trainer._build()
    run = damage.finished(tmp_path / "run", trainer)
    outcomes = list(damage.sweep(run, tmp_path, places=3, seed=SEED, every=12))
    assert len(outcomes) > 20 and {outcome.what for outcome in outcomes} <= {"found", "harmless"}, outcomes
    assert all(outcome.what == "found" for outcome in outcomes if outcome.way == "resume")
    assert damage.goes_on(run, tmp_path) == ""


# -- on another mesh ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_order_of_samples_does_not_depend_on_hosts_nor_resumes() -> None:
    """The short form of scripts/reliability/order.py."""
    assert order.main(["--short"]) == 0


class Interrupted(Exception):
    pass


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Loaded]]:
    """The steps that runs in this process read."""
    seen: list[Loaded] = []
    advance = Trainer._advance

    def record(self: Trainer, loaded: Loaded) -> Any:
        seen.append(loaded)
        return advance(self, loaded)

    monkeypatch.setattr(Trainer, "_advance", record)
    yield seen


def config_of(folder: Path, **changes: Any) -> Config:
    """The checked configuration of a tiny run in this process."""
    return runs.config(folder, **{**EVERYWHERE, **changes})


def samples(steps: list[Loaded]) -> dict[int, np.ndarray]:
    return {loaded.step: loaded.batch.sample_ids for loaded in steps}


@pytest.mark.slow
def test_resumed_on_another_mesh_reads_the_same_samples_and_agrees(
    tmp_path: Path, read: list[Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, stop = 9, 4
    train(config_of(tmp_path / "whole", train__steps=steps))
    expected = samples(read)
    read.clear()
    with monkeypatch.context() as patch:
        advance = Trainer._advance

        def interrupt(self: Trainer, loaded: Loaded) -> Any:
            if loaded.step == stop:
                raise Interrupted
            return advance(self, loaded)

        patch.setattr(Trainer, "_advance", interrupt)
        with pytest.raises(Interrupted):
            train(config_of(tmp_path / "moved", train__steps=steps))
    assert committed(tmp_path / "moved") == [SAVE_EVERY]
    train(config_of(tmp_path / "moved", train__steps=steps, mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    assert [loaded.step for loaded in read] == [*range(stop), *range(SAVE_EVERY, steps)]
    for step, ids in samples(read).items():
        np.testing.assert_array_equal(ids, expected[step])
    whole, moved = logged(tmp_path / "whole"), logged(tmp_path / "moved")
    assert whole.keys() == moved.keys() == set(range(1, steps + 1))
    for step, values in whole.items():
        assert values.keys() == moved[step].keys()
        for name, value in values.items():
            assert moved[step][name] == pytest.approx(value, rel=1e-4), f"{name} of step {step}"


# -- what may change between two starts -----------------------------------------------------------------------


def command(folder: Path, **changes: Any) -> int:
    """The status of the train command in this process."""
    with pytest.raises(SystemExit) as exit:
        cli.run(train_command.main, runs.flags(folder, **{**EVERYWHERE, **changes}))
    return int(exit.value.code or 0)


@pytest.mark.slow
def test_a_changed_key_is_refused_by_name(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (unbroken / "config.json").read_text()
    assert command(unbroken, optim__lr=1e-5, data__share="system") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert "optim.lr" in error and "data.share" in error and str(unbroken) in error
    assert (unbroken / "config.json").read_text() == before


@pytest.mark.slow
def test_done_says_so_and_does_nothing(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert command(unbroken) == 0
    assert "is done" in capsys.readouterr().err
    assert (unbroken / "metrics.jsonl").read_bytes() == before and committed(unbroken) == [9, 12]


@pytest.mark.slow
def test_more_steps_and_other_resumable_keys_go_on(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder itself may move, too; saved by the clock, each save waited for."""
    folder, advance = tmp_path / "moved", Trainer._advance
    shutil.copytree(unbroken, folder)

    def behind_the_save(trainer: Trainer, loaded: Loaded) -> Any:
        assert trainer.checkpoints._verifying is None and verification.listed(folder / "checkpoints" / str(loaded.step))
        return advance(trainer, loaded)

    monkeypatch.setattr(Trainer, "_advance", behind_the_save)
    changes = {"train__save_every": 50, "train__save_minutes": 1e-9, "train__save_wait": True, "train__keep": 1,
               "eval__limit": 3, "data__workers": 1}  # fmt: skip
    assert command(folder, train__steps=STEPS + 2, optim__schedule="cosine", **changes) == 0
    assert sorted(logged(folder)) == list(range(1, STEPS + 3))
    assert {step: values for step, values in logged(folder).items() if step <= STEPS} == logged(unbroken)
    assert committed(folder)[-1] == STEPS + 2
    assert [line["step"] for line in runs.lines(folder) if line.get("event") == "resume"] == [STEPS]


def write_encoder(path: Path, seed: int) -> None:
    """Published weights of the tiny encoder."""
    from flax import nnx
    from safetensors.numpy import save_file

    def build() -> Any:
        return build_encoder("merl", {"resnet_type": "tiny", "width": 8}, 4, nnx.Rngs(seed))

    structure = structure_of(build)
    arrays = {name: np.asarray(x) for name, x in structure.arrays(build()).items()}
    save_file({n: np.ascontiguousarray(x) for n, x in to_published("merl", arrays).items()}, path)


@pytest.mark.slow
def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    weights, folder = tmp_path / "encoder.safetensors", tmp_path / "run"
    changes = {"update": ["connector", "llm"], "encoder__checkpoint": str(weights), "data__val_fraction": 0.0}
    write_encoder(weights, seed=1)
    train(config_of(folder, train__steps=1, **changes))
    write_encoder(weights, seed=2)
    with pytest.raises(UserError, match="trained with other encoder weights"):
        train(config_of(folder, train__steps=2, **changes))
    write_encoder(weights, seed=1)
    train(config_of(folder, train__steps=2, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **changes))
    assert sorted(logged(folder)) == [1, 2]


@pytest.mark.slow
def test_init_from_starts_with_the_arrays_of_another_run(unbroken: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "next", init_from=str(unbroken), optim__lr=1e-5)
    trainer = Trainer(config, open_folder(config))
    trainer._build()
    saved = saved_arrays(unbroken, int(trainer.checkpoints.find("best") or STEPS))
    assert int(trainer.state.step) == 0
    for name, value in {**trainer.state.trained, **trainer.state.statistics}.items():
        item = "trained" if name in trainer.state.trained else "statistics"
        np.testing.assert_array_equal(np.asarray(value), saved[f"{item}['{name}']"], err_msg=name)


# -- validation decides ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_step_has_a_checkpoint_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation comes more often than checkpoints; here its second loss is the lowest."""
    folder, losses = tmp_path / "run", iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(program, "make_eval_step", lambda *_: lambda *_: ({"loss": next(losses)}, {"loss": 1.0}))
    changes = {"data__names": ["demo:train=64,val=4,test=8"], "train__steps": 4}  # one step validates
    changes |= {"train__eval_every": 1, "train__save_every": 5}
    train(config_of(folder, **changes))
    assert {step: values["val_loss"] for step, values in logged(folder).items()} == {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}
    reader = Checkpoints(folder, read_only=True)
    assert reader.find("best") == 2 and reader.find("latest") == 4 and 2 in committed(folder)
    reader.close()


@pytest.mark.slow
def test_an_error_is_told_though_a_save_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Trainer._advance

    def second_fails(trainer: Trainer, loaded: Any) -> Any:
        if loaded.step:
            raise ChildProcessError("of step 2")
        return take(trainer, loaded)

    monkeypatch.setattr(Trainer, "_advance", second_fails)
    monkeypatch.setattr(verification, "wrong_array", lambda *_: "an array comes back with other values")
    with pytest.raises(ChildProcessError, match="of step 2"):
        train(config_of(tmp_path / "run", train__steps=4, train__save_every=1))


@pytest.mark.slow
def test_an_early_stop_is_an_end_until_there_is_more_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    stops = {"train__early_stopping": True, "train__patience": 1, "train__patience_delta": 100.0}
    stops |= {"train__eval_every": 2, "optim__schedule": "constant"}
    train(config_of(folder, train__steps=10, **stops))
    assert read_json(folder / "DONE") == {"steps": 4, "total_steps": 10, "stopped_early": True}
    assert committed(folder)[-1] == 4
    train(config_of(folder, train__steps=10, **stops))
    assert "is done" in capsys.readouterr().err and max(logged(folder)) == 4
    train(config_of(folder, train__steps=11, **stops))
    assert read_json(folder / "DONE") == {"steps": 6, "total_steps": 11, "stopped_early": True}
