"""`python -m elm_jax.train` as a user starts it: several processes, given by variables, on one machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import compiling
import numpy as np
import pytest
import runs
import warm

STEPS = 6
XLA_FLAGS = f"{compiling.FLAGS} --xla_force_host_platform_device_count="
# The demo without an encoder: nothing else compiles as fast.
SMALL = {
    "data.names": '["demo:train=48,val=8,test=8"]', "elm": "base_elf", "encoder.name": "None", "encoder.config": "{}",
    "connector.hidden": "None", "update": "connector,llm",
    "llm.scratch": '{"hidden":32,"layers":2,"heads":4,"kv_heads":2,"mlp":64,"max_len":128}', "train.batch_size": 8,
    "optim.schedule": "constant", "optim.warmup_ratio": 0, "data.val_fraction": 0,
}  # fmt: skip
# Processes sum in another order than as many devices of one. The encoder's batch statistics enlarge that: half a unit
# in the last place of an ECG moves the gradient's norm by up to 1e-2 (golden encoder_merl_batchnorm_train), Adam more.
FIRST_STEP, LATER_STEPS = {"grad_norm": 1e-4}, {"loss": 1e-3, "val_loss": 1e-3, "grad_norm": 2e-2}
LOGGED = {"train.log_every": 1, "train.save_every": 2, "eval.at_end": "false", "log.progress": "false"}
REAL = {
    "llm.name": "stories260K", "llm.chat": "plain", "llm.compute_dtype": "float32", "llm.remat": "none",
    "data.max_len": 512, "data.system_prompt": "", "data.share": "ecg", "encoder.config.resnet_type": "resnet18",
    "encoder.config.width": 4, "encoder.tokens": 8, "update": "encoder,connector,llm", "optim.lr": 2e-3,
    "train.steps": 2, "train.batch_size": 4, "data.val_fraction": 0,  # each step has another shape, and compiles
    "data.names": "ecg_qa.parquet,ptb_xl_reports.parquet",
}  # fmt: skip
Flags = dict[str, Any]


def command(config: str, workdir: Path, flags: Flags) -> list[str]:
    values = {**flags, **LOGGED, "workdir": workdir}
    return ["-m", "elm_jax.train", "--config", config, *(f"--config.{name}={value}" for name, value in values.items())]


def start(
    arguments: list[str], cwd: Path = runs.ROOT, env: dict[str, str] | None = None, devices: int = 1
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": f"{XLA_FLAGS}{devices}", **(env or {})}
    return subprocess.Popen(
        [*warm.python(environment), *arguments], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def together(count: int) -> list[dict[str, str]]:
    """The environments of `count` processes that belong together."""
    address = runs.two()[0]["JAX_COORDINATOR_ADDRESS"]
    return [
        {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        for i in range(count)
    ]


def train(count: int, *arguments: Any, **options: Any) -> None:
    """A run of `count` processes to its end."""
    environments = together(count) if count > 1 else [{}]
    runs.finish_all([start(command(*arguments), env=env, **options) for env in environments])


def assert_same(found: Path, expected: Path) -> None:
    """The same values at each step, to 1e-5 where no other bound is named."""
    mine, theirs = runs.logged(found), runs.logged(expected)
    assert mine.keys() == theirs.keys() == set(range(1, REAL["train.steps"] + 1))
    for step, values in theirs.items():
        assert mine[step].keys() == values.keys()
        for name, value in values.items():
            bound = (LATER_STEPS if step > 1 else FIRST_STEP).get(name, 1e-5)
            assert mine[step][name] == pytest.approx(value, rel=bound), f"{name} of step {step}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def real(place: Path, shared: Path) -> Path:
    """Recordings of PTB-XL with the questions of ECG-QA about them, prepared; and a pretrained LLM beside them."""
    text, ecg = shared / "real" / "text" / "ecgqa" / "ptbxl", shared / "real" / "ecg" / "ptbxl"
    preparation = [
        ["ptb_xl", "--raw", str(ecg), "--out", "data"],
        ["ecg_qa", "--raw", str(text), "--records", "data/ptb_xl/preprocessed_2500", "--ptbxl-csv",
         str(ecg / "ptbxl_database.csv"), "--single-only", "--split", "strat_fold", "--out", "data/ecg_qa.parquet"],
    ]  # fmt: skip
    for arguments in preparation:
        runs.finish(start(["-m", "elm_jax.prepare", *arguments], cwd=place))
    (place / "stories260K").symlink_to(shared / "real" / "models" / "stories260K")
    return place


def train_on_real(real: Path, count: int, devices: int) -> Path:
    folder = Path(f"real-{count}-of-{devices}")
    train(count, "configs/llava_merl.py", folder, {**REAL, "data.root": "data"}, cwd=real, devices=devices)
    return real / folder


@pytest.fixture(scope="module")
def alone(real: Path) -> Path:
    """A run of one process with four devices."""
    return train_on_real(real, 1, 4)


# Long, for each process compiles an encoder and an LLM: the configs that users have, on recordings as they are.
@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_processes_train_on_real_data_as_one_with_as_many_devices_does(
    real: Path, alone: Path, count: int, devices: int
) -> None:
    """The mesh is the same, so that Adam does not make much of what sums in another order differ by."""
    assert_same(train_on_real(real, count, devices), alone)


@pytest.fixture(scope="module")
def one(place: Path) -> Path:
    train(1, "configs/demo.py", place / "one", {**SMALL, "train.steps": STEPS})
    return place / "one"


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Until a step is logged and the checkpoint before it is there."""
    metrics = folder / "metrics.jsonl"
    for _ in range(4000):
        done = re.findall(r'"step": (\d+), "loss"', metrics.read_text()) if metrics.is_file() else []
        if done and int(done[-1]) >= step and (folder / "checkpoints" / str(step - 1)).is_dir():
            return
        assert all(process.poll() is None for process in processes), [p.communicate()[1][-2000:] for p in processes]
        time.sleep(0.1)
    raise AssertionError(f"no step {step} within 400 s")


