"""MERL against the reference's numbers, with weights made by the name-seeded recipe."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity_log import compare, record

from elm_jax.models.encoders import build_encoder
from elm_jax.models.functional import structure_of
from elm_jax.weights.encoders import from_published, load_encoder, to_published

RESNET18, RESNET101 = "encoder_full_resnet18_merl", "encoder_full_merl"
GoldenFolder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def described(folder: Path) -> dict:
    return json.loads((folder / "params.json").read_text())


def recipe_weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of params.json, made from their names and checked against the listed crc32."""
    description, tensors = described(folder), {}
    for entry in description["models"]["any"]["tensors"]:
        name = entry["name"]
        tensors[name] = recipe_tensor(description["salt"] + name, name, tuple(entry["shape"]))
        assert zlib.crc32(tensors[name].tobytes()) == entry["crc32"], f"the recipe made other numbers: {name}"
    return tensors


def recipe_tensor(seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    z = np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return 1 + 0.2 * np.abs(z)
    if name.endswith("bias"):
        return 0.02 * z
    if name.endswith("weight"):
        return 1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    return 0.1 * z


def lengths(name: str) -> list[int]:
    """Of the signals that a golden has embeddings of, the shortest first."""
    return sorted(int(key.removeprefix("ecg_")) for key in goldens.cases(name, "inputs.npz"))


def check_embeddings(folder: Path, length: int, most: int | None = None, encoder: str = "merl") -> None:
    """`most`: how many of the golden's numbers of tokens."""
    weights, config = recipe_weights(folder), described(folder)["models"]["any"]["cfg"]
    signals = np.load(folder / "inputs.npz")[f"ecg_{length}"]
    outputs = np.load(folder / "outputs.npz")
    keys = [key for key in outputs if key.startswith(f"out_{length}_tok")]
    assert keys
    for key in keys[:most]:
        tokens, _, part = key.partition("_tok")[2].partition("_")
        ours = np.asarray(load_encoder(encoder, weights, tokens=int(tokens), **config)(signals))
        ours = ours[..., ::8] if part == "every8thchannel" else ours
        compare(folder.name, key, ours, outputs[key], 1e-5)


@pytest.mark.parametrize("length", lengths(RESNET18))
def test_resnet18_embeddings(golden: GoldenFolder, length: int) -> None:
    check_embeddings(golden(RESNET18), length)


def test_resnet18_for_any_leads_where_all_are_there(golden: GoldenFolder) -> None:
    check_embeddings(golden(RESNET18), lengths(RESNET18)[0], 1, "resnet18_any")


def test_resnet101_embeddings_of_the_shortest_signals(golden: GoldenFolder) -> None:
    check_embeddings(golden(RESNET101), lengths(RESNET101)[0], 1)


@pytest.mark.slow
@pytest.mark.parametrize("length", lengths(RESNET101))
def test_resnet101_embeddings(golden: GoldenFolder, length: int) -> None:
    check_embeddings(golden(RESNET101), length)


@pytest.mark.parametrize("name", [RESNET101, RESNET18])
def test_published_weights_survive_a_round_trip_and_all_are_used(golden: GoldenFolder, name: str) -> None:
    description, weights = described(golden(name))["models"]["any"], recipe_weights(golden(name))
    structure = structure_of(lambda: build_encoder("merl", description["cfg"], 1, nnx.Rngs(0)))
    back = to_published("merl", from_published("merl", structure.leaves, weights))
    assert set(weights) - set(back) == {n for n in weights if n.endswith("num_batches_tracked")}
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)
    trained = sum(np.prod(leaf.shape) for leaf in structure.leaves.values() if not leaf.statistic)
    assert trained == description["num_params"]


@pytest.mark.slow
def test_a_training_step_with_batch_statistics(golden: GoldenFolder) -> None:
    """Embeddings, moved running statistics and gradient norms of resnet101.

    The tolerances are the golden's own: 101 layers of batch statistics over as few as 128 values amplify
    rounding. Changing the input by half a unit in the last place moves our embeddings by 2e-4 of their scale
    and the first gradient norms by 1e-2. Against the golden we measured 1e-4 and 6e-3, and 7e-6 for the
    statistics.
    """
    weights, folder = recipe_weights(golden(RESNET101)), golden("encoder_merl_batchnorm_train")
    config = described(golden(RESNET101))["models"]["any"]["cfg"]
    structure = structure_of(lambda: build_encoder("merl", config, 1, nnx.Rngs(0)))
    arrays = {k: jnp.asarray(v) for k, v in from_published("merl", structure.leaves, weights).items()}
    params = {name: value for name, value in arrays.items() if not structure.leaves[name].statistic}
    signals = np.load(folder / "inputs.npz")["ecg"]

    def loss(params):
        encoder = structure.bind({**arrays, **params})
        embeddings = encoder(signals, train=True)
        return jnp.mean(embeddings**2), (embeddings, structure.arrays(encoder))

    (_, (embeddings, after)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = np.load(folder / "outputs.npz")
    compare(folder.name, "embeddings", embeddings, expected["embeddings"], 1e-3)
    after = to_published("merl", after)
    for key in expected:
        if key.startswith("after_") and not key.endswith("num_batches_tracked"):
            compare(folder.name, key, after[key.removeprefix("after_")], expected[key], 1e-4)
    gradients = to_published("merl", gradients)
    for key, norm in json.loads((folder / "grad_norms.json").read_text()).items():
        record(folder.name, f"norm of the gradient of {key}", abs(np.linalg.norm(gradients[key]) - norm) / norm, 2e-2)
