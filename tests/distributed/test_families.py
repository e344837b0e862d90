"""Every family on every mesh: the loss of one device and its gradients; where a mesh does not fit, advice."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from support import LEADS, SAMPLES, SIGNAL_LAYOUT, SIGNAL_TOKENS, RandomConversations, stack_micro_batches
from tiny_llms import TINY, VOCABULARY, WINDOW

from elm_jax.config import MeshConfig, resolve
from elm_jax.data.batch import Batch, BatchShape, Group, collate
from elm_jax.errors import UserError
from elm_jax.models.connectors import build_signal_connector
from elm_jax.models.decoder import Decoder, DecoderConfig
from elm_jax.models.elm import ELM
from elm_jax.models.families import scratch_config
from elm_jax.models.family_table import FAMILIES
from elm_jax.models.functional import Arrays, Structure, structure_of
from elm_jax.models.hints import placed
from elm_jax.runtime.mesh import MeshPlacement, array_shardings, batch_sharding, check_heads, make_mesh
from elm_jax.training.program import check_rows
from elm_jax.training.step import loss_and_gradients

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (2, 2, 2)]
# Rules are of axes, not of pairs of them: one family is on every mesh, of the others each axis is divided.
WHOLE, AXES = "qwen2", [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
HIDDEN, HEADS, KV_HEADS, ROWS = 32, 8, 4, 8
# Where all layers have a window, two of them must reach back to the ECG.
OTHERWISE = {"kv_heads": KV_HEADS, "head_dim": 8, "partial_rotary_factor": 1.0, "window": 2 * WINDOW}
GRADIENTS = 1e-5  # of an array's largest
WIDER = {"qwen3_5_text": 10}  # through a recurrence, and keys and queries that are brought to length 1

Sizes = tuple[int, int, int]


@functools.cache
def llm_config(family: str) -> DecoderConfig:
    """Every width divides by 8; heads are grouped where the family may group them."""
    sizes = {
        "family": family, **TINY[family], "hidden": HIDDEN, "heads": HEADS, "layers": 2, "mlp": 2 * HIDDEN,
        **{name: value for name, value in OTHERWISE.items() if name in TINY[family]},
    }  # fmt: skip
    return scratch_config(sizes, VOCABULARY)


@functools.cache
def structure(family: str) -> Structure:
    def build() -> ELM:
        rngs = nnx.Rngs(0)
        llm = Decoder(llm_config(family), rngs, remat="dots")
        connector = build_signal_connector("patch", LEADS, SAMPLES, SIGNAL_TOKENS, llm.config.embedding, rngs=rngs)
        return ELM(None, connector, llm, jnp.dtype(jnp.float32))

    return structure_of(build)


@functools.cache
def initial(family: str) -> dict[str, np.ndarray]:
    """Norms and biases are random too, so that each bears on the loss."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, leaf in structure(family).leaves.items():
        scale = 0.3 if "table" in name else leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.1
        drawn = scale * rng.standard_normal(leaf.shape)
        arrays[name] = (drawn + name.endswith(".scale")).astype(np.float32)
    return arrays


@functools.cache
def batch() -> Batch:
    """Two micro-batches of shared, plain and empty rows, some longer than a window."""
    talk = RandomConversations(1)
    rows = []
    for r in range(2 * ROWS - 1):
        recording = talk.recording()
        asked = [talk.ask(recording, 2 * WINDOW + n, 1 + n % 2) for n in range(1 + r % 3)]
        rows.append([Group(5 + SIGNAL_TOKENS, asked)])
    rows.append([])
    parts = [rows[:ROWS], rows[ROWS:]]
    return stack_micro_batches([collate(part, BatchShape(64, 2, 8), SIGNAL_LAYOUT) for part in parts])


