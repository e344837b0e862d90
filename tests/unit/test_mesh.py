"""The mesh and its rules: what lies where, and what the user is told when it does not fit."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from elm_jax.config import MeshConfig
from elm_jax.errors import UserError
from elm_jax.runtime import mesh as module
from elm_jax.runtime.mesh import (
    AXES,
    RULES,
    SMALL,
    MeshPlacement,
    batch_sharding,
    batch_ways,
    host_part,
    make_mesh,
    partition_spec,
    to_device,
)


@functools.cache
def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def test_minus_one_is_what_the_others_leave() -> None:
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(1, -1, 4)).shape) == {"data": 1, "fsdp": 2, "tensor": 4}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (8, 2, 1), (0, 1, 8)])
def test_sizes_that_do_not_fit_the_devices(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="mesh"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "heads"), (128, 256), PartitionSpec("fsdp", "tensor")),
        (("heads", "embed"), (256, 128), PartitionSpec("tensor", "fsdp")),
        (("vocab", "embed"), (512, 128), PartitionSpec("tensor", "fsdp")),
        (("embed", "mlp"), (3, 128, 256), PartitionSpec(None, "fsdp", "tensor")),  # stacked layers
        (("signal", "mlp"), (128, 256), PartitionSpec("fsdp", "tensor")),
        (("signal", "embed"), (128, 256), PartitionSpec("tensor", "fsdp")),
        ((None, None, "conv_out"), (3, 64, 128), PartitionSpec(None, None, "fsdp")),
        ((None,), (128,), PartitionSpec(None)),
        (("mlp",), (255,), PartitionSpec(None)),  # small and indivisible: whole on each device
    ],
)
def test_rules(axes: tuple[str | None, ...], shape: tuple[int, ...], expected: PartitionSpec) -> None:
    assert partition_spec(mesh_of(2, 2, 2), axes, shape, "x") == expected


def test_a_large_array_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match=r"mesh.tensor: found 2 for llm.head.kernel of shape .*, 32001\)"):
        partition_spec(mesh_of(2, 2, 2), ("embed", "vocab"), (SMALL, 32001), "llm.head.kernel")


def test_two_dimensions_on_one_axis_are_our_fault() -> None:
    with pytest.raises(AssertionError, match="llm.x"):
        partition_spec(mesh_of(1, 8, 1), ("embed", "embed"), (128, 128), "llm.x")


def test_every_axis_of_the_rules_exists() -> None:
    for target in RULES.values():
        assert target == module.REST or set((target,) if isinstance(target, str) else target) <= set(AXES)


# -- hosts ----------------------------------------------------------------------------------------------------


def rows_of_host(sizes: tuple[int, int, int], host: int, per_host: int) -> tuple[int, int]:
    """`host_part` where devices belong to hosts in runs of `per_host`."""
    owners = np.arange(np.prod(sizes)) // per_host
    devices = np.array([SimpleNamespace(process_index=int(o)) for o in owners]).reshape(sizes)
    stand_in: Any = SimpleNamespace(devices=devices, shape=dict(zip(AXES, sizes, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: host)
        return host_part.__wrapped__(stand_in)


@given(st.tuples(*[st.sampled_from([1, 2, 4])] * 3), st.sampled_from([1, 2, 4, 8]))
def test_the_hosts_together_hold_every_row_as_their_devices_do(sizes: tuple[int, int, int], per_host: int) -> None:
    total = int(np.prod(sizes))
    per_host = min(per_host, total)
    ways = sizes[0] * sizes[1]
    for host in range(total // per_host):
        part, parts = rows_of_host(sizes, host, per_host)
        mine = {device // sizes[2] for device in range(host * per_host, (host + 1) * per_host)}
        assert set(range(part * ways // parts, (part + 1) * ways // parts)) == mine


def test_rows_that_do_not_run_on_are_the_users_error() -> None:
    with pytest.raises(UserError, match="mesh"):
        rows_of_host((1, 3, 2), host=0, per_host=3)


def test_one_process_holds_all_rows() -> None:
    mesh = mesh_of(2, 2, 2)
    assert host_part(mesh) == (0, 1) and batch_ways(mesh) == 4
    local = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    placed = to_device(mesh, local, batch_sharding(mesh), row_axis=1)
    np.testing.assert_array_equal(placed, local)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}


# -- what the models ask for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_a_weight_is_itself_and_so_is_its_gradient(sizes: tuple[int, int, int]) -> None:
    mesh = mesh_of(*sizes)
    w = jax.random.normal(jax.random.key(0), (16, 32))
    x = jax.random.normal(jax.random.key(1), (8, 16))

    def loss(w: jax.Array) -> jax.Array:
        used = MeshPlacement(mesh).weight(w, ("embed", "mlp"), jnp.float32)
        return jnp.sin(x @ used).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(w)
    expected, theirs = jax.value_and_grad(lambda w: jnp.sin(x @ w).sum())(w)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("rows", [8, 3])
def test_copies_of_a_weight_are_itself_and_their_gradients_add_up(sizes: tuple[int, int, int], rows: int) -> None:
    placement = MeshPlacement(mesh_of(*sizes))
    w = jax.random.normal(jax.random.key(0), (16, 32))
    x = jax.random.normal(jax.random.key(1), (rows, 16))

    def loss(w: jax.Array) -> jax.Array:
        each = placement.copies(placement.weight(w, ("embed", "vocab"), jnp.float32), ("embed", "vocab"), rows)
        return jnp.sin(x.reshape(len(each), -1, 16) @ each).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(w)
    expected, theirs = jax.value_and_grad(lambda w: jnp.sin(x @ w).sum())(w)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=1e-5)
    whole = placement.copies(w, ("embed", "vocab"), rows)
    assert len(whole) == (sizes[0] * sizes[1] if rows == 8 else 1)


def test_a_weight_is_cast_and_its_gradient_is_float32() -> None:
    placement = MeshPlacement(mesh_of(1, 8, 1))
    w = jnp.full((16, 32), 1.001)
    used, back = jax.vjp(lambda w: placement.weight(w, ("embed", "mlp"), jnp.bfloat16), w)
    assert used.dtype == jnp.bfloat16
    assert back(jnp.ones_like(used))[0].dtype == jnp.float32


def test_activations_that_do_not_divide_stay_whole() -> None:
    placement = MeshPlacement(mesh_of(2, 2, 2))
    x = jnp.ones((4, 6, 3, 8))
    placed = jax.jit(lambda x: placement.activation(x, ("batch", None, "kv_heads", None)))(x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 6, 3, 8)}
