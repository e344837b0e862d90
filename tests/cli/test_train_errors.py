"""What the user gets wrong is one line that begins `error:`, names the key or file, and exits with status 2."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from elm_jax import cli
from elm_jax.train import main

Run = Callable[..., str]
TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "an ecg"}]
LENGTH = 80


def write_recordings(folder: Path, count: int = 8, **changed: object) -> None:
    """`count` recordings and a table of one question each; `changed` replaces fields of the first row."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        np.save(folder / f"{i}.npy", rng.standard_normal((12, LENGTH)).astype(np.float32))
        row = {"ecg_path": f"{i}.npy", "text": TURNS, "name": "kind", "patient_id": str(i), "split": "train"}
        rows.append(row | changed if i == 0 else row)
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(*flags): train on the recordings in tmp_path; returns the error line."""
    monkeypatch.setenv("ELM_JAX_CACHE", str(tmp_path / "cache"))
    defaults = {
        "workdir": tmp_path / "run",
        "data.root": tmp_path,
        "data.names": "records.jsonl",
        "data.segment_len": LENGTH,
        "data.val_fraction": 0,
        "data.max_len": 64,
        "llm.scratch": '{"hidden": 16, "layers": 1, "heads": 2, "mlp": 16, "max_len": 64}',
        "encoder.config": '{"resnet_type": "resnet18", "width": 2}',
        "train.batch_size": 8,
        "train.steps": 1,
        "mesh.data": 8,
    }

    def train(**flags: object) -> str:
        values = defaults | {name.replace("__", "."): value for name, value in flags.items()}
        argv = ["--config=configs/demo.py", "--noconfig.log.progress", "--noconfig.eval.at_end"]
        with pytest.raises(SystemExit) as stop:
            cli.run(main, argv + [f"--config.{name}={value}" for name, value in values.items()])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2, lines
        assert lines[-1].startswith("error: "), lines
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return train


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"optim.lrr": 1}, "did you mean '--config.optim.lr'"),
        ({"train.batch_size": "many"}, "train.batch_size"),
        ({"phase": "pretrian"}, "did you mean 'pretrain'"),
        ({"elm": "mlp_lava"}, "mlp_llava"),
        ({"encoder.name": "merll"}, "did you mean 'merl'"),
        ({"llm.name": "qwen2.5-1.5b-instuct"}, "did you mean 'qwen2.5-1.5b-instruct'"),
        ({"data.names": "ecg-qa-ptbxll-250-2500"}, "ecg-qa-ptbxl-250-2500"),
        ({"data.max_len": 4096}, "data.max_len"),
        ({"mesh.data": 3}, "mesh"),
        ({"mesh.data": 1, "mesh.tensor": 8, "llm.scratch.mlp": 4100, "llm.scratch.hidden": 64}, "mesh.tensor"),
        ({"train.batch_size": 6}, "train.batch_size"),
        ({"init_from": "nowhere"}, "config.init_from"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_configurations(run: Run, tmp_path: Path, flags: dict[str, object], expected: str) -> None:
    write_recordings(tmp_path)
    line = run(**{name.replace(".", "__"): value for name, value in flags.items()})
    assert expected in line


def test_an_unreachable_hub_says_how_to_use_a_folder(run: Run, tmp_path: Path) -> None:
    write_recordings(tmp_path)
    line = run(llm__name="qwen2.5-1.5b-instruct")
    assert "llm.name" in line and "folder" in line
    line = run(data__names="ecg-qa-ptbxl-250-2500")
    assert "ecg-qa-ptbxl-250-2500" in line and "data.root" in line


class Malicious:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return Path.touch, (Path("run-by-a-pickle"),)


def missing(folder: Path) -> None:
    (folder / "0.npy").unlink()


def truncated(folder: Path) -> None:
    (folder / "0.npy").write_bytes((folder / "0.npy").read_bytes()[:500])


def malicious(folder: Path) -> None:
    array = np.empty((), object)
    array[()] = {"ecg": Malicious()}
    with (folder / "0.npy").open("wb") as file:
        np.lib.format.write_array(file, array, allow_pickle=True)


def eleven_leads(folder: Path) -> None:
    np.save(folder / "0.npy", np.zeros((11, LENGTH), np.float32))


def too_short(folder: Path) -> None:
    np.save(folder / "0.npy", np.zeros((12, LENGTH // 2), np.float32))


def not_a_number(folder: Path) -> None:
    signal = np.zeros((12, LENGTH), np.float32)
    signal[3, 7] = np.nan
    np.save(folder / "0.npy", signal)


@pytest.mark.parametrize("damage", [missing, truncated, malicious, eleven_leads, too_short, not_a_number])
def test_bad_recordings_stop_the_run_and_are_named(run: Run, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_recordings(tmp_path)
    damage(tmp_path)
    line = run()
    assert "0.npy" in line and "records.jsonl:0" in line and "max_bad_records" in line
    assert not Path("run-by-a-pickle").exists()


def test_a_conversation_without_an_answer_is_named(run: Run, tmp_path: Path) -> None:
    write_recordings(tmp_path, text=TURNS[:1])
    assert "records.jsonl:0" in run()


def test_an_empty_split_is_named(run: Run, tmp_path: Path) -> None:
    write_recordings(tmp_path)
    assert "no train records" in run(data__subset=0.01)


def test_the_checkpoint_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    write_recordings(tmp_path)
    folder = tmp_path / "run"
    (folder / "checkpoints" / "5").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 7}))
    line = run()
    assert "seed (was 7, now 0)" in line and str(folder) in line


@pytest.mark.parametrize("left", ["checkpoints/5", "tokenizer", "inherited", "DONE"])
def test_a_run_without_its_config_is_refused(run: Run, tmp_path: Path, left: str) -> None:
    """Nothing would tell what it was trained with: the next start could go on with anything."""
    write_recordings(tmp_path)
    (tmp_path / "run" / left).mkdir(parents=True)
    line = run()
    assert f"{tmp_path / 'run'}: found a run without config.json" in line and "--config.workdir" in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_pickle_is_harmless_only_because_it_is_refused() -> None:
    """The file of `malicious` does run code where it is opened without care."""
    assert pickle.loads(pickle.dumps(Malicious())) is None
    path = Path("run-by-a-pickle")
    assert path.exists()
    path.unlink()