@pytest.mark.slow
@pytest.mark.parametrize("count, victim", [(2, 1), (2, 0)])
def test_one_is_killed_the_others_name_it_and_the_run_goes_on(place: Path, one: Path, count: int, victim: int) -> None:
    folder = place / f"killed-{count}-{victim}"
    endless = {**SMALL, "train.steps": 100_000}
    processes = [start(command("configs/demo.py", folder, endless), env=env) for env in together(count)]
    try:
        wait_for_step(folder, 3, processes)
        os.kill(processes[victim].pid, signal.SIGKILL)
        told = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, text) in enumerate(zip(processes, told, strict=True)):
        if index != victim:
            assert process.returncode == 75, text
            assert re.search(rf"process {victim} of {count}, on \S+, is gone", text), text
    steps = max(runs.committed(folder)) + 4
    train(count, "configs/demo.py", folder, {**SMALL, "train.steps": steps})
    found, expected = runs.logged(folder), runs.logged(one)
    assert found.keys() == set(range(1, steps + 1)) and (folder / "DONE").is_file()
    for step, values in expected.items():
        if step in found:
            assert found[step]["loss"] == pytest.approx(values["loss"], rel=1e-5)


def evaluation(folder: Path, **more: Any) -> list[str]:
    flags = {"eval.batch_size": 2, "eval.max_new_tokens": 6, "eval.controls": "shuffled", "log.progress": "false"}
    values = [f"--config.{name}={value}" for name, value in {**flags, **more}.items()]
    return ["-m", "elm_jax.evaluate", "--checkpoint", str(folder), *values]


def evaluate(count: int, folder: Path, devices: int = 1) -> str:
    """An evaluation by `count` processes to its end; what the first told."""
    environments = together(count) if count > 1 else [{}]
    return runs.finish_all([start(evaluation(folder), env=env, devices=devices) for env in environments])[0]


def said(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """What was answered to each question, by file."""
    (results,) = (folder / "eval").iterdir()
    files = [results / "predictions.jsonl", *(results / "controls").iterdir()]
    parsed = {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {name: [(line["id"], line["answer"]) for line in lines] for name, lines in parsed.items()}


@pytest.mark.slow  # long: two and one processes evaluate under controls, and again after a stop
def test_processes_evaluate_as_one_with_as_many_devices_does_and_go_on_after_a_stop(place: Path, one: Path) -> None:
    alone, both = place / "evaluated-alone", place / "evaluated-together"
    for folder in (alone, both):
        shutil.copytree(one, folder)
    evaluate(1, alone, devices=2)
    assert "programs compiled" in evaluate(2, both)
    assert {name: sorted(answers) for name, answers in said(both).items()} == {
        name: sorted(answers) for name, answers in said(alone).items()
    }
    (results,) = (both / "eval").iterdir()
    whole, answers = (results / "metrics.json").read_bytes(), said(both)
    lines = (results / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 16, "a chunk has 16 questions"
    (results / "predictions.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-1][:20])
    (results / "metrics.json").unlink()
    shutil.rmtree(results / "controls")
    evaluate(2, both)
    assert said(both) == answers and (results / "metrics.json").read_bytes() == whole


@pytest.mark.slow
def test_a_recording_that_one_process_alone_cannot_read_is_left_out_by_both(place: Path, one: Path) -> None:
    folder = place / "evaluated-apart"
    shutil.copytree(one, folder)
    rows = [
        {"ecg_path": f"ecg_{i}.npy", "text": ["x", f"Is it{' so' * i}?", ["yes"]], "name": "x", "patient_id": str(i),
         "split": "test"}
        for i in range(20)
    ]  # fmt: skip
    hosts = [place / "host0", place / "host1"]
    for host in hosts:
        (host / "data").mkdir(parents=True)
        (host / "data" / "apart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i in range(20):
            np.save(host / "data" / f"ecg_{i}.npy", np.random.default_rng(i).normal(size=(12, 2500)))
    (hosts[1] / "data" / "ecg_3.npy").unlink()
    own = {"data.names": "apart.jsonl", "data.root": "data", "data.max_bad_records": 0.1}
    processes = [
        start(evaluation(folder, **own), cwd=host, env=env) for host, env in zip(hosts, together(2), strict=True)
    ]
    assert "left out: record apart.jsonl:3" in runs.finish_all(processes)[0]
    assert {len(answers) for answers in said(folder).values()} == {19, 3 * 19}


@pytest.mark.slow
def test_processes_that_see_other_devices_than_expected_end_at_once(place: Path) -> None:
    own = {"ELM_JAX_DEVICES_PER_PROCESS": "8"}
    processes = [
        start(command("configs/demo.py", place / "devices", SMALL), env={**env, **own}) for env in together(2)
    ]
    for text in runs.finish_all(processes, 2):
        assert re.search(r"error: ELM_JAX_DEVICES_PER_PROCESS: found 1 of platform cpu .* expected 8 devices", text)
    assert not (place / "devices").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, named",
    [
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}, "SLURM_STEP_NODELIST"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JAX_NUM_PROCESSES"),
    ],
)
def test_a_launcher_used_wrongly_is_an_error_of_the_command(place: Path, environment: Flags, named: str) -> None:
    told = runs.finish(start(command("configs/demo.py", place / "wrong", SMALL), env=environment), 2)
    assert told.startswith(f"error: {named}: ") and len(told.splitlines()) == 1
