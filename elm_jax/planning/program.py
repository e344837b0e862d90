"""Compile a run's train step for a mesh that need not exist, and read what the compiled program is.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config
from elm_jax.data.batch import BatchShape
from elm_jax.errors import UserError, one_line
from elm_jax.models.hints import placed
from elm_jax.planning.costs import cost
from elm_jax.planning.hlo import Collective, Module, collectives
from elm_jax.planning.topology import Topology
from elm_jax.runtime.mesh import RULES, SMALL, MeshPlacement, check_heads, partition_spec
from elm_jax.runtime.xla_flags import gpu_flags
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
        return self.config.train.batch_size

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


def assembled(config: Config, mesh: Mesh) -> Assembly:
    """The parts of a run on devices as those of `mesh`; no weights are read."""
    with placed(MeshPlacement(mesh)):
        return assemble(config, weights=False)


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
    program = train_program(assembly, mesh, shape, STEPS)
    lowered = program.step.lower(program.state, program.frozen, program.batch)
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
        local_bytes(program.state.optimizer), 0,
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
    """All-reduces that carry what a trained matrix is when it is gathered over fsdp: there should be none."""
    if compiled.mesh.shape["fsdp"] == 1:
        return []
    shapes: dict[tuple[int, ...], str] = {}
    leaves = compiled.assembly.structure.leaves
    for name, x in compiled.program.state.trained.items():
        own = len(leaves[name].axes)
        spec = partition_spec(compiled.mesh, leaves[name].axes, x.shape, name)[-own:]
        if "fsdp" not in spec or math.prod(x.shape[-own:]) < SMALL:
            continue
        ways = [compiled.mesh.shape["tensor"] if axis == "tensor" else 1 for axis in spec]
        gathered = [size // n for size, n in zip(x.shape[-own:], ways, strict=True)]
        shapes[_essential(gathered)] = name
    carried = [c for c in compiled.collectives if c.kind == "all-reduce"]
    return sorted({shapes[key] for c in carried if (key := _essential(c.largest.shape)) in shapes})


def logits_of_all_tokens(compiled: Compiled) -> bool:
    """Whether the program holds (B, T, V), of one device, anywhere."""
    ways = compiled.mesh.shape["data"] * compiled.mesh.shape["fsdp"]
    rows = compiled.rows // compiled.config.optim.accum_steps // ways
    columns = compiled.assembly.llm.vocab_size // compiled.mesh.shape["tensor"]
    forms = {_essential((rows, compiled.shape.tokens, columns)), _essential((rows * compiled.shape.tokens, columns))}
    arrays = (array for _, instruction, _ in compiled.module.runs() for array in instruction.arrays)
    return any(_essential(array.shape) in forms for array in arrays)


def _essential(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))
