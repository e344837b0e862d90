"""Two processes with four devices each are one program with eight."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import runs

# A constant rate, so that a run that is later made longer is the same run.
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "optim__schedule": "constant"}
STEPS = 8


def processes(folder: Path, **changes: Any) -> list[Any]:
    """Start a tiny run as two processes of four devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        runs.start(folder, devices=4, env={**env, "JAX_PROCESS_ID": str(i)}, **{**MESH, **changes}) for i in range(2)
    ]


def wait(started: list[Any], expect: int = 0) -> list[str]:
    try:
        return [runs.finish(process, expect) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(place: Path) -> Path:
    runs.train(place / "one", devices=8, train__steps=STEPS, **MESH)
    return place / "one"


def assert_agree(found: Path, expected: Path) -> None:
    mine, theirs = runs.logged(found), runs.logged(expected)
    assert mine.keys() == theirs.keys()
    for step, values in theirs.items():
        assert mine[step].keys() == values.keys()
        for name, value in values.items():
            assert mine[step][name] == pytest.approx(value, rel=1e-5), f"{name} of step {step}"


def files(folder: Path) -> set[str]:
    """What a run leaves beside its checkpoints' insides."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoints" not in p.parent.parts}


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on(place: Path, one: Path) -> None:
    folder = place / "two"
    wait(processes(folder, train__steps=STEPS - 2))
    assert runs.committed(folder) == [3, 6]
    runs.train(folder, devices=8, train__steps=STEPS, **{**MESH, "mesh__data": 8, "mesh__fsdp": 1, "mesh__tensor": 1})
    assert_agree(folder, one)
    assert files(folder) == files(one)


@pytest.mark.slow
def test_one_process_begins_and_two_go_on(place: Path, one: Path) -> None:
    folder = place / "grown"
    runs.train(folder, devices=8, train__steps=3, **MESH)
    wait(processes(folder, train__steps=STEPS, mesh__data=1, mesh__fsdp=1, mesh__tensor=8))
    assert [line["step"] for line in runs.lines(folder) if line.get("event") == "resume"] == [3]
    assert_agree(folder, one)


@pytest.mark.slow
def test_both_processes_stop_at_the_same_step_when_one_is_terminated(place: Path) -> None:
    folder = place / "terminated"
    started = processes(folder, train__steps=100_000, train__save_every=50_000)
    deadline = time.monotonic() + 300
    while not ((folder / "metrics.jsonl").is_file() and runs.logged(folder)):
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.05)
    os.kill(started[1].pid, signal.SIGTERM)
    messages = wait(started, expect=143)
    stopped_at = max(runs.logged(folder))
    assert runs.committed(folder) == [stopped_at]
    assert f"stopped after step {stopped_at}" in messages[0]


@pytest.mark.slow
def test_a_wrong_config_stops_every_process_with_status_2(place: Path) -> None:
    for error in wait(processes(place / "wrong", train__batch_size=6), expect=2):
        assert "error: train.batch_size" in error
