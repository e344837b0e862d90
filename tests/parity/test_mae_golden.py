"""ST-MEM, MTAE and MLAE against the reference's numbers, in float32."""

import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity_log import compare, record

from elm_jax.errors import UserError
from elm_jax.models.encoders import build_encoder, kind_of
from elm_jax.models.encoders.mae import StMem, calculate_patch_size, sincos_positions
from elm_jax.models.functional import Structure, structure_of
from elm_jax.weights.encoders import from_published, load_encoder, read_checkpoint, to_published

TINY = {"encoder_tiny_mtae": "mtae", "encoder_tiny_mlae": "mlae"} | {
    f"encoder_tiny_st_mem{size}": "st_mem" for size in ("", "_1head64")
}
FULL = {f"encoder_full_{name}": name for name in ("mtae", "mlae", "st_mem")}
# Which lengths of signals each golden has.
LENGTHS = [(case, length) for case in FULL for length in goldens.config(case, "params.json").get("models", ())]
OUTPUTS, GRADIENTS = 1e-5, 1e-4  # bounds, of scale
GoldenFolder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def structure(name: str, config: dict[str, Any]) -> Structure:
    return structure_of(lambda: build_encoder(name, config, 1, nnx.Rngs(0)))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors, _ = read_checkpoint(folder / "model.safetensors")
    return {name: np.asarray(tensors[name]) for name in tensors}


# Rules


def test_the_patch_size_is_that_of_the_rule(golden: GoldenFolder) -> None:
    for case in json.loads((golden("encoder_patch_size_rule") / "cases.json").read_text()):
        size = calculate_patch_size(case["segment_len"])
        assert (size, case["segment_len"] // size) == (case["patch_size"], case["num_patches"]), case


def test_positions_are_sines_and_cosines(golden: GoldenFolder) -> None:
    expected = np.load(golden("encoder_sincos_pos_embed") / "outputs.npz")
    for key in expected:
        width, length, special = (int(part.lstrip("dncls")) for part in key.split("_"))
        ours = np.concatenate([np.zeros((special, width), np.float32), sincos_positions(length, width)])
        compare("encoder_sincos_pos_embed", key, ours, expected[key], OUTPUTS)


# Tiny encoders, with their own weights


@pytest.mark.parametrize("case", TINY)
def test_embeddings_and_what_leads_to_them(golden: GoldenFolder, case: str) -> None:
    folder, name = golden(case), TINY[case]
    config = config_of(folder)
    signals, expected = np.load(folder / "inputs.npz")["ecg"], np.load(folder / "outputs.npz")
    encoder = load_encoder(name, folder / "model.safetensors", tokens=config["num_encoder_tokens"], **config)
    ours = {"encoder_embeddings": encoder(signals), **intermediate(encoder.module)(signals)}
    assert set(expected) - {"loss", "loss_weight"} == set(ours)
    for quantity, found in ours.items():
        compare(case, quantity, found, expected[quantity], OUTPUTS)


def intermediate(module: Any) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    """From signals to what the goldens call the encoder's intermediate tensors."""

    @jax.jit
    def run(signals):
        latent = module.encode(signals)
        if isinstance(module, StMem):
            return {"encoder_tokens": latent}
        decoded = module.decode(latent)
        patches = module.head(module.decoder_norm(decoded))[:, 1:]
        return {"encoder_latent": latent, "decoder_latents": decoded, "decoder_out": patches}

    return run


@pytest.mark.parametrize("case", TINY)
def test_gradients(golden: GoldenFolder, case: str) -> None:
    """Of all that the reference trains, which for its ST-MEM includes the positions; ours never moves those."""
    folder, name = golden(case), TINY[case]
    config, expected = config_of(folder), np.load(folder / "outputs.npz")
    form = structure_of(lambda: build_encoder(name, config, config["num_encoder_tokens"], nnx.Rngs(0)))
    arrays = from_published(name, form.leaves, tensors_of(folder))
    signals, cotangent = np.load(folder / "inputs.npz")["ecg"], expected["loss_weight"]

    @jax.jit
    @jax.value_and_grad
    def loss(arrays):
        return jnp.sum(form.bind(arrays)(signals) * cotangent)

    value, gradients = loss(arrays)
    # The loss sums terms of both signs: its error is seen against the sum of their sizes.
    scale = np.abs(expected["loss_weight"] * expected["encoder_embeddings"]).sum()
    record(case, "loss", abs(float(value - expected["loss"])) / scale, OUTPUTS)
    ours = to_published(name, gradients)
    theirs, norms = np.load(folder / "grads.npz"), json.loads((folder / "grad_norms.json").read_text())
    for key in theirs:
        compare(case, f"gradient of {key}", ours[key], theirs[key], GRADIENTS)
    for key, norm in norms.items():
        error = abs(np.linalg.norm(ours[key]) - norm) / (norm or 1.0)
        record(case, f"gradient norm of {key}", error, GRADIENTS)
    unused = [key for key, trained in json.loads((folder / "requires_grad.json").read_text()).items() if trained]
    for key in set(unused) - set(norms):
        assert not ours[key].any(), f"{key} has no gradient in the reference"


@pytest.mark.parametrize("case", TINY)
def test_weights_come_out_as_they_went_in(golden: GoldenFolder, case: str) -> None:
    name, tensors = TINY[case], tensors_of(golden(case))
    back = to_published(name, from_published(name, structure(name, config_of(golden(case))).leaves, tensors))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.parametrize("case", TINY)
def test_every_weight_is_needed_in_its_shape(golden: GoldenFolder, case: str) -> None:
    name, tensors = TINY[case], tensors_of(golden(case))
    leaves = structure(name, config_of(golden(case))).leaves
    for key, tensor in tensors.items():
        with pytest.raises(UserError) as missing:
            from_published(name, leaves, {other: tensors[other] for other in tensors if other != key})
        assert f"found no {key};" in str(missing.value)
        if key in kind_of(name).unused:  # whose shape depends on who has pretrained it
            continue
        with pytest.raises(UserError) as misshapen:
            from_published(name, leaves, {**tensors, key: np.concatenate([tensor, tensor])})
        assert f"found {key} " in str(misshapen.value)


@pytest.mark.parametrize("name", ["mtae", "mlae"])
def test_pretrained_checkpoints_give_their_features(golden: GoldenFolder, name: str) -> None:
    """The features of the pretraining program, the encoder's CLS latent."""
    folder = golden(f"ssl_{name}")
    module = load_encoder(name, folder / "model.safetensors", **config_of(folder)).module
    ours = intermediate(module)(np.load(folder / "inputs.npz")["ecg"])["encoder_latent"][:, 0]
    theirs = np.load(folder / "outputs.npz")["features_eval"]
    compare(f"ssl_{name}", "features_eval", ours, theirs, OUTPUTS)


def test_a_pretrained_st_mem_is_read_without_its_decoder(golden: GoldenFolder) -> None:
    tensors, config = tensors_of(golden("ssl_st_mem")), config_of(golden("ssl_st_mem"))
    back = to_published("st_mem", from_published("st_mem", structure("st_mem", config).leaves, tensors))
    assert set(back) == {key for key in tensors if key.startswith("encoder.")}
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)


