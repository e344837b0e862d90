"""The device mesh, and the one table that says which logical axis lies on which mesh axis.

Mesh axes: `data` (replicas), `fsdp` (replicas that share the parameters), `tensor` (one layer split).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elm_jax.config import MeshConfig
from elm_jax.errors import UserError
from elm_jax.models.functional import Structure

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

REST = "rest"  # the mesh axis that no other dimension of the array takes

# Logical axis -> mesh axis. Parameters name their trailing dimensions, activations theirs.
RULES: dict[str, str | tuple[str, ...]] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "signal": REST,
    "conv_out": "fsdp",
    "batch": BATCH_AXES,
}
SMALL = 2**14  # parameters below this many elements may be replicated where they do not divide


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices. One of the sizes may be -1: what is left.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or do not fit the torus of a TPU.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    asked = f"data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}"
    known = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError("mesh", asked, "positive sizes, at most one of them -1", "set --config.mesh.*")
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices) or -1 in sizes:
        raise UserError(
            "mesh",
            asked,
            f"sizes whose product is the number of devices, {len(devices)}",
            "set --config.mesh.*; -1 in one of them is what is left, on any number of devices",
        )
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:
        torus = "x".join(str(1 + max(place)) for place in zip(*(device.coords for device in devices), strict=True))
        raise UserError(
            "mesh", f"{asked} on a torus of {torus}", f"each a product of some of {torus}",
            "set --config.mesh.* to these sizes or products of them",
        ) from error  # fmt: skip


def check_heads(mesh: Mesh, llm: Any) -> None:
    """Raise UserError unless the heads of the decoder with the config `llm` divide over `tensor`."""
    ways = mesh.shape["tensor"]
    for what, count in (("heads", llm.heads), ("key/value heads", llm.kv_heads)):
        if count % ways:
            fits = [n for n in divisors(ways) if llm.heads % n == 0 and llm.kv_heads % n == 0]
            raise UserError(
                "mesh.tensor", f"{ways} for {count} {what}", f"a size that divides {llm.heads} and {llm.kv_heads}",
                f"set --config.mesh.tensor={max(fits)}, and mesh.fsdp for the rest",
            )  # fmt: skip


def partition_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str) -> PartitionSpec:
    """The layout of an array whose trailing dimensions have these logical axes.

    Raises:
        UserError: a dimension of a large array does not divide over its mesh axis.
    """
    logical = (None,) * (len(shape) - len(axes)) + tuple(axes)
    targets = [RULES[axis] if axis else None for axis in logical]
    rest = next((axis for axis in ("fsdp", "tensor") if axis not in targets), None)
    targets = [rest if target == REST else target for target in targets]
    spec: list[str | tuple[str, ...] | None] = []
    for size, target in zip(shape, targets, strict=True):
        ways = _ways(mesh, target)
        if ways > 1 and size % ways:
            if math.prod(shape) >= SMALL:
                raise UserError(
                    f"mesh.{target}",
                    f"{ways} for {name} of shape {tuple(shape)}",
                    f"a size that divides {size}",
                    f"set --config.mesh.{target}={max(n for n in divisors(ways) if size % n == 0)}, and another axis"
                    " for the rest",
                )
            target = None
        spec.append(target if ways > 1 else None)
    taken = [target for target in spec if target]
    assert len(taken) == len(set(taken)), f"{name}: two dimensions on one mesh axis: {spec}"
    return PartitionSpec(*spec)


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str = ""
) -> NamedSharding:
    """`partition_spec` on this mesh."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, name))


def array_shardings(structure: Structure, mesh: Mesh) -> dict[str, NamedSharding]:
    """The layout of every array of the model."""
    return {n: named_sharding(mesh, leaf.axes, leaf.shape, n) for n, leaf in structure.leaves.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, micro_batches: bool = True) -> NamedSharding:
    """Rows over `data` and `fsdp`; a leading micro-batch axis is not divided."""
    return NamedSharding(
        mesh, PartitionSpec(None, BATCH_AXES) if micro_batches else PartitionSpec(BATCH_AXES)
    )


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return _ways(mesh, BATCH_AXES)


@functools.cache
def host_parts(mesh: Mesh) -> tuple[int, ...]:
    """Which of the `batch_ways` equal parts of a batch's rows this process's devices hold, in rising order.

    They need not follow each other: on the torus of a TPU the chips of a host are neighbours in several directions.
    Processes whose devices differ in `tensor` only hold, and read, the same parts.
    """
    devices = mesh.devices.reshape(batch_ways(mesh), -1)
    return tuple(way for way, row in enumerate(devices) if any(d.process_index == jax.process_index() for d in row))


