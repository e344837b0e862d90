"""The mesh and its rules: what lies where, and what the user is told when it does not fit."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
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
    host_parts,
    make_mesh,
    partition_spec,
    to_device,
)

# Of each part of the rows the hosts that hold it, and of each host its parts.
PARTS_OF_TPU = """
import json, sys
import jax
from jax.experimental import topologies
from elm_jax.config import MeshConfig
from elm_jax.runtime import mesh as module

name, sizes = sys.argv[1], json.loads(sys.argv[2])
devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
mesh = module.make_mesh(MeshConfig(*sizes), devices)
owners = [[d.process_index for d in row] for row in mesh.devices.reshape(module.batch_ways(mesh), -1)]
parts = []
for host in sorted({d.process_index for d in devices}):
    jax.process_index = lambda: host
    parts.append(module.host_parts.__wrapped__(mesh))
print(json.dumps([owners, parts]))
"""


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


def parts_of_host(mesh: Any, host: int) -> tuple[int, ...]:
    """`host_parts` as the process number `host` sees it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: host)
        return host_parts.__wrapped__(mesh)


def owned(owners: np.ndarray) -> Any:
    """A mesh whose devices belong to the processes `owners` (data, fsdp, tensor)."""
    devices = np.array([SimpleNamespace(process_index=int(o)) for o in owners.flat]).reshape(owners.shape)
    return SimpleNamespace(devices=devices, shape=dict(zip(AXES, owners.shape, strict=True)))


@given(st.tuples(*[st.sampled_from([1, 2, 4])] * 3), st.sampled_from([1, 2, 4, 8]))
def test_the_hosts_together_hold_every_row_as_their_devices_do(sizes: tuple[int, int, int], per_host: int) -> None:
    total = int(np.prod(sizes))
    per_host = min(per_host, total)
    mesh = owned((np.arange(total) // per_host).reshape(sizes))
    for host in range(total // per_host):
        mine = {device // sizes[2] for device in range(host * per_host, (host + 1) * per_host)}
        assert parts_of_host(mesh, host) == tuple(sorted(mine))


def test_a_hosts_rows_need_not_run_on() -> None:
    """As on a torus, where a host's 2 x 2 chips are neighbours along two axes of the mesh."""
    x, y = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    torus = x // 2 * 2 + y // 2
    mesh = owned(torus[..., None])
    assert [parts_of_host(mesh, host) for host in range(4)] == [
        (0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)
    ]  # fmt: skip
    divided = owned(torus[:, None, :])  # the second axis is `tensor`: two hosts read the same rows
    assert [parts_of_host(divided, host) for host in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name, sizes", [("v5p:4x4x4", (16, 4, 1)), ("v5p:4x8x8", (32, 8, 1)), ("v5e:8x8", (8, 8, 1))])
def test_every_host_of_a_tpu_slice_reads_the_parts_of_its_chips(name: str, sizes: tuple[int, int, int]) -> None:
    pytest.importorskip("libtpu")
    told = subprocess.run(
        [sys.executable, "-c", PARTS_OF_TPU, name, json.dumps(sizes)], text=True, capture_output=True, timeout=300,
        check=True, env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
    )  # fmt: skip
    owners, parts = json.loads(told.stdout.splitlines()[-1])
    for host, mine in enumerate(parts):
        assert mine == [part for part, row in enumerate(owners) if host in row] and mine
    assert any(mine != list(range(mine[0], mine[0] + len(mine))) for mine in parts), "a case without any torus"


def test_local_rows_go_to_the_devices_that_hold_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where devices lie in another order than the rows, and this process holds but some of the parts."""
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    mesh = make_mesh(MeshConfig(2, 4, 1), [jax.devices()[i] for i in order])
    whole = np.arange(2 * 16 * 3).reshape(2, 16, 3)
    placed = to_device(mesh, whole, batch_sharding(mesh), row_axis=1)
    np.testing.assert_array_equal(placed, whole)

    mine = (1, 2, 6)
    monkeypatch.setattr(module, "host_parts", lambda _: mine)
    held: dict[int, np.ndarray] = {}

    def some(shape: tuple[int, ...], sharding: Any, callback: Any) -> None:
        held.update({part: callback(sharding.devices_indices_map(shape)[mesh.devices.flat[part]]) for part in mine})

    monkeypatch.setattr(jax, "make_array_from_callback", some)
    local = np.concatenate([whole[:, 2 * part : 2 * part + 2] for part in mine], axis=1)
    to_device(mesh, local, batch_sharding(mesh), row_axis=1)
    for part in mine:
        np.testing.assert_array_equal(held[part], whole[:, 2 * part : 2 * part + 2])


def test_one_process_holds_all_rows() -> None:
    mesh = mesh_of(2, 2, 2)
    assert host_parts(mesh) == (0, 1, 2, 3) and batch_ways(mesh) == 4
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