# Full-size encoders, with weights made from their names


@cache
def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "params.json").read_text())


def recipe_weights(folder: Path, length: str) -> dict[str, np.ndarray]:
    """The tensors of params.json, made from their names and checked against the listed crc32."""
    description, tensors = described(folder), {}
    for entry in description["models"][length]["tensors"]:
        name, shape = entry["name"], tuple(entry["shape"])
        seed = zlib.crc32((description["salt"] + name).encode())
        z = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        if name.endswith("bias"):
            tensors[name] = 0.02 * z
        elif name.endswith("weight"):
            tensors[name] = 1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:])).astype(np.float32)
        else:
            tensors[name] = 0.1 * z
        assert zlib.crc32(tensors[name].tobytes()) == entry["crc32"], f"the recipe made other numbers: {name}"
    return tensors


@pytest.mark.parametrize(("case", "length"), LENGTHS)
def test_names_and_shapes_are_those_of_the_published_encoders(golden: GoldenFolder, case: str, length: str) -> None:
    name, model = FULL[case], described(golden(case))["models"][length]
    leaves = structure(name, model["cfg"]).leaves
    nothing = np.float32(0)  # arrays of the right shapes that take no memory
    ours = to_published(name, {key: np.broadcast_to(nothing, leaf.shape) for key, leaf in leaves.items()})
    expected = {entry["name"]: tuple(entry["shape"]) for entry in model["tensors"]}
    assert sum(np.prod(leaf.shape) for leaf in leaves.values()) == model["num_params"]
    expected |= {second: expected[first] for second, first in model["state_dict_aliases"].items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize(("case", "length"), LENGTHS)
def test_full_size_embeddings(golden: GoldenFolder, case: str, length: str) -> None:
    folder, name = golden(case), FULL[case]
    weights, config = recipe_weights(folder, length), described(folder)["models"][length]["cfg"]
    signals, expected = np.load(folder / "inputs.npz")[f"ecg_{length}"], np.load(folder / "outputs.npz")
    keys = [key for key in expected if key.startswith(f"out_{length}_tok")]
    assert keys
    for key in keys:
        tokens, _, part = key.partition("_tok")[2].partition("_")
        ours = load_encoder(name, weights, tokens=int(tokens), **config)(signals)
        ours = ours[..., ::8] if part == "every8thchannel" else ours
        compare(case, key, ours, expected[key], OUTPUTS)
