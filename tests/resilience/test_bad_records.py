"""A few bad records are named and weigh nothing; too many end the run with a message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

from elm_jax import cli
from elm_jax import train as train_command
from elm_jax.training.loop import Trainer, train

PATIENTS, QUESTIONS = 12, 3
RECORDS = PATIENTS * QUESTIONS
BAD = (2, 7)  # patients whose recording is damaged or gone


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Keys of a run over recordings of which one is cut short, one is missing, and one question has no answer."""
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(PATIENTS):
        name = f"ecg_{patient}.npy"
        np.save(tmp_path / name, rng.normal(size=(12, 500)).astype(np.float32))
        for n in range(QUESTIONS):
            answer = [] if (patient, n) == (4, 1) else [{"from": "gpt", "value": "yes" if n else "no"}]
            turns = [{"from": "human", "value": "Is the rhythm regular?"}, *answer]
            rows.append({"ecg_path": name, "text": turns, "name": "x", "patient_id": str(patient), "split": "train"})
    (tmp_path / "ecg_2.npy").write_bytes((tmp_path / "ecg_2.npy").read_bytes()[:1000])
    (tmp_path / "ecg_7.npy").unlink()
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data__names": ["records.jsonl"], "data__root": str(tmp_path), "data__val_fraction": 0.0, "mesh__data": 8,
        "train__steps": 4, "train__save_every": 2, "update": ["connector", "llm"],
    }  # fmt: skip


def start(folder: Path, **changes: Any) -> None:
    train(runs.config(folder, **changes))


def named(folder: Path) -> dict[str, dict[str, Any]]:
    """Record -> the one event that names it."""
    events = [line for line in runs.lines(folder) if line.get("event") == "bad_record"]
    found = {event["id"]: event for event in events}
    assert len(found) == len(events), "a record was named twice"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("share", ["system", "ecg"])
def test_few_bad_records_are_named_once_and_the_steps_stay_the_same(
    tmp_path: Path, data: dict[str, Any], share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs and a resume, in which other questions come first."""
    read: list[np.ndarray] = []
    advance = Trainer._advance
    monkeypatch.setattr(Trainer, "_advance", lambda t, loaded: read.append(loaded.batch) or advance(t, loaded))
    options = {**data, "data__max_bad_records": 0.25, "data__share": share}
    start(tmp_path / "run", **options)
    start(tmp_path / "run", **{**options, "train__steps": 6})
    expected = {f"records.jsonl:{p * QUESTIONS + n}" for p in BAD for n in range(QUESTIONS)}
    found = named(tmp_path / "run")
    assert set(found) == expected | {"records.jsonl:13"}
    assert "ecg_2.npy" in found["records.jsonl:6"]["error"] and "ecg_7.npy" in found["records.jsonl:21"]["error"]
    assert "answer" in found["records.jsonl:13"]["error"] and found["records.jsonl:13"]["step"] == 0
    losses = [line["loss"] for line in runs.lines(tmp_path / "run") if "loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all()
    shown = np.concatenate([batch.sample_ids[batch.sample_ids >= 0] for batch in read])
    counts = np.bincount(shown, minlength=RECORDS)
    assert counts[13] == 0 and np.delete(counts, 13).min() >= 1, "bad records keep their place"
    weights = sum(int(batch.target_weights.sum()) for batch in read)
    logged = sum(line["supervised_tokens"] for line in runs.lines(tmp_path / "run") if "loss" in line)
    assert logged == weights


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "who"), [(0.0, "records.jsonl:13"), (0.1, r"records.jsonl:(6|7|8|21|22|23)")])
def test_too_many_end_the_run_and_one_is_named(
    tmp_path: Path, data: dict[str, Any], limit: float, who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.run(train_command.main, runs.flags(tmp_path / "run", **{**data, "data__max_bad_records": limit}))
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: record ")
    assert re.search(who, error) and (limit == 0.0 or "data.max_bad_records" in error)
    if limit:
        assert len(named(tmp_path / "run")) == int(limit * RECORDS) + 1
