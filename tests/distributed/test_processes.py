"""Two processes with four devices each are one program with eight."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import runs

# A constant rate, so that a run that is later made longer is the same run.
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
MESH |= {"optim__schedule": "constant", "optim__warmup_ratio": 0.0}
DATA = {**MESH, "mesh__data": 8, "mesh__fsdp": 1, "mesh__tensor": 1}
TENSOR = {**MESH, "mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}
STEPS = 9

Logged = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(place: Path) -> Path:
    runs.train(place / "one", devices=8, train__steps=STEPS, **MESH)
    return place / "one"


def assert_agree(found: Logged, expected: Logged) -> None:
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        for name, value in values.items():
            assert found[step][name] == pytest.approx(value, rel=1e-5), f"{name} of step {step}"


def files(folder: Path) -> set[str]:
    """What a run leaves beside its checkpoints' insides."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoints" not in p.parent.parts}


@pytest.mark.slow
def test_one_process_begins_and_two_end_it(place: Path, one: Path) -> None:
    """On a mesh whose every row lies on both processes, too."""
    folder = place / "grown"
    runs.train(folder, devices=8, train__steps=3, **DATA)
    runs.finish_all(runs.start_two(folder, train__steps=STEPS, **TENSOR))
    assert [line["step"] for line in runs.lines(folder) if line.get("event") == "resume"] == [3]
    assert_agree(runs.logged(folder), runs.logged(one))
    assert files(folder) == files(one)


@pytest.mark.slow
def test_the_rows_of_a_process_need_not_run_on(place: Path, one: Path) -> None:
    """As on a torus."""
    folder, options = place / "turns", {**DATA, "train__steps": STEPS}
    runs.finish_all([runs.start(folder, devices=4, env={**env, "TEST_MESH": "1"}, **options) for env in runs.two()])
    assert_agree(runs.logged(folder), runs.logged(one))


@pytest.mark.slow
def test_one_process_is_terminated_and_both_stop_at_the_same_step(place: Path, one: Path) -> None:
    """And one process goes on."""
    folder = place / "terminated"
    asks = ["", f"TERM@step={STEPS}"]
    endless = {**MESH, "train__steps": 100_000}
    started = [
        runs.start(folder, devices=4, env=env, ask=ask, **endless) for env, ask in zip(runs.two(), asks, strict=True)
    ]
    messages = runs.finish_all(started, 143)
    stopped_at = max(runs.logged(folder))
    assert runs.committed(folder)[-1] == stopped_at and f"stopped after step {stopped_at}" in messages[0]
    steps = {step: values for step, values in runs.logged(folder).items() if step <= STEPS}
    assert_agree(steps, runs.logged(one))
    runs.train(folder, devices=8, **{**MESH, "train__steps": stopped_at + 1})
    assert sorted(runs.logged(folder)) == list(range(1, stopped_at + 2))


@pytest.mark.slow
def test_every_process_gathers_what_each_of_them_brings() -> None:
    """Of any length: this is how the processes agree on the bad records that they met."""
    code = (
        "import sys, json\n"
        "from elm_jax.runtime import distributed\n"
        "distributed.start()\n"
        "own = json.loads(sys.argv[1])\n"
        "print(json.dumps([distributed.gather(own), distributed.gather([]), distributed.neighbours()]))\n"
    )
    brought = [[{"id": "records:7", "error": "dåmaged"}], []]
    commands = [[sys.executable, "-c", code, json.dumps(own)] for own in brought]
    started = [runs.start_command(c, devices=1, env=env) for c, env in zip(commands, runs.two(), strict=True)]
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert json.loads(out.splitlines()[-1]) == [brought, [[], []], 2]


@pytest.mark.slow
def test_a_wrong_config_stops_every_process_with_status_2(place: Path) -> None:
    for error in runs.finish_all(runs.start_two(place / "wrong", **MESH, train__batch_size=6), 2):
        assert "error: train.batch_size" in error
