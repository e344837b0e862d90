"""From a config and a topology to what is told of them: fits or not, bytes, FLOPs, collectives, predicted speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config, MeshConfig
from elm_jax.data.batch import BLOCK, BatchShape
from elm_jax.errors import UserError
from elm_jax.models.hints import placed
from elm_jax.models.lora import is_lora
from elm_jax.planning import program, topology
from elm_jax.planning.program import Compiled
from elm_jax.planning.roofline import Times, step_times
from elm_jax.planning.topology import Topology
from elm_jax.runtime.mesh import MeshPlacement, batch_ways, divisors, make_mesh
from elm_jax.runtime.telemetry import layer_parameters, step_flops

TARGETS = 8  # a row's tokens for each supervised one, where `Load.targets` is not given
ECG_TOKENS = 512  # a row's tokens for each ECG, where `Load.signals` is not given


@dataclass(frozen=True)
class Load:
    """What a step reads, in place of a data set: ECGs and supervised tokens of a row, rows of a micro-batch for each
    device. None: see the constants above; for rows, what `train.batch_size` says, or `train.conversations` in rows of
    their own. key_blocks: as in `BatchShape`."""

    rows: int | None = None
    signals: int | None = None
    targets: int | None = None
    key_blocks: int = 0

    def shape(self, config: Config) -> BatchShape:
        tokens = config.data.max_len
        signals = max(1, tokens // ECG_TOKENS) if self.signals is None else self.signals
        targets = max(1, tokens // TARGETS) if self.targets is None else self.targets
        if self.key_blocks and (tokens % BLOCK or self.key_blocks > tokens // BLOCK):
            expected = f"at most {tokens // BLOCK}, with data.max_len a multiple of {BLOCK}"
            raise UserError("--key-blocks", f"{self.key_blocks} for rows of {tokens} tokens", expected, "lower it")
        return BatchShape(tokens, signals, targets, self.key_blocks)

    def config(self, config: Config, devices: int) -> Config:
        """`config` with the rows of a step on so many devices.

        Raises:
            UserError: how many rows the conversations of a step fill only their data tell.
        """
        rows, train = self.rows, config.train
        if rows is None and train.conversations is None:
            return config
        if rows is None and config.data.pack:
            raise UserError(
                f"train.conversations={train.conversations}", "packed into as many rows as their data need",
                "the rows of a micro-batch for each device", "give --rows: a run says at its start how many rows a "
                "step has",
            )  # fmt: skip
        alone = -(-train.count // config.optim.accum_steps // devices)
        rows = (alone if rows is None else rows) * devices * config.optim.accum_steps
        return replace(config, train=replace(train, batch_size=rows, conversations=None))


@dataclass(frozen=True)
class Plan:
    """A compiled step and its prediction. `scaling`: tokens per second and device, relative to `baseline`: one node,
    or the least larger part of the topology that holds the step (all of it where no other does)."""

    topology: Topology
    compiled: Compiled
    times: Times
    mfu: float
    scaling: float
    baseline: Topology

    @property
    def fits(self) -> bool:
        return self.compiled.bytes.total <= self.topology.hardware.memory

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        compiled = self.compiled
        return compiled.rows * compiled.shape.tokens / self.times.total / compiled.mesh.size

    def json(self) -> dict[str, Any]:
        """What `--json` writes."""
        compiled, times = self.compiled, self.times
        held = compiled.bytes
        sums: dict[str, dict[str, int]] = {}
        for one in compiled.collectives:
            entry = sums.setdefault(one.kind, {"count": 0, "bytes": 0})
            entry["count"] += one.count
            entry["bytes"] += one.count * one.payload
        return {
            "topology": self.topology.name,
            "fits": self.fits,
            "parameters": sum(math.prod(leaf.shape) for leaf in compiled.assembly.structure.leaves.values()),
            "bytes_per_device": {
                "parameters": held.parameters,
                "optimizer": held.optimizer,
                "activations_and_temporaries": held.activations_and_temporaries,
                "total": held.total,
                "usable": int(self.topology.hardware.memory),
            },
            "flops_per_step": compiled.flops * compiled.mesh.size,
            "collectives": sums,
            "predicted": {
                "step_ms": 1000 * times.total,
                "mfu": self.mfu,
                "scaling_efficiency": self.scaling,
                "scaling_baseline": self.baseline.name,
                "tokens_per_s_per_device": self.tokens_per_second,
                "products_ms": 1000 * times.products,
                "attention_ms": 1000 * times.attention,
                "other_ms": 1000 * times.other,
                "exposed_communication_ms": 1000 * times.exposed,
                "inner_links_ms": 1000 * times.inner,
                "outer_links_ms": 1000 * times.outer,
            },
            "mesh": dict(compiled.mesh.shape),
            "rows_per_step": compiled.rows,
            "tokens_per_row": compiled.shape.tokens,
            "supervised_tokens_per_row": compiled.shape.targets,
            "signals_per_row": compiled.shape.signals,
            "attention": compiled.attention,
            "checks": {
                "replicated_parameters": program.replicated_parameters(compiled),
                "all_reduced_weights": program.whole_gradients(compiled),
                "logits_of_all_tokens": program.logits_of_all_tokens(compiled),
                "float32_products": compiled.float32_products,
            },
            "compile_s": compiled.seconds,
        }


class Planner:
    """Plans of one config on one topology; `prepare` the process for it first."""

    def __init__(self, config: Config, where: Topology, load: Load) -> None:
        self.where, self.load, self.config = where, load, load.config(config, where.count)
        self.devices = topology.devices(where)
        with placed(MeshPlacement(make_mesh(MeshConfig(), self.devices))):
            self.assembly = assemble(self.config, weights=False)
        self.assembly.check_llm()
        self._speeds: dict[tuple[str, int, int, int], float | None] = {}  # see `_speed`

    def plan(self, mesh: MeshConfig | None = None) -> Plan:
        """The plan for a mesh (default: the config's).

        Raises:
            UserError: it does not fit the model, the batch or the number of devices.
        """
        compiled = self.compiled(mesh)
        times = self._times(compiled, self.where)
        plan = Plan(self.where, compiled, times, self._mfu(compiled, times), 1.0, self.where)
        for part in self.where.parts():
            if (speed := self._speed(part, compiled)) is not None:
                return replace(plan, scaling=plan.tokens_per_second / speed, baseline=part)
        return plan

    def compiled(self, mesh: MeshConfig | None = None) -> Compiled:
        """The step for a mesh (default: the config's). Raises UserError as `plan`."""
        return self._compile(make_mesh(mesh or self.config.mesh, self.devices), self.assembly, self.where)

    def search(self) -> list[Plan]:
        """Plans for the meshes worth trying, the best first: those that fit, by predicted speed.

        Raises:
            UserError: none can hold the parameters and the optimizer.
        """
        meshes = self.candidates()
        if not meshes:
            raise UserError(
                "--search", f"no mesh of {self.where.name} that holds parameters and optimizer", "one that does",
                "take more devices, or train with LoRA",
            )  # fmt: skip
        plans, problem = [], None
        for mesh in meshes:
            try:
                plans.append(self.plan(mesh))
            except program.TooLarge as error:
                problem = error
        if problem is not None and not plans:
            raise problem
        return sorted(plans, key=lambda plan: (not plan.fits, -plan.tokens_per_second))

    def candidates(self) -> list[MeshConfig]:
        """Meshes that hold parameters and optimizer and divide heads and rows: for each `tensor`, the smallest `fsdp`
        that does, the one as large as a node and the largest."""
        from elm_jax.training.program import check_rows, train_program

        found = []
        node, llm = self.where.one_node().count, self.assembly.llm
        for tensor in divisors(node if self.where.hardware.platform == "gpu" else min(8, self.where.count)):
            if llm.heads % tensor or llm.kv_heads % tensor:
                continue
            fitting = []
            for fsdp in divisors(self.where.count // tensor):
                try:
                    mesh = make_mesh(MeshConfig(-1, fsdp, tensor), self.devices)
                    check_rows(self.config, mesh)
                    parts = train_program(self.assembly, mesh, program.STEPS)
                except UserError:
                    continue
                held = program.local_bytes((parts.state, parts.frozen))
                if held < self.where.hardware.memory:
                    fitting.append(MeshConfig(self.where.count // tensor // fsdp, fsdp, tensor))
            chosen = {0, len(fitting) - 1, *(n for n, mesh in enumerate(fitting) if mesh.fsdp * tensor == node)}
            found += [fitting[n] for n in sorted(chosen) if fitting]
        return found

    def _compile(self, mesh: Mesh, assembly: Assembly, where: Topology) -> Compiled:
        return program.compile_step(assembly, mesh, self.load.shape(self.config), where)

    def _times(self, compiled: Compiled, where: Topology) -> Times:
        return step_times(compiled.module, where.hardware, nodes(compiled.mesh, where))

    def _speed(self, part: Topology, compiled: Compiled) -> float | None:
        """Tokens per second and device on a part of the topology, with as many rows on each part of the batch.

        None where it does not fit in the memory (TPUs), or the mesh on the torus.
        """
        mesh = compiled.mesh
        tensor = math.gcd(mesh.shape["tensor"], part.count)
        fsdp = math.gcd(mesh.shape["fsdp"], part.count // tensor)
        rows = compiled.rows // batch_ways(mesh) * (part.count // tensor)
        key = part.name, fsdp, tensor, rows
        if key not in self._speeds:
            config = replace(self.config, train=replace(self.config.train, batch_size=rows))
            try:
                small = make_mesh(MeshConfig(-1, fsdp, tensor), topology.devices(part))
                alone = self._compile(small, replace(self.assembly, config=config), part)
            except UserError:
                self._speeds[key] = None
            else:
                seconds = self._times(alone, part).total
                self._speeds[key] = rows * alone.shape.tokens / seconds / part.count
        return self._speeds[key]

    def _mfu(self, compiled: Compiled, times: Times) -> float:
        """As training counts it, for full rows of one conversation each, or of what fits in the blocks of keys."""
        leaves, shape = self.assembly.structure.leaves, compiled.shape
        trained = any(n.startswith("llm.layers.") and not is_lora(n) for n in compiled.program.state.trained)
        pairs = shape.tokens * (shape.tokens + 1) // 2
        flops = step_flops(
            self.assembly.llm, layer_parameters(self.assembly.llm, leaves), trained,
            compiled.rows * shape.tokens, compiled.rows * shape.targets,
            compiled.rows * min(pairs, shape.tokens * shape.key_blocks * BLOCK or pairs),
        )  # fmt: skip
        return flops / times.total / (self.where.hardware.peak * compiled.mesh.size)


def nodes(mesh: Mesh, where: Topology) -> Sequence[int]:
    """The node of each device, in the order of the mesh; a TPU slice is one."""
    if where.hardware.platform == "gpu":
        return [device.process_index for device in mesh.devices.flat]
    return [0] * mesh.size
