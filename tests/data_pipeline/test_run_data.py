"""What a run says of its data before it builds or compiles a model: cuts, and validation that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from texts import write_records

from elm_jax.config import DataConfig
from elm_jax.errors import UserError
from elm_jax.run import folder as run
from elm_jax.training.loop import Trainer

ANSWERED = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
Start = Callable[..., Trainer]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """start(**config): a trainer over the records in tmp_path, which has not begun."""
    runs.prepare(monkeypatch, tmp_path / "cache")
    for i in range(4):
        np.save(tmp_path / f"ecg_{i}.npy", np.random.default_rng(i).normal(size=(12, 500)).astype(np.float32))

    def made(**changes: Any) -> Trainer:
        data = {"data__names": ["records.jsonl"], "data__root": str(tmp_path), "data__val_fraction": 0.0}
        config = runs.config(tmp_path / "run", **{**data, "mesh__data": 8, **changes})
        return Trainer(config, run.open_folder(config))

    return made


def test_a_run_says_how_much_max_len_cuts(tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path, [*[ANSWERED] * 6, ANSWERED * 5, ANSWERED * 7])
    start(data__max_len=256)
    assert "data.max_len" not in capsys.readouterr().err
    start(data__max_len=72)
    said = capsys.readouterr().err
    assert "warning: training: 2 of 8 conversations (25.0%) exceed data.max_len=72 and are cut" in said
    assert "answers lost whole); raise data.max_len" in said


def test_validation_that_is_asked_for_and_not_there_is_said(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path, [ANSWERED] * 8, split="train")
    assert start().validation is None and "validat" not in capsys.readouterr().err, "nobody asked"
    assert start(train__eval_every=20).validation is None
    assert capsys.readouterr().err.count("train.eval_every=20: nothing to validate on; set data.val_fraction") == 1
    with pytest.raises(UserError, match="train.early_stopping: found true without validation records"):
        start(train__early_stopping=True)


def test_a_files_own_val_split_validates_without_a_val_fraction(tmp_path: Path, start: Start) -> None:
    write_records(tmp_path, [ANSWERED] * 8, split="train")
    held = (tmp_path / "records.jsonl").read_text().splitlines()
    names = ["val", "valid", "validation", "dev"]
    held += [line.replace('"train"', f'"{name}"') for line, name in zip(held, names, strict=False)]
    (tmp_path / "records.jsonl").write_text("\n".join(held))
    for asked in ({"train__eval_every": 20}, {"train__early_stopping": True}):
        validation = start(**asked).validation
        assert validation is not None and len(validation.dataset) == 4


def test_a_checkpoint_of_other_data_or_of_another_order_is_refused() -> None:
    saved, shared = run.data_facts("a"), DataConfig(share="ecg")
    run.check_data("here", saved, "a", shared)
    with pytest.raises(UserError, match="here: found a checkpoint of other data"):
        run.check_data("here", saved, "b", shared)
    with pytest.raises(UserError, match="here: found a checkpoint of a version that divided"):
        run.check_data("here", saved | {"ecg_rows": 1}, "a", shared)


def test_a_run_whose_recordings_another_version_read_otherwise_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run.check_data("here", run.data_facts("a"), "a", DataConfig())
    assert not capsys.readouterr().err
    run.check_data("here", {"data": "a"}, "a", DataConfig())  # as earlier versions wrote them
    assert "warning: here was begun by a version that read some recordings otherwise" in capsys.readouterr().err
