"""`elm_jax.plan` compiles the train step for devices that need not be there, and says what it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]
WIDTH, LAYERS, HEADS, KV_HEADS, MLP, VOCABULARY = 128, 2, 4, 2, 512, 4096
SIZES = {
    "hidden": WIDTH, "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "mlp": MLP, "vocab_size": VOCABULARY,
    "tied": False, "max_len": 256,
}  # fmt: skip
MODEL = (
    "--config=configs/elf_base.py", "--config.llm.name=demo", f"--config.llm.scratch={SIZES}",
    "--config.data.max_len=64", "--config.data.segment_len=100", "--config.llm.compute_dtype=float32",
    "--config.llm.remat=none",
)  # fmt: skip
TOLERANCE = 0.05

pytestmark = pytest.mark.slow  # each compiles; what needs no compilation is in tests/unit/test_plan_*.py


def planned(command: Command, path: Path, *arguments: str) -> dict[str, Any]:
    done = command("plan", *MODEL, f"--json={path}", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def plan(command: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two shards of the parameters, each layer in two, on two replicas: 2 rows on each device of 8."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--topology=cpu:8", "--rows=2", "--targets=8")
    return planned(command, path, *mesh)


def test_keys_of_the_contract(plan: dict[str, Any]) -> None:
    assert plan["fits"] is True and plan["compile_s"] > 0
    assert plan["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert {"step_ms", "mfu", "scaling_efficiency", "scaling_baseline"} <= set(plan["predicted"])
    assert set(plan["bytes_per_device"]) >= {"parameters", "optimizer", "activations_and_temporaries", "total"}
    assert plan["collectives"] and all(set(entry) == {"count", "bytes"} for entry in plan["collectives"].values())
    assert plan["rows_per_step"] == 16 and plan["supervised_tokens_per_row"] == 8


def test_bytes_agree_with_arithmetic(plan: dict[str, Any]) -> None:
    layer = WIDTH * (2 * WIDTH + 2 * WIDTH * KV_HEADS // HEADS) + 3 * WIDTH * MLP
    connector = 12 * 100 * WIDTH
    parameters = LAYERS * layer + 2 * VOCABULARY * WIDTH + connector
    assert plan["parameters"] == pytest.approx(parameters, rel=TOLERANCE)
    held = plan["bytes_per_device"]
    assert held["parameters"] == pytest.approx(4 * parameters / 4, rel=TOLERANCE)
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=TOLERANCE)
    parts = held["parameters"] + held["optimizer"] + held["activations_and_temporaries"]
    assert held["total"] == parts and held["activations_and_temporaries"] > 0


def test_flops_agree_with_arithmetic(plan: dict[str, Any]) -> None:
    """Products of 6 FLOPs a weight and token, the head at supervised tokens only, plain attention over all pairs."""
    layer = WIDTH * (2 * WIDTH + 2 * WIDTH * KV_HEADS // HEADS) + 3 * WIDTH * MLP
    tokens, supervised = 16 * 64, 16 * 8
    attention = 2 * 2 * LAYERS * 16 * WIDTH * 64 * 64  # two products forward, four backward
    connector = 12 * 100 * WIDTH * 16
    expected = 6 * (LAYERS * layer * tokens + VOCABULARY * WIDTH * supervised) + 3 * attention + 4 * connector
    assert plan["flops_per_step"] == pytest.approx(expected, rel=TOLERANCE)


def test_no_parameter_is_replicated_and_no_logits_of_all_tokens_exist(plan: dict[str, Any]) -> None:
    assert plan["checks"]["replicated_parameters"] == []
    assert plan["checks"]["logits_of_all_tokens"] is False
    assert plan["attention"] == "xla"


@pytest.mark.parametrize(("targets", "found"), [(16, False), (WIDTH, True)])
def test_a_row_as_long_as_the_model_is_wide_is_no_logits(
    command: Command, tmp_path: Path, targets: int, found: bool
) -> None:
    """Its logits would have the shape of the head: they are there only where all tokens are supervised."""
    mesh = ("--config.mesh.fsdp=2", "--topology=cpu:2", "--rows=1")
    told = planned(command, tmp_path / "plan.json", *mesh, f"--config.data.max_len={WIDTH}", f"--targets={targets}")
    assert told["checks"]["logits_of_all_tokens"] is found


@pytest.mark.slow
def test_the_search_finds_a_mesh_that_fits(command: Command, tmp_path: Path) -> None:
    done = command("plan", *MODEL, "--topology=cpu:4", "--rows=2", "--search", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.split("\n\n")[0].splitlines()[1:]]
    assert len(table) >= 4 and {row[2] for row in table} == {"1", "2"}  # two key/value heads: tensor 4 cannot be
    best = json.loads((tmp_path / "plan.json").read_text())
    assert [str(size) for size in best["mesh"].values()] == table[0][:3] and best["fits"]
    assert float(table[0][5]) == pytest.approx(best["predicted"]["step_ms"], abs=0.1)


def refused(command: Command, *arguments: str) -> str:
    done = command("plan", *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


def test_errors_say_what_to_do(command: Command, tmp_path: Path) -> None:
    assert "NODESxGPUS" in refused(command, *MODEL, "--topology=h100")
    assert "--topology" in refused(command, *MODEL)
    assert "no folder" in refused(command, *MODEL, "--topology=cpu:8", f"--json={tmp_path}/none/plan.json")
    assert "--rows" in refused(command, *MODEL, "--topology=cpu:8", "--rows=0")
    assert "train.batch_size" in refused(command, *MODEL, "--topology=cpu:8", "--config.train.batch_size=3")
    assert "mesh.tensor" in refused(command, *MODEL, "--topology=cpu:8", "--config.mesh.tensor=4")
    if importlib.util.find_spec("jax_plugins") is None:
        assert "pip install 'jax[cuda12]==" in refused(command, *MODEL, "--topology=h100:1x8")
