"""A topology's name -> devices to compile for, whether they are there or not."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from elm_jax.errors import UserError
from elm_jax.planning.hardware import HARDWARE, Hardware

FORMS = "h100:NODESxGPUS (h100:16x8), v5p:XxYxZ (v5p:4x4x4), v5e:XxY (v5e:4x4) or cpu:DEVICES (cpu:8)"
WHERE = "--topology"
DESCRIPTIONS = {"h100": "h100_sxm.txtpb", "h200": "h100_sxm.txtpb"}  # the same chip with other memory


@dataclass(frozen=True)
class Topology:
    """`name` as it was given; `sizes` of its dimensions, the last ones within a node where there are nodes."""

    name: str
    hardware: Hardware
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    def one_node(self) -> Topology:
        """One of its nodes: what has no network in it. Of a TPU, the chips of a host."""
        if self.hardware.platform == "tpu":
            return self._part(min(size, 1 if n == 2 else 2) for n, size in enumerate(self.sizes))
        return self._part((1, self.sizes[1]) if self.hardware.platform == "gpu" else self.sizes)

    def parts(self) -> Iterator[Topology]:
        """Smaller ones, from one node on, each twice the one before: the shortest dimension grows, as TPU slices do."""
        sizes = list(self.one_node().sizes)
        while tuple(sizes) != self.sizes:
            yield self._part(sizes)
            short = [n for n, size in enumerate(sizes) if size < self.sizes[n]]
            grown = min(reversed(short), key=lambda n: sizes[n])
            sizes[grown] = min(2 * sizes[grown], self.sizes[grown])

    def _part(self, sizes: Iterable[int]) -> Topology:
        chosen = tuple(sizes)
        return Topology(f"{self.kind}:{'x'.join(map(str, chosen))}", self.hardware, chosen)


def parse(text: str) -> Topology:
    """The topology called `text`.

    Raises:
        UserError: it has none of the FORMS.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    hardware = HARDWARE.get(match[1]) if match else None
    if match is None or hardware is None:
        raise UserError(WHERE, f"'{text}'", FORMS, "write one of these")
    sizes = tuple(int(size) for size in match[2].split("x"))
    if len(sizes) != hardware.dimensions or not all(sizes):
        raise UserError(WHERE, f"'{text}'", FORMS, f"give {hardware.dimensions} sizes for {match[1]}")
    if hardware.platform == "gpu" and sizes[1] > hardware.node:
        raise UserError(WHERE, f"'{text}'", f"at most {hardware.node} GPUs a node", "write NODESxGPUS")
    return Topology(text, hardware, sizes)


def prepare(topology: Topology) -> None:
    """Set the process up to compile for this topology. Call before jax is used.

    Raises:
        UserError: what compiles for it is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # what is compiled for is described, never opened
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody to ask: this is no TPU machine
    platform = topology.hardware.platform
    if platform == "gpu":
        _require(topology, "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13", package="jax[cuda12]")
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there need be no GPU
    elif platform == "tpu":
        _require(topology, "libtpu", package="jax[tpu]")
    else:
        import jax

        with suppress(RuntimeError):  # jax is in use already: it has the devices that it has
            jax.config.update("jax_num_cpu_devices", topology.count)


def devices(topology: Topology) -> Sequence[Any]:
    """The devices of a topology for which the process is prepared.

    Raises:
        UserError: the platform does not know this topology.
    """
    import jax
    from jax.experimental import topologies

    platform = topology.hardware.platform
    if platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.count:
            has = f"{topology.name} with {len(found)} CPU devices in this process"
            raise UserError(WHERE, has, "as many", "unset XLA_FLAGS, or start a new process")
        return found[: topology.count]
    try:
        if platform == "tpu":
            name = f"{topology.kind}:{'x'.join(map(str, topology.sizes))}"
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        text = resources.files("elm_jax.planning").joinpath(DESCRIPTIONS[topology.kind]).read_text("utf-8")
        nodes, gpus = topology.sizes
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=text, topology=f"1x{nodes}x{gpus}"
        ).devices
    except (RuntimeError, ValueError) as error:
        found = f"'{topology.name}', which {platform} does not know ({str(error).splitlines()[0][:150]})"
        raise UserError(WHERE, found, FORMS, "give sizes that this hardware is built in") from error


def _require(topology: Topology, *modules: str, package: str) -> None:
    if any(_installed(module) for module in modules):
        return
    from importlib.metadata import version

    raise UserError(
        WHERE, f"{topology.name}, but {package} is not installed", "what compiles for it (no device is needed)",
        f"install it, best in an environment of its own: pip install '{package}=={version('jax')}'",
    )  # fmt: skip


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it lies in
        return False
