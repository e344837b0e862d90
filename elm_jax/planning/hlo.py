"""XLA's compiled program as text -> instructions, shapes, loops and the groups of collectives.

Only what a cost model needs is read. Sizes are of one device: the text is of a partitioned program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-$]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-$]+) = ")


@dataclass(frozen=True)
class Array:
    """The dtype and the shape of an array; `bits` of one element. on_chip: a TPU's own memory holds it."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        width = re.search(r"\d+", self.dtype)
        return int(width[0]) if width else 8 if self.dtype == "pred" else 0  # a token has none

    @property
    def bytes(self) -> int:
        return self.size * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """`name = type opcode(operands), attributes`."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False
    number: int | None = None  # of a parameter; the value of a constant, where that is a whole number

    @cached_property
    def arrays(self) -> list[Array]:
        """Of the result: several where it is a tuple."""
        return _arrays(self.result)

    @cached_property
    def bytes(self) -> int:
        """Of the result, where it lies in the device's large memory."""
        return sum(array.bytes for array in self.arrays if not array.on_chip)

    @property
    def called(self) -> str:
        """The computation that a fusion, a call or an asynchronous start runs."""
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-$]+)")

    @property
    def target(self) -> str:
        """The library function of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def collective(self) -> str | None:
        """The kind of a collective (of the start of one, where start and end are apart)."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def channel(self) -> str:
        """Of a collective: its number, which no other has."""
        return self.attribute(r"channel_id=(\d+)")

    @property
    def body(self) -> str:
        """Of a while loop."""
        return self.attribute(r"body=%?([\w.\-$]+)")

    def attribute(self, pattern: str) -> str:
        """What a pattern's group finds in the attributes; empty where there is none."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def group(self, devices: int) -> list[int]:
        """The devices of the first group of a collective, by their place in the mesh; all where none are named."""
        return _first_group(self.attributes, devices)


class Module:
    """A program: computations by name, of which `entry` is run."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                header = _HEADER.match(line)
                if header and "->" in line:
                    current = self.computations.setdefault(header[2], {})
                    self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif (read := _instruction(line)) is not None:
                current[read.name] = read
        assert self.entry, "the text holds no program"

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results it takes."""
        here = self.computations[computation]
        return [here[name] for name in instruction.operands if name in here]

    @cached_property
    def outer(self) -> set[str]:
        """The computations that are no fusion's."""
        instructions = [i for computation in self.computations.values() for i in computation.values()]
        return set(self.computations) - {i.called for i in instructions if i.opcode == "fusion"}

    def trips(self, loop: Instruction) -> int:
        """How often a while loop runs: as XLA notes it, or the bound that its condition compares with; else 1."""
        noted = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if noted:
            return int(noted)
        test = self.computations.get(loop.attribute(r"condition=%?([\w.\-$]+)"), {})
        bounds = [i.number for i in test.values() if i.opcode == "constant" and i.number is not None]
        counters = [int(n[1]) for i in test.values() if (n := re.search(r"index=(\d+)", i.attributes))]
        if len(bounds) != 1 or len(counters) != 1:
            return 1
        return -(-bounds[0] // self._step(loop.body, counters[0]))

    def _step(self, body: str, counter: int) -> int:
        """By how much a run of a loop's body raises its counter, the element `counter` of what it returns."""
        instructions = self.computations[body]
        returned = next(i for i in instructions.values() if i.root).operands
        added = instructions.get(returned[counter]) if counter < len(returned) else None
        if added is None or added.opcode != "add":
            return 1
        constants = [instructions[name].number for name in added.operands if name in instructions]
        return next((n for n in constants if n), 1)

    def runs(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of all that is run, inside fusions and loops too."""
        name = computation or self.entry
        for instruction in self.computations[name].values():
            yield name, instruction, times
            if instruction.opcode == "while":
                yield from self.runs(instruction.body, times * self.trips(instruction))
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction.attributes):
                    yield from self.runs(branch, times)
            elif instruction.opcode in ("fusion", "call", "async-start") and instruction.called:
                yield from self.runs(instruction.called, times)


@dataclass(frozen=True)
class Collective:
    """What runs `count` times a step: `payload` bytes a time, whole (before a scatter, after a gather), in groups."""

    kind: str
    payload: int
    group: tuple[int, ...]
    arrays: tuple[Array, ...]  # that it carries, of one device
    count: int


def collectives(module: Module, devices: int) -> list[Collective]:
    """All collectives of a step, on groups of more than one device.

    A TPU carries one through several fusions, each with a copy of it: those of one channel are one.
    """
    found, channels = [], set()
    for computation, instruction, times in module.runs():
        if instruction.collective is None:
            continue
        channel = instruction.channel
        if channel and (channel, times) in channels and computation not in module.outer:
            continue
        channels.add((channel, times))
        one = collective(module, computation, instruction, devices, times)
        if len(one.group) > 1:
            found.append(one)
    return found


def collective(
    module: Module, computation: str, instruction: Instruction, devices: int, times: int = 1
) -> Collective:
    """What one collective carries. A TPU's reduce-scatter is an all-reduce in a fusion that keeps a slice, known by
    its name."""
    group, kind = tuple(instruction.group(devices)), str(instruction.collective)
    kind = "reduce-scatter" if kind == "all-reduce" and computation.startswith("all-reduce-scatter") else kind
    inputs = tuple(array for operand in module.operands(computation, instruction) for array in operand.arrays)
    grows = len(group) if kind == "all-gather" else 1
    payload = sum(array.bytes for array in inputs) * grows
    return Collective(kind, payload, group, inputs, times)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else re.match(r"[^\s{]*(\{[^}]*\})?", rest).end()  # pyright: ignore[reportOptionalMemberAccess]
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-$]+)", inside))
    number = int(inside) if opcode in ("parameter", "constant") and re.fullmatch(r"-?\d+", inside) else None
    return Instruction(match[2], opcode, result, operands, rest[close + 1 :], bool(match[1]), number)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise AssertionError(f"unbalanced brackets: {text[:200]}")


def _arrays(text: str) -> list[Array]:
    return [
        Array(dtype, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n), "S(1)" in layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    ]


def _branches(attributes: str) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if found:
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-$]+)", attributes)


def _first_group(attributes: str, devices: int) -> list[int]:
    """XLA writes groups as lists, as a reshaped range, or as axes of a mesh; pairs where there is a source."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return sorted({int(pairs[1]), int(pairs[2])})
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    ranged = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if ranged:
        order = _ordered(ranged[3], ranged[4])
        return order.reshape(int(ranged[1]), int(ranged[2]))[0].tolist()
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    )
    if meshed:
        sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", meshed[1])}
        ids = _ordered(meshed[2], meshed[3]) if meshed[2] else np.arange(math.prod(sizes.values()))
        return _along(ids.reshape(tuple(sizes.values())), list(sizes), meshed[4])
    return list(range(devices))


def _along(ids: np.ndarray, axes: list[str], chosen: str) -> list[int]:
    """The devices that share all axes of a mesh but the chosen ones; an axis may be taken in part: 'x':(before)size."""
    index: list[slice | int | np.ndarray] = [0] * ids.ndim
    for name, before, size in re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", chosen):
        whole = ids.shape[axes.index(name)]
        stride = whole // (int(before) * int(size)) if size else 1
        index[axes.index(name)] = np.arange(int(size or whole)) * stride
    return ids[np.ix_(*(np.atleast_1d(np.asarray(i)) for i in index))].reshape(-1).tolist()


def _ordered(shape: str, permutation: str | None) -> np.ndarray:
    """A range of numbers, laid out in `shape` and transposed."""
    sizes = [int(n) for n in shape.split(",")]
    order = np.arange(math.prod(sizes)).reshape(sizes)
    return (order.transpose([int(n) for n in permutation.split(",")]) if permutation else order).reshape(-1)
