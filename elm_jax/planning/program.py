"""Compile a run's train step for a mesh that need not exist, and read what the compiled program is.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax.assemble import Assembly
from elm_jax.config import Config
from elm_jax.data.batch import BatchShape
from elm_jax.errors import UserError, one_line
from elm_jax.planning.costs import cost
from elm_jax.planning.hlo import Collective, Module, collectives
from elm_jax.planning.topology import Topology
from elm_jax.runtime.gpu_settings import gpu_flags
from elm_jax.runtime.mesh import RULES, SMALL, batch_ways, check_heads, partition_spec
from elm_jax.training.program import TrainProgram, check_rows, train_program

STEPS = 1000  # of the schedule that is compiled in; any number makes the same program


@dataclass(frozen=True)
class Bytes:
    """Of one device."""

    parameters: int
    optimizer: int
    activations_and_temporaries: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.activations_and_temporaries


@dataclass(frozen=True)
class Compiled:
    """A train step, compiled for `mesh`. `rows` are those of a micro-batch, over the whole mesh."""

    config: Config
    assembly: Assembly
    mesh: Mesh
    shape: BatchShape
    program: TrainProgram
    module: Module
    text: str
    bytes: Bytes
    seconds: float

    @property
    def rows(self) -> int:
        """Of a step, over all devices and micro-batches."""
        return self.config.train.count

    @property
    def collectives(self) -> list[Collective]:
        return collectives(self.module, self.mesh.size)

    @property
    def flops(self) -> int:
        """Of a step on one device: products, convolutions and fused attention, recomputation included."""
        return sum(does.flops * times for does, times in self._costs())

    @property
    def float32_products(self) -> float:
        """The part of the FLOPs that multiplies float32."""
        return sum(does.flops * times for does, times in self._costs() if does.operand == "f32") / max(self.flops, 1)

    def _costs(self) -> Iterable[tuple[Any, int]]:
        for computation, instruction, times in self.module.runs():
            if computation in self.module.outer and (does := cost(self.module, computation, instruction)):
                yield does, times

    @property
    def attention(self) -> str:
        """The attention that the program runs."""
        return "cudnn" if "__cudnn$fmha" in self.text else "xla"


class TooLarge(UserError):
    """The compiler found no program that fits the memory of a device."""


def compile_step(assembly: Assembly, mesh: Mesh, shape: BatchShape, topology: Topology) -> Compiled:
    """Compile the train step that `elm_jax.train` would jit.

    Raises:
        UserError: the batch, the heads or a parameter do not divide over the mesh.
        TooLarge: no program fits (TPUs; for others `Compiled.bytes` tells).
    """
    check_rows(assembly.config, mesh)
    check_heads(mesh, assembly.llm)
    started = time.perf_counter()
    program = train_program(assembly, mesh, STEPS)
    lowered = program.step.lower(program.state, program.frozen, program.batch(shape))
    try:
        done = lowered.compile(compiler_options=compiler_options(topology.hardware.platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise TooLarge(
            f"the mesh {sizes} on {topology.name}", one_line(str(error))[:300], "a program that fits",
            "lower --rows, set llm.remat=full, or take more devices or another mesh",
        ) from error  # fmt: skip
    seconds, text = time.perf_counter() - started, done.as_text()
    memory = done.memory_analysis()
    held = Bytes(
        local_bytes((program.state.trained, program.state.statistics, program.frozen)),
        local_bytes((program.state.optimizer, program.state.average)), 0,
    )  # fmt: skip
    total = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip
    rest = replace(held, activations_and_temporaries=total - held.total)
    return Compiled(assembly.config, assembly, mesh, shape, program, Module(text), text, rest, seconds)


def compiler_options(platform: str) -> dict[str, bool | int | str]:
    """As a run has them, without what needs the devices: there is nothing to time algorithms on."""
    if platform == "gpu":
        return {**gpu_flags(version("jaxlib")), "xla_gpu_autotune_level": 0}
    # How fast a CPU's code is makes no difference to what is read of it.
    return {"xla_backend_optimization_level": 0} if platform == "cpu" else {}


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shards of (abstract) arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def replicated_parameters(compiled: Compiled) -> list[str]:
    """Large parameters that a device holds whole though their axes have a place on the mesh: there should be none."""
    leaves = compiled.assembly.structure.leaves
    found = []
    for name, x in {**compiled.program.state.trained, **compiled.program.frozen}.items():
        targets = {RULES[axis] for axis in leaves[name].axes if axis}
        divided = any(compiled.mesh.shape[target] > 1 for target in targets if target in compiled.mesh.shape)
        if divided and math.prod(x.shape) >= SMALL and x.sharding.is_fully_replicated:
            found.append(name)
    return found


def whole_gradients(compiled: Compiled) -> list[str]:
    """What is all-reduced over fsdp though its parameter is divided there: there should be nothing (`all_reduced`)."""
    state = compiled.program.state
    divided: dict[str, Sequence[int]] = {}
    whole = 0
    for name, x in state.trained.items():
        shard, gathered = _shapes(compiled, name, x.shape)
        if shard == gathered:
            whole += math.prod(x.shape)
        elif math.prod(x.shape[-len(shard) :]) >= SMALL:
            divided[name] = gathered
    # The sums and the sums of squares that statistics are made of, and the gradients of these.
    whole += 2 * sum(math.prod(x.shape) for x in state.statistics.values())
    return all_reduced(compiled.collectives, compiled.mesh.shape, divided, whole * compiled.config.optim.accum_steps)


def all_reduced(
    carried: Iterable[Collective], ways: Mapping[str, int], divided: Mapping[str, Sequence[int]], whole: int
) -> list[str]:
    """What is all-reduced over the axis `fsdp` of a mesh of size `ways`, and should be in shards.

    Matrices of which an array has the shape are named. XLA combines small all-reduces into flat ones, of which only the
    size tells: where more elements are carried than what is `whole` on each device explains, the largest of these
    arrays are given, as `bf16[8388608]`.

    Args:
        divided: the shapes that matrices divided over fsdp have when gathered.
        whole: elements that may be all-reduced in a step; fewer than SMALL more (losses, norms, counts) pass too.
    """
    names = {_essential(shape): name for name, shape in divided.items()}
    found, rest = set(), []
    for one in carried:
        if one.kind != "all-reduce" or not _varies("fsdp", one.group, ways):
            continue
        for array in one.arrays:
            if (shape := _essential(array.shape)) in names:
                found.add(names[shape])
            else:
                rest.append((array.size * one.count, array))
    rest.sort(key=lambda item: item[0])
    while sum(size for size, _ in rest) >= whole + SMALL:
        _, array = rest.pop()
        found.add(f"{array.dtype}[{','.join(map(str, array.shape))}]")
    return sorted(found)


def logits_of_all_tokens(compiled: Compiled) -> bool:
    """Whether the program holds (B, T, V), of one device, anywhere."""
    mesh, llm, tokens = compiled.mesh, compiled.assembly.llm, compiled.shape.tokens
    rows = compiled.rows // compiled.config.optim.accum_steps // batch_ways(mesh)
    parameters = {**compiled.program.state.trained, **compiled.program.frozen}
    known = {shape for name, x in parameters.items() for shape in _shapes(compiled, name, x.shape)}
    return holds_logits(compiled.module, (rows, tokens, llm.vocab_size // mesh.shape["tensor"]), llm.embedding, known)


def holds_logits(module: Module, logits: tuple[int, int, int], width: int, known: Iterable[Sequence[int]]) -> bool:
    """Whether a program holds an array of the shape `logits` (B, T, V), or (B T, V).

    Where a parameter has such a shape too (`known`), as the head (D, V) where B T is the width D, only a product over
    `width` numbers counts: logits are one, and the head's gradient is a product over as many tokens as there are logits
    at a time.
    """
    rows, tokens, columns = logits
    forms = {_essential(logits), _essential((rows * tokens, columns))}
    certain = forms - {_essential(shape) for shape in known}
    flops = 2 * math.prod(logits) * width
    for computation, instruction, _ in module.runs():
        shapes = [_essential(array.shape) for array in instruction.arrays]
        if any(shape in certain for shape in shapes):
            return True
        if shapes and shapes[0] in forms:
            does = cost(module, computation, instruction)
            if does is not None and does.flops == flops:
                return True
    return False


def _shapes(compiled: Compiled, name: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a parameter, without the axis of stacked layers: (a device's shard, the same gathered over fsdp)."""
    axes, mesh = compiled.assembly.structure.leaves[name].axes, compiled.mesh
    placed_on = partition_spec(mesh, axes, shape, name)
    own = list(zip(shape, placed_on, strict=True))[-len(axes) :]
    shard = tuple(size // mesh.shape.get(str(axis), 1) for size, axis in own)
    return shard, tuple(size if axis == "fsdp" else n for n, (size, axis) in zip(shard, own, strict=True))


def _varies(axis: str, group: Iterable[int], ways: Mapping[str, int]) -> bool:
    """Whether a group, of places on a mesh of size `ways`, has devices that differ along an axis."""
    places = np.unravel_index(list(group), tuple(ways.values()))[list(ways).index(axis)]
    return len(set(places.tolist())) > 1


def _essential(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))
