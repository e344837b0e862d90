"""The vision encoders against the reference's numbers.

Not compared, because nothing here computes it: the text towers and the logits and losses that need them (clip,
siglip2).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from parity_log import compare

from elm_jax.models.encoders import build_encoder
from elm_jax.models.functional import structure_of
from elm_jax.weights.encoders import LoadedEncoder, from_published, load_encoder, to_published
from elm_jax.weights.safetensors import Safetensors, save_safetensors

BOUND = 1e-5
CLIP = ("vision_clip_eos2", "vision_clip_eos_argfind")
PROCESSOR_NAMES = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
GoldenFolder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def arrays(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and outputs."""
    return dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "outputs.npz"))


def shortened(name: str, folder: Path, layers: int) -> LoadedEncoder:
    """The golden's encoder with its first `layers` layers only."""
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "num_hidden_layers": layers}
    later = [f".{part}.{layer}." for part in ("layers", "layer") for layer in range(layers, 100)]
    tensors = dict(Safetensors(folder / "model.safetensors"))
    kept = {n: t for n, t in tensors.items() if n.startswith("text_model.") or not any(part in n for part in later)}
    return load_encoder(name, kept, **config)


@pytest.mark.parametrize("name", CLIP)
def test_clip_embeddings_and_hidden_states(golden: GoldenFolder, name: str) -> None:
    inputs, outputs = arrays(golden(name))
    encoder = load_encoder("clip", golden(name))
    embeddings = encoder(inputs["pixel_values"])
    compare(name, "image_embeds", embeddings[:, 0], outputs["image_embeds"], BOUND)
    images = inputs["pixel_values"].transpose(0, 2, 3, 1)
    module = encoder.module
    compare(name, "hidden state 0", module.embed(images), outputs["vision_hidden_states"][0], BOUND)
    for layers in range(1, len(outputs["vision_hidden_states"])):
        part = shortened("clip", golden(name), layers).module
        hidden = part.transformer(part.embed(images))
        compare(name, f"hidden state {layers}", hidden, outputs["vision_hidden_states"][layers], BOUND)
    compare(name, "last hidden state", hidden, outputs["vision_last_hidden"], BOUND)
    compare(name, "pooled", module.post_norm(hidden)[:, 0], outputs["vision_pooled"], BOUND)


def test_vit_embeddings_with_and_without_the_reference_s_mask(golden: GoldenFolder) -> None:
    name = "vision_vit_mim"
    inputs, outputs = arrays(golden(name))
    encoder = load_encoder("vit", golden(name))
    unmasked = encoder(inputs["pixel_values"])[:, 0]
    compare(name, "embedding, no mask", unmasked, outputs["elm_embedding_unmasked"], BOUND)
    compare(name, "embedding, mask given", encoder(inputs)[:, 0], outputs["elm_embedding"], BOUND)
    images, mask = inputs["pixel_values"].transpose(0, 2, 3, 1), inputs["bool_masked_pos"]
    compare(name, "hidden state 0", encoder.module.embed(images, mask), outputs["hidden_states"][0], BOUND)
    for layers in range(1, len(outputs["hidden_states"])):
        part = shortened("vit", golden(name), layers).module
        hidden = part.transformer(part.embed(images, mask))
        compare(name, f"hidden state {layers}", hidden, outputs["hidden_states"][layers], BOUND)


def test_mlp_mixer(golden: GoldenFolder) -> None:
    name = "ssl_mlp_mixer"
    inputs, outputs = (dict(np.load(golden(name) / f"{file}.npz")) for file in ("inputs", "outputs"))
    config = json.loads((golden(name) / "config.json").read_text())
    sizes = {n: x for n, x in config.items() if n not in ("in_channels", "num_classes", "dropout")}
    tensors = dict(Safetensors(golden(name) / "model.safetensors"))
    structure = structure_of(lambda: build_encoder("mlp_mixer", sizes, 1, nnx.Rngs(0)))
    weights = jax.device_put(from_published("mlp_mixer", structure.leaves, tensors))
    images, labels = jax.numpy.asarray(inputs["images"]).transpose(0, 2, 3, 1), inputs["labels"]

    def logits(weights: dict[str, jax.Array]) -> jax.Array:
        mean = structure.bind(weights)(images)[:, 0]
        return mean @ tensors["classifier.weight"].T + tensors["classifier.bias"]

    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        return -jax.nn.log_softmax(logits(weights))[np.arange(len(labels)), labels].mean()

    compare(name, "tokens", structure.bind(weights).mixed(images), outputs["embedding_tokens"], BOUND)
    compare(name, "logits", logits(weights), outputs["logits"], BOUND)
    value, gradients = jax.value_and_grad(loss)(weights)
    compare(name, "loss", value, outputs["loss"], BOUND)
    norms = json.loads((golden(name) / "grad_norms.json").read_text())
    for tensor, gradient in to_published("mlp_mixer", gradients).items():
        np.testing.assert_allclose(np.linalg.norm(gradient), norms[tensor], rtol=1e-3, atol=1e-6, err_msg=tensor)


