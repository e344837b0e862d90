"""What scaling is measured against: one node, or the least part of a topology that holds the step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from elm_jax.config import resolve
from elm_jax.errors import UserError
from elm_jax.planning import program, topology
from elm_jax.planning.program import TooLarge
from elm_jax.planning.report import Load, Plan, Planner
from elm_jax.planning.roofline import Times

SIZES = {
    "hidden": 64, "layers": 1, "heads": 4, "kv_heads": 4, "mlp": 128, "vocab_size": 512, "tied": False, "max_len": 64,
}  # fmt: skip
ROWS = 2
Compiled = list[tuple[str, tuple[int, ...], int]]  # topology, mesh, rows of a step


def planner(monkeypatch: pytest.MonkeyPatch, text: str, fits: tuple[str, ...]) -> tuple[Planner, Compiled]:
    """A planner on CPU devices whose compiler finds a program for these topologies only, and what was compiled.

    A step takes 1 second on each device of the topology.
    """
    compiled: Compiled = []

    def compile_step(assembly: Any, mesh: Any, shape: Any, where: topology.Topology) -> Any:
        rows = assembly.config.train.batch_size
        compiled.append((where.name, tuple(mesh.shape.values()), rows))
        if where.name not in fits:
            raise TooLarge(where.name, "too much", "less", "take more devices")
        return SimpleNamespace(mesh=mesh, rows=rows, shape=shape)

    monkeypatch.setattr(topology, "devices", lambda where: jax.devices()[: where.count])
    monkeypatch.setattr(program, "compile_step", compile_step)
    monkeypatch.setattr(Planner, "_times", lambda self, compiled, where: Times(total=float(where.count)))
    monkeypatch.setattr(Planner, "_mfu", lambda self, compiled, times: 0.5)
    tree = {"elm": "base_elf", "llm": {"name": "demo", "scratch": SIZES}, "data": {"max_len": 64}}
    return Planner(resolve({**tree, "mesh": {"data": 1, "fsdp": 8}}), topology.parse(text), Load(ROWS)), compiled


def scaling(plan: Plan) -> tuple[str, float]:
    return plan.baseline.name, plan.scaling


def test_scaling_is_relative_to_the_least_part_that_holds_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    small, compiled = planner(monkeypatch, "v5e:1x8", fits=("v5e:1x8", "v5e:1x4", "v5e:1x2"))
    assert scaling(small.plan()) == ("v5e:1x2", 2 / 8)
    assert compiled == [("v5e:1x8", (1, 8, 1), 8 * ROWS), ("v5e:1x2", (1, 2, 1), 2 * ROWS)]
    large, compiled = planner(monkeypatch, "v5e:1x8", fits=("v5e:1x8", "v5e:1x4"))
    assert scaling(large.plan()) == ("v5e:1x4", 4 / 8)
    assert [name for name, *_ in compiled] == ["v5e:1x8", "v5e:1x2", "v5e:1x4"]
    large.plan()
    assert [name for name, *_ in compiled][3:] == ["v5e:1x8"]  # no part is compiled twice


def test_a_step_that_only_the_whole_holds_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = planner(monkeypatch, "v5e:1x8", fits=("v5e:1x8",))
    assert scaling(whole.plan()) == ("v5e:1x8", 1.0)
    none, _ = planner(monkeypatch, "v5e:1x8", fits=())
    with pytest.raises(TooLarge):
        none.plan()


def test_nodes_have_the_gpus_of_the_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    both, compiled = planner(monkeypatch, "h100:4x2", fits=("h100:4x2", "h100:1x2"))
    assert scaling(both.plan()) == ("h100:1x2", 2 / 8)
    assert compiled[-1] == ("h100:1x2", (1, 2, 1), 2 * ROWS)
    meshes = both.candidates()
    assert {mesh.tensor for mesh in meshes} == {1, 2}  # no layer is split over two nodes
    assert {mesh.fsdp for mesh in meshes if mesh.tensor == 1} == {1, 2, 8}


def test_conversations_of_a_step_are_rows_where_each_has_one_and_packed_ask_for_rows() -> None:
    tree = {"train": {"conversations": 12}, "optim": {"accum_steps": 2}}
    alone, packed = resolve({**tree, "data": {"pack": False}}), resolve(tree)
    assert Load().config(alone, 4).train.batch_size == 2 * 4 * 2  # 6 in a micro-batch, on 4 devices
    with pytest.raises(UserError, match="--rows"):
        Load().config(packed, 4)
    train = Load(rows=3).config(packed, 4).train
    assert (train.batch_size, train.conversations) == (24, None)
