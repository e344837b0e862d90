"""metrics.jsonl survives a kill and a resume; MFU counts what its formula says."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elm_jax.config import LogConfig
from elm_jax.errors import UserError
from elm_jax.models.families import scratch_config
from elm_jax.models.functional import Leaf
from elm_jax.runtime import telemetry
from elm_jax.runtime.telemetry import MetricsFile, Progress, layer_parameters, peak_flops, step_flops


def test_lines_after_the_restored_step_are_cut(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, 0, writes=True)
    first.write({"event": "start", "step": 0})
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0 / step})
    first.write({"event": "bad_record", "step": 5, "id": "x"})
    with first.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    again = MetricsFile(tmp_path, 3, writes=True)
    again.write({"step": 4, "loss": 0.25})
    assert [line["step"] for line in again.lines()] == [0, 1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_line_is_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0, writes=True)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "mfu": None})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads(file.path.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "mfu": None}


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    other = MetricsFile(tmp_path, 0, writes=False)
    other.write({"step": 1})
    assert not other.path.exists() and other.lines() == []


def test_flops_of_a_step() -> None:
    """By hand: a layer's matrices for every token, the head for the supervised ones, and attention as masked."""
    llm = scratch_config({"hidden": 8, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 16, "max_len": 32}, 32)
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    tokens, supervised, pairs = 10, 3, 55
    products = matrices * tokens + 8 * llm.vocab_size * supervised
    attention = 2 * 2 * 2 * 4 * pairs  # scores and their use, layers, heads, head size
    assert step_flops(llm, matrices, True, tokens, supervised, pairs) == 6 * (products + attention)
    assert step_flops(llm, matrices, False, tokens, supervised, pairs) == 4 * (products + attention)


def test_of_experts_the_chosen_count_and_a_recurrence_does_by_its_state() -> None:
    sizes = {"hidden": 8, "layers": 2, "heads": 2, "mlp": 16, "max_len": 32}
    sparse = scratch_config({**sizes, "family": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}, 32)
    shapes = {"llm.layers.experts.gate.kernel": (2, 8, 4, 6), "llm.layers.experts.router": (2, 8, 8),
              "llm.layers.attention.q.kernel": (2, 8, 8), "llm.layers.attention.q.lora.a": (2, 8, 1),
              "llm.embedding.table": (32, 8)}  # fmt: skip
    leaves = {name: Leaf(shape, None, (), False) for name, shape in shapes.items()}
    assert layer_parameters(sparse, leaves) == 2 * (2 * 4 * 6 + 8 * 8 + 8 * 8)
    hybrid = scratch_config({**sizes, "family": "qwen3_5_text", "head_dim": 8}, 32)  # one layer of each kind
    assert step_flops(hybrid, 0, True, 10, 0, 55) == 6 * (2 * 2 * 8 * 55 + 3 * 4 * 16 * 16 * 10)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
     ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("cpu", None)],
)  # fmt: skip
def test_peaks(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


def test_the_bar_counts_from_where_the_run_resumes() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, piped = Terminal(), io.StringIO()
    bar = Progress(20, 10, shown=True, file=shown)
    Progress(20, 10, shown=True, file=piped).close()
    bar.update(1, {"loss": 1.25, "tokens_per_s": 1000.0, "mfu": 0.5})
    bar.close()
    assert "11/20" in shown.getvalue() and "loss=1.2500" in shown.getvalue() and "mfu=50.0%" in shown.getvalue()
    assert not piped.getvalue()  # a log file is not filled with bars


def test_a_tracker_without_its_package_is_the_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"config.log.wandb.*pip install wandb"):
        telemetry.trackers(tmp_path, LogConfig(wandb=True), {})


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in for Weights & Biases is asked for, call by call; a run's lines are under "lines"."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        asked.append({**options, "lines": []})
        lines = asked[-1]["lines"]
        return SimpleNamespace(log=lambda values, step: lines.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return asked


def test_a_run_keeps_its_id_in_weights_and_biases_and_two_runs_never_share_one(
    wandb: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for again in (False, True):
        folder.mkdir()
        for _ in range(2):  # started, resumed
            (track,) = telemetry.trackers(folder, LogConfig(wandb=True), {"seed": 1})
            track(3, {"loss": 0.5})
        shutil.copytree(folder, tmp_path / f"moved{again}")
        telemetry.trackers(tmp_path / f"moved{again}", LogConfig(wandb=True), {})
        shutil.rmtree(folder)
    first, second = ([call["id"] for call in wandb[i : i + 3]] for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert wandb[0]["lines"] == [(3, {"loss": 0.5})] and wandb[0]["config"] == {"seed": 1}
    assert all(call["resume"] == "allow" for call in wandb)


def test_weights_and_biases_own_variables_hold_where_the_config_says_nothing(
    wandb: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = LogConfig(wandb=True, wandb_project="mine", wandb_entity="team", wandb_tags=("a", "b"))
    telemetry.trackers(tmp_path, LogConfig(wandb=True), {})
    assert (wandb[0]["project"], wandb[0]["name"], wandb[0]["dir"]) == ("elm_jax", tmp_path.name, str(tmp_path))
    for name in ("PROJECT", "ENTITY", "TAGS", "NAME", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "theirs")
    telemetry.trackers(tmp_path, LogConfig(wandb=True), {})
    assert {wandb[1][key] for key in ("project", "entity", "tags", "name", "dir")} == {None}, "wandb reads its own"
    telemetry.trackers(tmp_path, said, {})
    assert [wandb[2][key] for key in ("project", "entity", "tags")] == ["mine", "team", ["a", "b"]]
    monkeypatch.setenv("WANDB_RUN_ID", "of-a-sweep")
    telemetry.trackers(tmp_path, said, {})
    (tmp_path / "new").mkdir()
    telemetry.trackers(tmp_path / "new", said, {})
    assert [call["id"] for call in wandb] == [wandb[0]["id"]] * 4 + ["of-a-sweep"]


def test_a_damaged_id_is_refused(wandb: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / telemetry.WANDB_ID).write_bytes(b"\0\0")
    with pytest.raises(UserError, match="wandb_id: found .*remove the file"):
        telemetry.trackers(tmp_path, LogConfig(wandb=True), {})
    assert not wandb


def test_a_profile_begins_and_ends_when_the_devices_have_done_what_they_were_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []

    @contextlib.contextmanager
    def settled() -> Iterator[None]:
        told.append("settled")
        yield

    monkeypatch.setattr(telemetry.jax.profiler, "start_trace", lambda folder: told.append("start"))
    monkeypatch.setattr(telemetry.jax.profiler, "stop_trace", lambda: told.append("stop"))
    profiler = telemetry.Profiler(tmp_path, "2:4", settled)
    for step in range(6):
        profiler.before(step)
        told.append(str(step))
    profiler.close()
    assert told == ["0", "1", "settled", "start", "2", "3", "settled", "stop", "4", "5"]
