"""The commands as a user starts them: train, what is left in the run's folder, evaluate again.

Programs are compiled as all tests compile them: as a user's are, CI has those of the demo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import compiling
import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--config=configs/demo.py",
    "--config.data.names=('demo:train=96,val=16,test=12',)",
    '--config.llm.scratch={"hidden": 32, "layers": 1, "heads": 2, "mlp": 32, "max_len": 128}',
    "--config.encoder.config.width=4",
    "--config.train.batch_size=16",
    "--config.train.epochs=2",
    "--config.train.log_every=2",
    "--config.train.save_every=10",
    "--config.eval.batch_size=32",
    "--noconfig.log.progress",
]


def run(
    module: str, *arguments: str, status: int = 0, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XLA_FLAGS": compiling.FLAGS}
    python = (sys.executable,) if cold else warm.python()
    command = [*python, "-m", f"elm_jax.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "run"
    run("train", *TINY, f"--config.workdir={folder}", cold=True)
    return folder


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Long at its first test: a process without anything imported trains and evaluates under four controls.
@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(trained: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "DONE", "plots/loss.png", "tokenizer/tokenizer.json"):
        assert (trained / name).is_file(), name
    lines = [line for line in read_lines(trained / "metrics.jsonl") if "event" not in line]
    contract = {"step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "conversations"}
    contract |= {"recordings", "padding_fraction", "step_ms", "tokens_per_s", "conversations_per_s", "mfu"}
    contract |= {"supervised_tokens_per_s", "step_ms_p50", "step_ms_p95", "host_wait_share", "device_memory_gb"}
    assert all(contract <= set(line) for line in lines)
    assert "val_loss" in lines[-1] and lines[-1]["loss"] < lines[0]["loss"]
    steps = json.loads((trained / "DONE").read_text())["steps"]
    assert lines[-1]["step"] == steps
    assert (trained / "checkpoints" / str(steps)).is_dir()
    assert (trained / "plots/loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_evaluation_leaves_scores_controls_and_pictures(trained: Path) -> None:
    folder = trained / "eval" / "demo-test"
    results = json.loads((folder / "metrics.json").read_text())
    predictions = read_lines(folder / "predictions.jsonl")
    assert results["n"] == len(predictions) == 12 * 5
    assert set(results["controls"]) == {"zeros", "noise", "text_only", "shuffled"}
    assert {"constant", "majority"} <= set(results["baselines"])
    for name in ("exact_match", "token_f1", "signal_type.accuracy", "heart_rate.within_5_bpm"):
        low, high = results["metrics"][name]["ci95"]
        assert 0 <= low <= results["metrics"][name]["value"] <= high <= 1
    assert {"value", "ci95", "p"} <= set(results["signal_dependence"])
    assert set(predictions[0]) >= {"id", "prompt", "answer", "truth", "seconds"}
    assert len({p["id"] for p in predictions}) == len(predictions)
    assert (folder / "examples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # long: evaluates anew under all controls
def test_evaluate_gives_the_same_answers_again_in_other_batches(trained: Path) -> None:
    path = trained / "eval" / "demo-test" / "predictions.jsonl"
    before = {p["id"]: p["answer"] for p in read_lines(path)}
    run(
        "evaluate", "--checkpoint", str(trained), "--config.eval.batch_size=7", "--config.eval.controls=zeros",
        "--config.eval.limit=20", "--noconfig.log.progress",
    )  # fmt: skip
    after = {p["id"]: p["answer"] for p in read_lines(path)}
    assert len(after) == 20 and all(before[name] == answer for name, answer in after.items())


@pytest.mark.slow
def test_evaluate_refuses_what_is_not_the_run(trained: Path, tmp_path: Path) -> None:
    other = run("evaluate", "--checkpoint", str(trained), "--config.llm.scratch.layers=2", status=2)
    assert other.stderr.startswith("error:") and "llm.scratch" in other.stderr
    nowhere = run("evaluate", "--checkpoint", str(tmp_path), status=2)
    assert str(tmp_path) in nowhere.stderr
    step = run("evaluate", "--checkpoint", str(trained), "--step", "7777", status=2)
    assert "7777" in step.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_profile_of_the_steps_asked_for_is_written(tmp_path: Path) -> None:
    flags = ["--config.train.steps=4", "--config.log.profile_steps=1:3", "--noconfig.eval.at_end"]
    run("train", *TINY, *flags, f"--config.workdir={tmp_path}")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
