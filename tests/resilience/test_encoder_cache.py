"""A frozen encoder's outputs on disk: the run is the same, the encoder runs once, and stale outputs are not used."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
import wfdb

from elm_jax.config import DataConfig
from elm_jax.data.kept_features import Features, FeatureWriter
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.run.fingerprints import fingerprint
from elm_jax.runtime import distributed
from elm_jax.training import encoder_cache
from elm_jax.training.loop import Trainer, train

FROZEN = {"update": ["connector", "llm"], "train__steps": 3}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in runs.lines(folder) if "loss" in line]


def test_outputs_are_read_back_by_name_and_by_other_processes(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        features = Features(str(tmp_path / dtype), (2, 3), dtype)
        assert "a" not in features and features.load("a") is None
        values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
        with FeatureWriter(features, ["a", "b"]) as writer:
            writer.put(values[:1])
            writer.put(values[1:])
            writer.leave_out("a")
        again = pickle.loads(pickle.dumps(Features(str(tmp_path / dtype), (2, 3), dtype)))
        assert "a" not in again and again.load("b").dtype == again.layout.dtype
        np.testing.assert_array_equal(again.load("b").astype(np.float32), values[1])


def test_a_part_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    features = Features(str(tmp_path / "f"), (2, 3), "float32")
    with pytest.raises(KeyboardInterrupt), FeatureWriter(features, ["a", "b"]) as writer:
        writer.put(np.zeros((1, 2, 3), np.float32))
        raise KeyboardInterrupt
    assert not list((tmp_path / "f").iterdir())


def test_signs_that_cancel_in_a_sum_change_the_fingerprint() -> None:
    x = np.arange(1.0, 9.0, dtype=np.float32)
    turned = x * np.where(np.arange(8) < 2, -1, 1).astype(np.float32)
    assert len({fingerprint({"a": jax.numpy.asarray(v)}) for v in (x, -x, turned)}) == 3


def test_all_files_of_a_record_are_in_its_name_and_noise_is_told_apart(tmp_path: Path) -> None:
    form = {"units": ["mV"] * 12, "sig_name": list(LEADS), "fmt": ["16"] * 12}
    wfdb.wrsamp("r", 250, p_signal=np.zeros((500, 12)), write_dir=str(tmp_path), **form)
    spec = replace(signal_spec(DataConfig(root=str(tmp_path)), seed=0), perturb="noise")
    before = spec.names_of("r", 0)
    os.utime(tmp_path / "r.dat", ns=(1, 1))
    assert spec.names_of("r", 0) != before
    assert spec.names_of("flatline", 1) != spec.names_of("flatline", 2)
    assert replace(spec, perturb=None).names_of("flatline", 1) == replace(spec, perturb=None).names_of("flatline", 2)


class Processes:
    """Threads that stand for processes: `gather` and `index` as each of them sees them."""

    def __init__(self, count: int) -> None:
        self.values: list[Any] = [None] * count
        self.barrier, self.own = threading.Barrier(count), threading.local()

    def gather(self, value: Any) -> list[Any]:
        self.values[self.own.index] = value
        self.barrier.wait(30)
        found = list(self.values)
        self.barrier.wait(30)
        return found

    def run(self, each: Callable[[int], Any]) -> list[Any]:
        def as_process(index: int) -> Any:
            self.own.index = index
            return each(index)

        with ThreadPoolExecutor(len(self.values)) as pool:
            return list(pool.map(as_process, range(len(self.values))))


def test_one_process_writes_to_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it would write something else there."""
    processes = Processes(5)
    monkeypatch.setattr(distributed, "gather", processes.gather)
    seen = [(tmp_path / name, content) for name, content in ("ax", "ax", "bx", "ay", "bx")]
    found = processes.run(lambda index: distributed.writers(*seen[index]))
    assert found == [[0, 0, 2, 3, 2]] * 5
    assert not [file for folder in tmp_path.iterdir() for file in folder.iterdir()], "a token was left behind"


@pytest.mark.slow
def test_a_process_for_which_another_one_writes_writes_nothing_and_must_see_what_that_one_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_cache, "SEEN_SECONDS", 0.0)
    monkeypatch.setattr(distributed, "writers", lambda *_: [1])
    monkeypatch.setattr(distributed, "broadcast", lambda value, source: value)
    with pytest.raises(UserError, match="outputs absent that another process has written"):
        Trainer(runs.config(tmp_path / "run", encoder__cache=True, **FROZEN), tmp_path / "run")._build()
    assert not [file for file in (tmp_path / "cache" / "encoder").rglob("*") if file.is_file()]


