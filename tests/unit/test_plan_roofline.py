"""The roofline: what overlaps and what does not, which link decides, and published runs within 15 %."""

from __future__ import annotations

import lzma
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from elm_jax.errors import UserError
from elm_jax.planning import topology
from elm_jax.planning.hardware import H100, HARDWARE
from elm_jax.planning.hlo import Array, Collective, Module
from elm_jax.planning.roofline import communication_seconds, step_times

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from published_runs import RUNS, Run  # noqa: E402

PROGRAMS = ROOT / "tests" / "data" / "plan"
WITHIN = 0.15

OVERLAPPED = """\
ENTRY %m (x: bf16[4096,4096], w: bf16[512,4096]) -> bf16[4096,4096] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %w = bf16[512,4096]{1,0} parameter(1)
  %start = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %square = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %whole = bf16[4096,4096]{1,0} all-gather-done(%start)
  ROOT %y = bf16[4096,4096]{1,0} dot(%square, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_a_collective_costs_what_the_schedule_waits_for() -> None:
    hardware = replace(H100, kernel=0.0, latency=0.0)
    product = 2 * 4096**3 / (hardware.peak * hardware.products)
    gather = 2 * 4096**2 * 7 / 8 / (hardware.inner * hardware.collectives)
    assert gather < product
    hidden = step_times(Module(OVERLAPPED), hardware, [0] * 8)
    assert hidden.total == pytest.approx(2 * product) and hidden.exposed == pytest.approx(0.0, abs=1e-12)
    assert hidden.inner == pytest.approx(gather) and hidden.outer == 0
    slow = step_times(Module(OVERLAPPED), replace(hardware, outer=1e9), list(range(8)))
    assert slow.outer > product
    assert slow.total == pytest.approx(slow.outer + product)
    waiting = OVERLAPPED.replace("all-gather-start", "all-gather").replace("all-gather-done(%start)", "bitcast(%start)")
    assert step_times(Module(waiting), hardware, [0] * 8).total == pytest.approx(2 * product + gather)


def test_a_group_with_several_devices_in_a_node_uses_all_their_network_cards() -> None:
    def seconds(*group: int, kind: str = "all-gather") -> tuple[str, float]:
        one = Collective(kind, 10**9, group, (Array("bf16", (10**9 // 2,)),), 1)
        return communication_seconds(one, replace(H100, latency=0.0), [device // 8 for device in range(16)])

    across, within, all_of_both = seconds(0, 8), seconds(0, 1), seconds(*range(16))
    assert (across[0], within[0], all_of_both[0]) == ("outer", "inner", "outer")
    assert across[1] == pytest.approx(0.5e9 / (50e9 * H100.collectives))
    assert within[1] == pytest.approx(0.5e9 / (450e9 * H100.collectives))
    assert all_of_both[1] == pytest.approx(1e9 * 15 / 16 / (8 * 50e9 * H100.collectives))
    assert seconds(0, 8, kind="all-reduce")[1] == pytest.approx(2 * across[1])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_published_runs_are_predicted(run: Run) -> None:
    modules = [Module(lzma.decompress((PROGRAMS / f"{n}.hlo.xz").read_bytes()).decode()) for n in run.programs()]
    assert run.predicted(modules) == pytest.approx(run.measured, rel=WITHIN)


@pytest.mark.parametrize(
    "text", ["h100", "h100:8", "h100:1x16", "h100:0x8", "v5p:4x4", "v5e:4x4x4", "cpu:8x8", "b200:1x8", "cpu:", "cpu:-1"]
)
def test_a_topology_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--topology"):
        topology.parse(text)


@pytest.mark.parametrize(
    ("text", "devices", "node"),
    [
        ("h100:16x8", 128, "h100:1x8"),
        ("h100:1x4", 4, "h100:1x4"),
        ("h100:2x4", 8, "h100:1x4"),  # the GPUs of its nodes, not those of a DGX
        ("v5p:4x4x4", 64, "v5p:2x2x1"),
        ("v5e:1x1", 1, "v5e:1x1"),
        ("cpu:8", 8, "cpu:8"),
    ],
)
def test_a_topology_has_devices_and_a_node(text: str, devices: int, node: str) -> None:
    where = topology.parse(text)
    assert (where.count, where.one_node().name) == (devices, node)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("h100:1x8", []),
        ("h100:3x4", ["1x4", "2x4"]),
        ("v5e:8x16", ["2x2", "2x4", "4x4", "4x8", "8x8"]),
        ("v5p:4x4x8", ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"]),
        ("cpu:8", []),
    ],
)
def test_parts_of_a_topology_grow_from_one_node(text: str, parts: list[str]) -> None:
    where = topology.parse(text)
    assert [part.name for part in where.parts()] == [f"{where.kind}:{part}" for part in parts]


@pytest.mark.parametrize(("text", "package"), [("h100:1x8", "jax[cuda12]"), ("v5e:2x2", "jax[tpu]")])
def test_what_is_missing_is_named(text: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "_installed", lambda _: False)
    with pytest.raises(UserError, match="pip install") as error:
        topology.prepare(topology.parse(text))
    assert package in str(error.value)


def test_the_table_is_of_known_platforms() -> None:
    assert {hardware.platform for hardware in HARDWARE.values()} == {"gpu", "tpu", "cpu"}
