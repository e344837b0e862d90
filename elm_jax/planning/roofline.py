"""How long a compiled step takes: XLA's own schedule, played with the speeds of `hardware.py`.

Compute runs in the order that XLA scheduled. A kernel takes as long as its arithmetic or its memory traffic, whichever
is longer. A collective starts where the schedule starts it and runs beside compute, one at a time on each kind of link;
where the schedule waits for it, compute waits. What is not counted: stragglers, congestion, the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from elm_jax.planning.costs import Cost, cost
from elm_jax.planning.hardware import Hardware
from elm_jax.planning.hlo import Collective, Instruction, Module, collective


@dataclass
class Times:
    """Seconds of a step on one device. `products`, `attention` and `other` are compute; `inner` and `outer` are what
    each kind of link is busy for; `total` is when the step is over, `exposed` what compute waits of it."""

    products: float = 0.0
    attention: float = 0.0
    other: float = 0.0
    inner: float = 0.0
    outer: float = 0.0
    total: float = 0.0

    @property
    def exposed(self) -> float:
        return self.total - self.products - self.attention - self.other

    def add(self, more: Times, times: int = 1) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(more, field.name))


def step_times(module: Module, hardware: Hardware, nodes: Sequence[int]) -> Times:
    """The predicted times of a step. `nodes`: the node of each device, in the order of the mesh."""
    return _Player(module, hardware, nodes).play(module.entry)


class _Player:
    def __init__(self, module: Module, hardware: Hardware, nodes: Sequence[int]) -> None:
        self.module, self.hardware, self.nodes = module, hardware, nodes
        self.carried: set[str] = set()  # channels of collectives inside fusions

    def play(self, computation: str) -> Times:
        """One run of a computation; what it started is waited for at its end."""
        spent = Times()
        free = {"inner": 0.0, "outer": 0.0}  # when each kind of link is free again
        ends: dict[str, float] = {}  # of what runs beside compute
        for instruction in self.module.computations[computation].values():
            opcode = instruction.opcode
            started = self._collective(computation, instruction)
            if started is not None:
                link, seconds = started
                setattr(spent, link, getattr(spent, link) + seconds)
                free[link] = max(spent.total, free[link]) + seconds
                ends[instruction.name] = free[link]
                if not opcode.endswith("-start"):
                    spent.total = free[link]
            elif opcode.endswith("-done"):
                spent.total = max(spent.total, ends.get(instruction.operands[0], 0.0))
            elif opcode == "while":
                spent.add(self.play(instruction.body), self.module.trips(instruction))
            elif opcode in ("call", "async-start") and instruction.called:
                spent.add(self.play(instruction.called))
            else:
                for link, seconds in self._inside(instruction):
                    setattr(spent, link, getattr(spent, link) + seconds)
                    free[link] = max(spent.total, free[link]) + seconds
                    ends[f"{instruction.name}.{link}"] = free[link]
                self._compute(cost(self.module, computation, instruction), spent)
        spent.total = max([spent.total, *ends.values()])
        return spent

    def _inside(self, fusion: Instruction) -> list[tuple[str, float]]:
        """The collectives that a fusion is the first to carry: a TPU runs these beside its products."""
        if fusion.opcode != "fusion" or not fusion.called:
            return []
        found = []
        for inner in self.module.computations[fusion.called].values():
            if inner.opcode == "fusion":
                found += self._inside(inner)
            elif inner.collective and inner.channel not in self.carried:
                self.carried.add(inner.channel)
                seconds = self._collective(fusion.called, inner)
                found += [] if seconds is None else [seconds]
        return found

    def _compute(self, does: Cost | None, spent: Times) -> None:
        if does is None:
            return
        seconds = compute_seconds(does, self.hardware)
        setattr(spent, does.kind, getattr(spent, does.kind) + seconds)
        spent.total += seconds

    def _collective(self, computation: str, instruction: Instruction) -> tuple[str, float] | None:
        """(kind of link, seconds) where the instruction is a collective, or starts one."""
        if instruction.opcode == "async-start" and instruction.called:
            inner = self.module.computations[instruction.called].values()
            return next((found for i in inner if (found := self._collective(instruction.called, i))), None)
        if instruction.collective is None:
            return None
        one = collective(self.module, computation, instruction, len(self.nodes))
        return communication_seconds(one, self.hardware, self.nodes) if len(one.group) > 1 else None


def compute_seconds(does: Cost, hardware: Hardware) -> float:
    """By the roofline: arithmetic or memory, whichever takes longer, and the start of a kernel."""
    reached = hardware.attention if does.kind == "attention" else hardware.products
    peak = hardware.peak / (hardware.full_precision if does.operand == "f32" else 1.0)
    arithmetic = does.flops / (peak * reached)
    return max(arithmetic, does.bytes / (hardware.bandwidth * hardware.streaming)) + hardware.kernel


def communication_seconds(
    one: Collective, hardware: Hardware, nodes: Sequence[int]
) -> tuple[str, float]:
    """(kind of link, seconds) of one collective: a ring, whose slowest link decides.

    A group with several devices in each node has as many network cards there, and uses them all. Latency grows with the
    depth of a tree of nodes.
    """
    size = len(one.group)
    inside = [nodes[device] for device in one.group]
    crosses = len(set(inside)) > 1
    speed = min(hardware.inner, inside.count(inside[0]) * hardware.outer) if crosses else hardware.inner
    passes = {"all-reduce": 2.0, "collective-permute": size / (size - 1)}.get(one.kind, 1.0)
    seconds = passes * one.payload * (size - 1) / size / (speed * hardware.collectives)
    return ("outer" if crosses else "inner"), seconds + hardware.latency * (1 + math.log2(len(set(inside))))