def test_siglip2_naflex_embeddings_and_hidden_states(golden: GoldenFolder) -> None:
    name = "vision_siglip2_naflex"
    inputs, outputs = arrays(golden(name))
    encoder = load_encoder("siglip2", golden(name))
    embeddings = encoder({key: inputs[key] for key in PROCESSOR_NAMES})
    compare(name, "image_embeds", embeddings[:, 0], outputs["image_embeds"], BOUND)
    patches, mask, shape = (inputs[key] for key in PROCESSOR_NAMES)
    module, valid = encoder.module, mask.astype(bool)
    embedded = module.embed(patches, shape)
    compare(name, "patches with positions", embedded, outputs["vision_embeddings"], BOUND)
    hidden = module.encode(embedded, valid)
    compare(name, "last hidden state", hidden[valid], outputs["vision_last_hidden"][valid], BOUND)
    compare(name, "pooled", module.head(hidden, valid)[:, 0], outputs["vision_pooled"], BOUND)


def test_siglip_ecg_embeddings(golden: GoldenFolder) -> None:
    name = "vision_siglip_ecg"
    inputs, outputs = arrays(golden(name))
    config = {**json.loads((golden(name) / "siglip2_config.json").read_text()), **siglip_ecg_config(golden)}
    tokens = config["num_encoder_tokens"]
    encoder = load_encoder("siglip_ecg", golden(name) / "model.safetensors", tokens=tokens, **config)
    compare(name, "embeddings", encoder(inputs["ecg"]), outputs["embeddings"], BOUND)


def test_orah_scales_ecgs_itself(golden: GoldenFolder, tmp_path: Path) -> None:
    """It is SigLIP-ECG of scaled ECGs; a folder of the whole model gives its encoder."""
    folder = golden("vision_siglip_ecg")
    config = {**json.loads((folder / "siglip2_config.json").read_text()), **siglip_ecg_config(golden)}
    ours = {n: t for n, t in Safetensors(folder / "model.safetensors").items() if ".vision_model." in n}
    theirs = {n.replace("vision_encoder.vision_model.", "encoder.model."): t for n, t in ours.items()}
    ecgs = dict(np.load(folder / "inputs.npz"))["ecg"]
    low, high = (bound(ecgs, axis=(1, 2), keepdims=True) for bound in (np.min, np.max))
    wanted = load_encoder("siglip_ecg", ours, tokens=5, **config)((ecgs - low) / (high - low + 1e-6))
    theirs |= {f"{part}.0.weight": np.zeros((1, 1), np.float32) for part in ("projector", "language_model")}
    save_safetensors(tmp_path / "model.safetensors", theirs)
    vision = json.loads((folder / "siglip2_config.json").read_text())["vision_config"]
    whole = {"model_type": "orah", "text_config": {}, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = load_encoder("orah", tmp_path, tokens=5, **siglip_ecg_config(golden))(3 * ecgs - 2)
    compare("vision_siglip_ecg", "orah", found, wanted, 1e-5)


def siglip_ecg_config(golden: GoldenFolder) -> dict:
    return json.loads((golden("vision_siglip_ecg") / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "folder", "others"),
    [
        ("clip", "vision_clip_eos2", ("text_", "logit_scale")),
        ("vit", "vision_vit_mim", ("decoder.", "vit.layernorm.")),
        ("siglip2", "vision_siglip2_naflex", ("text_model.", "logit_")),
        ("siglip_ecg", "vision_siglip_ecg", ("none",)),
    ],
)
def test_published_weights_survive_a_round_trip(
    golden: GoldenFolder, name: str, folder: str, others: tuple[str, ...]
) -> None:
    """All weights of the tower come out as they went in; nothing else is held."""
    file = "siglip2_config.json" if name == "siglip_ecg" else "config.json"
    config = json.loads((golden(folder) / file).read_text())
    config |= siglip_ecg_config(golden) if name == "siglip_ecg" else {}
    tensors = dict(Safetensors(golden(folder) / "model.safetensors"))
    structure = structure_of(lambda: build_encoder(name, config, 1, nnx.Rngs(0)))
    back = to_published(name, from_published(name, structure.leaves, tensors))
    assert set(tensors) - set(back) == {key for key in tensors if key.startswith(others)}
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)