def to_device(mesh: Mesh, local: np.ndarray, sharding: NamedSharding, row_axis: int) -> jax.Array:
    """A global array of which this process holds `local`: its parts of the rows, one after another (`host_parts`)."""
    parts = host_parts(mesh)
    size = local.shape[row_axis] // len(parts)
    shape = list(local.shape)
    shape[row_axis] = size * batch_ways(mesh)

    def held(index: Any) -> np.ndarray:  # slices, one for each axis
        first = size * parts.index((index[row_axis].start or 0) // size)
        return local[(slice(None),) * row_axis + (slice(first, first + size),)]

    # With several processes this is no explicit transfer to JAX's guard, though it is meant.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(tuple(shape), sharding, held)


def whole_to_device(whole: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array of which every process holds the whole: each device takes its part.

    `jax.device_put` would send the array around among the processes, to see that they hold the same.
    """
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


@dataclass(frozen=True)
class MeshPlacement:
    """Where the models' axes lie on `mesh`: the runtime's side of `elm_jax.models.hints`."""

    mesh: Mesh

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def ways(self, axis: str) -> int:
        return _ways(self.mesh, RULES[axis])

    def activation(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = []
        for size, axis in zip(x.shape, axes, strict=True):
            target = RULES[axis] if axis else None
            spec.append(target if target and size % _ways(self.mesh, target) == 0 else None)
        return self._constrain(x, PartitionSpec(*spec))

    def weight(self, w: jax.Array, axes: tuple[str | None, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        """Cast in its shards, then gathered over `fsdp`: what travels is `dtype`, not the float32 master.

        The gradient is brought back to the shards before it becomes float32, so that it can be
        reduce-scattered within the fsdp group instead of all-reduced whole.
        """
        at_rest = partition_spec(self.mesh, axes, w.shape, "a weight")
        in_use = PartitionSpec(*(None if axis == "fsdp" else axis for axis in at_rest))
        original = w.dtype

        def gather(w: jax.Array) -> jax.Array:
            return self._constrain(self._constrain(w.astype(dtype), at_rest), in_use)

        def reduce(cotangent: jax.Array) -> jax.Array:
            return self._constrain(cotangent, at_rest).astype(original)

        return _apply(gather, reduce, w)

    def copies(self, w: jax.Array, axes: tuple[str | None, ...], rows: int) -> jax.Array:
        """One copy of `w` for each part of the batch: a device has its own. One for all where the rows do not divide.

        The gradients of the copies are reduce-scattered within the fsdp group, and their shards summed over `data`.
        """
        data, fsdp = self.mesh.shape["data"], self.mesh.shape["fsdp"]
        if rows % (data * fsdp):
            return w[None]
        at_rest = partition_spec(self.mesh, axes, w.shape, "a weight")
        in_use = tuple(None if axis == "fsdp" else axis for axis in at_rest)

        def spread(w: jax.Array) -> jax.Array:
            each = jnp.broadcast_to(w, (data * fsdp, *w.shape))
            return self._constrain(each, PartitionSpec(BATCH_AXES, *in_use))

        def reduce(cotangent: jax.Array) -> jax.Array:
            parts = self._constrain(cotangent.reshape(data, fsdp, *w.shape), PartitionSpec("data", "fsdp", *in_use))
            shards = self._constrain(_sum(parts, 1), PartitionSpec("data", *at_rest))
            return self._constrain(_sum(shards, 0), at_rest)

        return _apply(spread, reduce, w)

    def _constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _apply(
    forward: Callable[[jax.Array], jax.Array], backward: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    """`forward` of `x`; the gradient of `x` is `backward` of that of the result."""
    function = jax.custom_vjp(forward)
    function.defvjp(lambda x: (function(x), None), lambda _, cotangent: (backward(cotangent),))
    return function(x)


def _sum(x: jax.Array, axis: int) -> jax.Array:
    """In its own dtype: `jnp.sum` of bfloat16 would send float32."""
    return jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (axis,))


def divisors(count: int) -> list[int]:
    """From 1 to `count`: the sizes that an axis of so many devices can have, and leave the rest to another."""
    return [n for n in range(1, count + 1) if count % n == 0]


def _ways(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[n] for n in names)