@pytest.mark.slow
def test_two_processes_keep_outputs_together(tmp_path: Path) -> None:
    options = {"encoder__cache": True, **FROZEN, "mesh__data": 4, "mesh__fsdp": 2}
    runs.finish_all(runs.start_two(tmp_path / "two", **options))
    runs.train(tmp_path / "one", **FROZEN)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_kept_outputs_learns_the_same_and_encodes_each_recording_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    put = FeatureWriter.put

    def counting(self: FeatureWriter, rows: np.ndarray) -> None:
        written.append(len(rows))
        put(self, rows)

    monkeypatch.setattr(FeatureWriter, "put", counting)
    train(runs.config(tmp_path / "plain", **FROZEN, data__val_fraction=0.1))
    assert not written
    for name, meshed in (("kept", {}), ("again", {}), ("meshed", {"mesh__data": 4, "mesh__fsdp": 2})):
        train(runs.config(tmp_path / name, encoder__cache=True, **FROZEN, **meshed, data__val_fraction=0.1))
        # All recordings of 64 records, noise of one record each, once: in the first run.
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "plain"), rtol=1e-5)
        if name == "kept":
            once = list(written)
    assert sum(once) > 64 and written == once
    plain, kept = (max(runs.logged(tmp_path / name).items())[1]["val_loss"] for name in ("plain", "kept"))
    np.testing.assert_allclose(kept, plain, rtol=1e-5)


@pytest.mark.slow
def test_the_step_holds_no_encoder_and_a_resume_checks_its_weights(tmp_path: Path) -> None:
    options = {**FROZEN, "encoder__cache": True}
    train(runs.config(tmp_path / "run", **options))
    trainer = Trainer(runs.config(tmp_path / "run", **{**options, "train__steps": 4}), tmp_path / "run")
    trainer._build()
    assert not any(name.startswith("encoder.") for name in trainer.frozen)
    assert "encoder" in trainer.fingerprints


@pytest.mark.slow
def test_a_changed_recording_is_encoded_anew_and_an_unreadable_one_is_a_bad_record(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        np.save(tmp_path / f"{i}.npy", rng.normal(size=(12, 500)).astype(np.float32))
        turns = [{"from": "human", "value": "Regular?"}, {"from": "gpt", "value": "yes"}]
        rows.append({"ecg_path": f"{i}.npy", "text": turns, "name": "x", "patient_id": str(i), "split": "train"})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data__names": ["records.jsonl"], "data__root": str(tmp_path), "data__max_bad_records": 0.2}
    options = {**FROZEN, **data, "encoder__cache": True}
    (tmp_path / "3.npy").write_bytes(b"no recording")
    train(runs.config(tmp_path / "one", **options))
    events = [line for line in runs.lines(tmp_path / "one") if line.get("event") == "bad_record"]
    assert len(events) == 1 and "3.npy" in events[0]["error"]
    folder = next((tmp_path / "cache" / "encoder").iterdir())
    assert len(json.loads(next(folder.glob("*.json")).read_text())) == 12

    np.save(tmp_path / "5.npy", rng.normal(size=(12, 501)).astype(np.float32))
    trainer = Trainer(runs.config(tmp_path / "two", **options), tmp_path / "two")
    trainer._build()
    parts = {len(json.loads(part.read_text())) for part in folder.glob("*.json")}
    assert parts == {12, 2}, "the changed one, and the unreadable one once more"
    np.save(tmp_path / "5.npy", rng.normal(size=(12, 502)).astype(np.float32))
    with pytest.raises(UserError, match="5.npy.*changed"):
        [trainer.dataset.signals(i) for i in range(12) if i != 3]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"update": ["encoder", "connector"]}, "update has the encoder"),
        ({"update": ["connector"], "data__augment_ecg": True}, "augment"),
        (
            {"elm": "patch_elf", "encoder__name": None, "encoder__config": {}, "update": ["connector"]},
            "false for elm=patch_elf",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        train(runs.config(tmp_path / "run", encoder__cache=True, **changes))