def evaluated(family: str, mesh: Mesh) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and its gradients, computed as the train step does on this mesh."""
    shape = structure(family)
    shardings = array_shardings(shape, mesh)
    arrays = {name: jax.device_put(x, shardings[name]) for name, x in initial(family).items()}

    def run(arrays: Arrays, batch: Batch) -> tuple[jax.Array, Arrays]:
        with placed(MeshPlacement(mesh)):
            loss, gradients, *_ = loss_and_gradients(shape, arrays, {}, {}, batch)
        return loss, gradients

    rows = jax.device_put(batch(), batch_sharding(mesh))
    loss, gradients = jax.jit(run, out_shardings=(None, shardings))(arrays, rows)
    return float(loss), jax.device_get(gradients)


@functools.cache
def alone(family: str) -> tuple[float, dict[str, np.ndarray]]:
    return evaluated(family, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


def fits(family: str, sizes: Sizes) -> bool:
    return llm_config(family).kv_heads % sizes[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"), [(f, sizes) for f in TINY for sizes in (MESHES if f == WHOLE else AXES)], ids=str
)
def test_every_family_has_the_gradients_of_one_device(family: str, sizes: Sizes) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    if not fits(family, sizes):
        with pytest.raises(UserError, match=r"mesh.tensor: found 8 for 4 key/value heads; .*--config.mesh.tensor=4"):
            check_heads(mesh, llm_config(family))
        return
    check_heads(mesh, llm_config(family))
    expected, theirs = alone(family)
    found, ours = evaluated(family, mesh)
    assert found == pytest.approx(expected, rel=1e-6)
    largest = max(float(np.abs(x).max()) for x in theirs.values())
    errors = {}
    for name, gradient in theirs.items():
        # Where positions are learned, the softmax does not change when all keys move: nothing but rounding is left.
        is_zero = name.endswith("attention.k.bias") and llm_config(family).rope is None
        scale = largest if is_zero else float(np.abs(gradient).max())
        assert scale > 0, f"{name} has no gradient, so nothing was compared"
        errors[name] = float(np.abs(ours[name] - gradient).max()) / scale
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < GRADIENTS * WIDER.get(family, 1), f"{worst}: {errors[worst]:.2g} of scale"


def test_every_family_is_there() -> None:
    assert {llm_config(name).model_type for name in TINY} == set(FAMILIES)
    assert any(fits(family, (1, 1, 8)) for family in TINY) and not fits("llama", (1, 1, 8))


# -- what does not fit ----------------------------------------------------------------------------------------------


def mesh_of(*sizes: int) -> Mesh:
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ways", "fix"), [(14, 2, 4, 2), (12, 2, 8, 2), (9, 3, 2, 1), (12, 12, 8, 4)]
)
def test_heads_that_do_not_divide(heads: int, kv_heads: int, ways: int, fix: int) -> None:
    """Qwen2.5-0.5B, 1.5B and GPT-2 among them. The advice divides the devices, too."""
    sizes = {"hidden": 8 * heads, "layers": 1, "heads": heads, "kv_heads": kv_heads, "mlp": 64}
    advice = rf"expected a size that divides {heads} and {kv_heads}; set --config.mesh.tensor={fix}, and mesh.fsdp"
    with pytest.raises(UserError, match=advice):
        check_heads(mesh_of(1, 1, ways), scratch_config(sizes, VOCABULARY))


def test_rows_that_do_not_divide() -> None:
    config = resolve({"train": {"batch_size": 12}, "optim": {"accum_steps": 2}})
    found = "found 6 rows a micro-batch; expected a multiple of data x fsdp = 4"
    advice = f"{found}; .*batch_size=8 or 16, .*data x fsdp = 3,"
    with pytest.raises(UserError, match=advice):
        check_rows(config, mesh_of(2, 2, 1))
    check_rows(resolve({"train": {"batch_size": 16}, "optim": {"accum_steps": 2}}), mesh_of(2, 2, 1))


@pytest.mark.parametrize(
    ("sizes", "changed", "advice"),
    [
        ((1, 8, 1), {"hidden": 164, "head_dim": 8, "mlp": 256}, r"mesh.fsdp: found 8 for .*164.*--config.mesh.fsdp=4"),
        ((1, 1, 8), {"mlp": 1004}, r"mesh.tensor: found 8 for llm.layers.mlp.\w+.kernel .*--config.mesh.tensor=4"),
        ((1, 1, 4), {"mlp": 1009}, r"mesh.tensor: found 4 .*--config.mesh.tensor=1"),
        ((1, 1, 8), {"mlp": 1020}, r"mesh.tensor: found 8 .*--config.mesh.tensor=4"),  # 6 does not divide 8 devices
    ],
)
def test_widths_that_do_not_divide(sizes: Sizes, changed: dict[str, Any], advice: str) -> None:
    llm = scratch_config({"hidden": 64, "layers": 1, "heads": 8, "mlp": 64, **changed}, VOCABULARY)
    shape = structure_of(lambda: Decoder(llm, nnx.Rngs(0)))
    named = Structure(shape.graphdef, shape.treedef, {f"llm.{name}": leaf for name, leaf in shape.leaves.items()})
    with pytest.raises(UserError, match=advice):
        array_shardings(named, mesh_of(*sizes))
