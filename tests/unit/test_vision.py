"""The vision encoders: what they take, what they refuse, and where their weights come from."""

import json
from collections import UserDict
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from elm_jax.ecg.images import VIT
from elm_jax.errors import UserError
from elm_jax.models.encoders import ENCODERS, build_encoder
from elm_jax.models.encoders.siglip import resize_weights
from elm_jax.models.encoders.vision import mask_of
from elm_jax.models.functional import Arrays, Structure, structure_of
from elm_jax.weights.encoders import LoadedEncoder, encoder_config, from_published, load_encoder, to_published
from elm_jax.weights.safetensors import Safetensors, save_safetensors

BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {**BLOCKS, "image_size": 16, "patch_size": 8, "projection_dim": 12},
    "vit": {**BLOCKS, "image_size": 16, "patch_size": 4},
    "siglip2": {**BLOCKS, "patch_size": 4, "num_patches": 9},
    "siglip_ecg": {**BLOCKS, "patch_size": 5, "seq_len": 40, "num_leads": 3},
}
WIDTHS = {"clip": 12, "vit": 16, "siglip2": 16, "siglip_ecg": 16}
MODEL_TYPES = {"clip": "clip", "vit": "vit", "siglip2": "siglip2", "siglip_ecg": "siglip2"}
SLOTS = 12  # for patches of an image
ALL = tuple(CONFIGS)


@cache
def tiny(name: str) -> tuple[Structure, Arrays]:
    """A small encoder's structure, and weights such that all of them matter."""
    structure = structure_of(lambda: build_encoder(name, CONFIGS[name], 1, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    arrays = {n: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32) for n, leaf in structure.leaves.items()}
    return structure, arrays


def published(name: str) -> dict[str, np.ndarray]:
    return to_published(name, tiny(name)[1])


def inputs(name: str, batch: int = 3, raw: bool = False, seed: int = 0) -> Any:
    """Images, patches or signals; `raw` ones are as the loader has them."""
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, np.uint8) if raw else rng.standard_normal(shape, dtype=np.float32)

    if name == "siglip_ecg":
        return rng.random((batch, 3, 40)).astype(np.float32)
    if name != "siglip2":
        return values(batch, 16, 16, 3)
    shapes = np.array([[2, 5], [3, 4], [1, 1], [4, 2]], np.int32)[:batch]
    return {
        "patches": values(batch, SLOTS, 48), "mask": np.arange(SLOTS)[None] < shapes.prod(1)[:, None], "shape": shapes
    }  # fmt: skip


# -- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_signal_has_its_own_embedding_in_float32(name: str) -> None:
    encoder = load_encoder(name, published(name), **CONFIGS[name])
    found = encoder(inputs(name))
    assert found.shape == (3, 1, WIDTHS[name]) == (3, encoder.tokens, encoder.width)
    assert found.dtype == jnp.float32
    alone = [encoder(jax.tree.map(lambda x, i=i: x[i : i + 1], inputs(name))) for i in range(3)]
    np.testing.assert_allclose(np.concatenate(alone), found, atol=1e-5)
    assert np.abs(np.diff(found, axis=0)).max() > 1e-3
    if name in ("clip", "siglip2"):
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)


def test_siglip_ecg_pools_to_the_tokens_asked_for() -> None:
    encoder = load_encoder("siglip_ecg", published("siglip_ecg"), tokens=8, **CONFIGS["siglip_ecg"])
    each = np.asarray(encoder(inputs("siglip_ecg")))
    whole = load_encoder("siglip_ecg", published("siglip_ecg"), **CONFIGS["siglip_ecg"])(inputs("siglip_ecg"))
    assert each.shape == (3, 8, 16)
    np.testing.assert_allclose(each.mean(1, keepdims=True), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_images_may_have_their_colours_first(name: str) -> None:
    encoder, images = load_encoder(name, published(name), **CONFIGS[name]), inputs(name)
    np.testing.assert_array_equal(encoder(images), encoder(images.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(encoder(images), encoder({"pixel_values": images}))


@pytest.mark.parametrize("name", ["clip", "vit", "siglip2"])
def test_bytes_are_normalised_as_the_processor_does(name: str) -> None:
    encoder, raw = load_encoder(name, published(name), **CONFIGS[name]), inputs(name, raw=True)
    processing = ENCODERS[name].processing
    assert processing is not None
    mean, std = (np.asarray(v) for v in (processing.mean, processing.std))

    def normalise(x: np.ndarray) -> np.ndarray:
        return ((x.reshape(*x.shape[:2], -1, 3) / 255 - mean) / std).astype(np.float32).reshape(x.shape)

    given = {**raw, "patches": normalise(raw["patches"])} if name == "siglip2" else normalise(raw)
    np.testing.assert_allclose(encoder(raw), encoder(given), atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_unused_slots_are_finite_and_change_nothing(name: str) -> None:
    """Neither the others' embeddings, nor the gradients that these give to the weights."""
    structure, arrays = tiny(name)
    wanted = np.random.default_rng(1).standard_normal((4, 1, WIDTHS[name])).astype(np.float32)
    of_others, of_slot = wanted * (np.arange(4) < 3)[:, None, None], wanted * (np.arange(4) == 3)[:, None, None]

    @jax.jit
    def run(signals: Any) -> tuple[jax.Array, Any]:
        found, pull = jax.vjp(lambda arrays: structure.bind(arrays)(signals), arrays)
        return found, jax.vmap(pull)(jnp.stack([of_others, of_slot]))[0]

    used, other = inputs(name), inputs(name, seed=1)
    empty, gradients = run(jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), used))
    full, expected = run(jax.tree.map(lambda x, y: np.concatenate([x, y[:1]]), used, other))
    assert np.isfinite(empty).all()
    assert np.abs(empty[3] - full[3]).max() > 1e-3
    np.testing.assert_allclose(empty[:3], full[:3], atol=1e-5)
    for key, value in gradients.items():
        assert np.isfinite(value).all(), key
        np.testing.assert_allclose(value[0], expected[key][0], atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_close_to_float32(name: str) -> None:
    structure = structure_of(lambda: build_encoder(name, CONFIGS[name], 1, nnx.Rngs(0), jnp.bfloat16, jnp.bfloat16))
    arrays = jax.tree.map(jnp.asarray, from_published(name, structure.leaves, published(name)))
    found = LoadedEncoder(structure.bind(arrays))(inputs(name))
    expected = load_encoder(name, published(name), **CONFIGS[name])(inputs(name))
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_naflex_names_of_the_processor_and_padding_patches() -> None:
    encoder, given = load_encoder("siglip2", published("siglip2"), **CONFIGS["siglip2"]), inputs("siglip2")
    theirs = {"pixel_values": given["patches"], "pixel_attention_mask": given["mask"].astype(np.int64)}
    found = encoder({**theirs, "spatial_shapes": given["shape"].astype(np.int64)})
    np.testing.assert_array_equal(found, encoder(given))
    noisy = np.where(given["mask"][..., None], given["patches"], 7)
    np.testing.assert_allclose(encoder({**given, "patches": noisy}), found, atol=1e-6)


@pytest.mark.parametrize("grid", [3, 16])
def test_the_position_table_is_resized_as_an_image_is(grid: int) -> None:
    shapes = np.array([[1, 1], [2, 30], [5, 7], [16, 16], [40, 3], [grid, grid]], np.int32)
    table = np.random.default_rng(0).standard_normal((grid, grid, 2)).astype(np.float32)
    found = np.einsum("bpg,gd->bpd", resize_weights(shapes, 256, grid), table.reshape(-1, 2))
    for place, (rows, columns) in zip(found, shapes, strict=True):
        resized = jax.image.resize(table, (rows, columns, 2), "linear", antialias=True).reshape(-1, 2)
        np.testing.assert_allclose(place[: rows * columns], resized, atol=1e-5)
        np.testing.assert_array_equal(place[rows * columns :], np.broadcast_to(place[0], (256 - len(resized), 2)))


# -- the mask of ViT ------------------------------------------------------------------------------------------------


def test_vit_masks_nothing_unless_asked() -> None:
    images, weights = inputs("vit"), published("vit")
    plain = load_encoder("vit", weights, **CONFIGS["vit"])
    nowhere = {"pixel_values": images, "bool_masked_pos": np.zeros((3, 16), bool)}
    np.testing.assert_allclose(plain(nowhere), plain(images), atol=1e-6)
    for compat in (("vit_random_mask",), ("elm-2026-08",)):
        masked = load_encoder("vit", weights, compat=compat, **CONFIGS["vit"])
        assert np.abs(masked(images) - plain(images)).max() > 1e-2
        np.testing.assert_allclose(masked(nowhere), plain(images), atol=1e-6)
        given = {"pixel_values": images, "bool_masked_pos": mask_of(images, 16, 0.75)}
        np.testing.assert_allclose(masked(images), plain(given), atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_that_is_trained_has_a_gradient(name: str) -> None:
    structure, arrays = tiny(name)
    given = inputs(name)
    gradients = jax.jit(jax.grad(lambda arrays: jnp.sum(structure.bind(arrays)(given)[..., 0])))(arrays)
    unused = {key for key, gradient in gradients.items() if not np.asarray(gradient).any()}
    held = {key for key, leaf in structure.leaves.items() if leaf.statistic}
    assert unused == held == ({"mask_token"} if name == "vit" else set())


def test_vit_trains_its_mask_token_where_it_masks() -> None:
    compat = ("vit_random_mask",)
    structure = structure_of(lambda: build_encoder("vit", CONFIGS["vit"], 1, nnx.Rngs(0), compat=compat))
    assert not any(leaf.statistic for leaf in structure.leaves.values())


def test_masks_differ_from_image_to_image_and_hide_three_quarters() -> None:
    images = inputs("vit", batch=200)
    masks = np.asarray(mask_of(images, 196, 0.75))
    assert abs(masks.mean() - 0.75) < 0.01
    assert len({mask.tobytes() for mask in masks}) == 200
    np.testing.assert_array_equal(mask_of(images[5:7], 196, 0.75), masks[5:7])


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "vit", "siglip2"])
def test_an_image_is_one_token(name: str) -> None:
    with pytest.raises(UserError, match="encoder.tokens: found 4; expected 1.*set --config.encoder.tokens=1"):
        load_encoder(name, tokens=4, **CONFIGS[name])


@pytest.mark.parametrize("name", ALL)
def test_weights_missing_unknown_or_of_another_shape_are_refused(name: str) -> None:
    tensors = published(name)
    end = "1.output.dense.weight" if name == "vit" else "1.mlp.fc1.weight"
    last = next(key for key in tensors if key.endswith(end))
    with pytest.raises(UserError, match=f"found no {last}"):
        load_encoder(name, {key: t for key, t in tensors.items() if key != last}, **CONFIGS[name])
    extra = last.replace(".1.", ".2.")
    with pytest.raises(UserError, match=f"found unknown {extra}"):
        load_encoder(name, {**tensors, extra: tensors[last]}, **CONFIGS[name])
    with pytest.raises(UserError, match=f"found {last} float32.*; expected floating"):
        load_encoder(name, {**tensors, last: tensors[last][:-1]}, **CONFIGS[name])


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("clip", ("text_model.a.b", "text_projection.weight", "logit_scale", "vision_model.embeddings.position_ids")),
        ("vit", ("vit.layernorm.weight", "vit.pooler.dense.bias", "decoder.0.weight", "classifier.bias")),
        ("siglip2", ("text_model.head.weight", "logit_scale", "logit_bias")),
        ("siglip_ecg", ("vision_encoder.text_model.head.weight", "vision_encoder.logit_bias")),
    ],
)  # fmt: skip
def test_other_parts_of_a_checkpoint_are_known_and_left_alone(name: str, others: tuple[str, ...]) -> None:
    tensors = published(name)
    expected = load_encoder(name, tensors, **CONFIGS[name])(inputs(name))
    wrapped = {f"module.{key}": tensor for key, tensor in tensors.items()}
    more = {other: np.zeros(1, np.float32) for other in others}
    np.testing.assert_array_equal(load_encoder(name, {**wrapped, **more}, **CONFIGS[name])(inputs(name)), expected)


def test_vit_files_of_the_bare_model_without_a_mask_token() -> None:
    tensors = published("vit")
    bare = {key.removeprefix("vit."): tensor for key, tensor in tensors.items() if "mask_token" not in key}
    bare["pooler.dense.weight"] = np.zeros((16, 16), np.float32)
    found = load_encoder("vit", bare, **CONFIGS["vit"])
    np.testing.assert_array_equal(
        found(inputs("vit")), load_encoder("vit", tensors, **CONFIGS["vit"])(inputs("vit"))
    )
    assert not np.any(found.module.mask_token[...])


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("clip", {"hiden_size": 3}, "encoder.config.hiden_size: found an unknown field.*did you mean 'hidden_size'"),
        ("clip", {"hidden_act": "relu"}, "encoder.config.hidden_act: found 'relu'"),
        ("clip", {"patch_size": 7}, "encoder.config.patch_size: found 7; expected a divisor of image_size, 16"),
        ("clip", {"num_attention_heads": 3}, "num_attention_heads: found 3; expected a divisor of hidden_size, 16"),
        ("clip", {"attention_dropout": 0.1}, "encoder.config.attention_dropout: found 0.1; expected 0.0"),
        ("clip", {"model_type": "siglip"}, "encoder.config.model_type: found 'siglip'; expected clip"),
        ("clip", {"vision_config": {"num_channels": 1}}, "encoder.config.num_channels: found 1; expected 3"),
        ("clip", {"vision_config": {"a": 1}}, "encoder.config.a: found an unknown field"),
        ("clip", {"vision_config": {"patch_size": 8}, "vision_config_dict": {"patch_size": 4}}, "found 4 in vision_co"),
        ("vit", {"mask_ratio": 2}, "encoder.config.mask_ratio: found 2"),
        ("vit", {"qkv_bias": 1}, "encoder.config.qkv_bias: found 1"),
        ("siglip2", {"vision_use_head": False}, "encoder.config.vision_use_head: found False; expected True"),
        ("siglip2", {"num_patches": 10}, "encoder.config.num_patches: found 10; expected a square"),
        ("siglip_ecg", {"patch_size": 7}, "encoder.config.patch_size: found 7; expected a divisor of seq_len, 40"),
        ("siglip", {"model_type": "siglip2"}, "encoder.config.model_type: found .siglip2.; expected siglip or"),
        ("dinov2", {"intermediate_size": 9}, "encoder.config.intermediate_size: found an unknown field"),
        ("dinov2", {"drop_path_rate": 0.1}, "encoder.config.drop_path_rate: found 0.1; expected 0.0"),
        ("siglip_ecg", {"num_leads": 0}, "encoder.config.num_leads: found 0"),
    ],
)  # fmt: skip
def test_config_fields_that_change_the_numbers_are_refused_by_name(name: str, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(name, **{**CONFIGS.get(name, {}), **config})


@pytest.mark.parametrize(
    ("name", "signals", "message"),
    [
        ("clip", np.zeros((2, 8, 8, 3), np.float32), r"input: found shape \(2, 8, 8, 3\); expected \(batch, 16"),
        ("clip", {"pixels": np.zeros((2, 16, 16, 3))}, "encoder input: found pixels; expected pixel_values"),
        ("vit", {"pixel_values": np.zeros((2, 16, 16, 3)), "bool_masked_pos": np.zeros((2, 4))}, "bool_masked_pos"),
        ("siglip2", np.zeros((2, 12, 48), np.float32), "input: found patches; expected patches and mask and"),
        ("siglip_ecg", np.zeros((2, 3, 41), np.float32), r"input: found shape \(2, 3, 41\); expected .*40 samples"),
    ],
)  # fmt: skip
def test_inputs_of_another_shape_are_refused(name: str, signals: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(name, published(name), **CONFIGS[name])(signals)


OF_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "siglip": ("siglip", "SiglipVision", {"intermediate_size": 24, "image_size": 18, "patch_size": 4}, {}),
    "dinov2": ("dinov2", "Dinov2", {"mlp_ratio": 2, "image_size": 20, "patch_size": 4}, {"resolution": 12}),
    "dinov2_giant": (
        "dinov2", "Dinov2", {"mlp_ratio": 2, "image_size": 20, "patch_size": 4, "use_swiglu_ffn": True},
        {"resolution": 20},
    ),
}  # fmt: skip


@pytest.mark.slow  # imports PyTorch
@pytest.mark.parametrize("case", OF_TRANSFORMERS)
def test_an_embedding_is_that_of_transformers_and_names_go_out_as_they_came(tmp_path: Path, case: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, called, sizes, own = OF_TRANSFORMERS[case]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **sizes}
    theirs = getattr(transformers, f"{called}Model")(getattr(transformers, f"{called}Config")(**sizes)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.tensor(0.3 * rng.standard_normal(parameter.shape)))
    theirs.save_pretrained(tmp_path)
    edge = own.get("resolution", sizes["image_size"])
    images = rng.standard_normal((2, 3, edge, edge), dtype=np.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(images)).pooler_output.numpy()
    wanted = wanted if name == "dinov2" else wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
    with jax.default_matmul_precision("highest"):
        encoder = load_encoder(name, tmp_path, **own)
        np.testing.assert_allclose(encoder(images)[:, 0], wanted, atol=2e-5 * np.abs(wanted).max(), rtol=1e-4)
    tensors = dict(Safetensors(tmp_path / "model.safetensors"))
    structure = structure_of(lambda: build_encoder(name, encoder_config(name, tmp_path, own), 1, nnx.Rngs(0)))
    back = to_published(name, from_published(name, structure.leaves, tensors))
    prefix = "vision_model." if name == "siglip" else ""  # of the whole model's file
    assert {key.removeprefix(prefix) for key in back} == set(tensors)
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[key.removeprefix(prefix)], err_msg=key)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def write_folder(folder: Path, name: str, nested: bool, shards: int) -> Path:
    """A Hugging Face folder of the small encoder."""
    folder.mkdir()
    fields = dict(CONFIGS[name])
    top = {"model_type": MODEL_TYPES[name], "architectures": ["A"], "dtype": "float32"}
    if nested:
        top |= {"vision_config": fields, "text_config": {"hidden_size": 5}}
        if name == "clip":
            top["projection_dim"], fields["projection_dim"] = fields["projection_dim"], 512  # the outer one counts
    else:
        top |= fields
    (folder / "config.json").write_text(json.dumps(top))
    tensors = published(name)
    if shards == 1:
        save_safetensors(folder / "model.safetensors", tensors)
        return folder
    files = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(tensors)}
    for file in set(files.values()):
        save_safetensors(folder / file, {key: tensors[key] for key in tensors if files[key] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize(
    ("name", "nested", "shards"), [("clip", True, 2), ("clip", False, 1), ("vit", False, 1), ("siglip2", True, 2)]
)
def test_a_hugging_face_folder_gives_sizes_and_weights(tmp_path: Path, name: str, nested: bool, shards: int) -> None:
    folder = write_folder(tmp_path / "model", name, nested, shards)
    found = load_encoder(name, folder)
    np.testing.assert_array_equal(
        found(inputs(name)), load_encoder(name, published(name), **CONFIGS[name])(inputs(name))
    )
    assert encoder_config(name, folder, {"hidden_act": "gelu"})["hidden_act"] == "gelu"


def test_a_file_means_the_published_defaults_where_it_is_silent() -> None:
    """Hugging Face leaves out of a SigLIP 2 config what is as in the base model; ours alone means so400m."""
    read = [build_config("siglip2", fields) for fields in ({}, {"model_type": "siglip2", "vision_config": {}})]
    assert [config.hidden_size for config in read] == [1152, 768]
    assert [config.num_hidden_layers for config in read] == [27, 12]


def test_what_transformers_writes_is_read() -> None:
    """A config.json with every field that it knows, and those of generation that it used to write."""
    from transformers import CLIPConfig, Siglip2Config, ViTConfig

    clip = CLIPConfig().to_dict()
    old = {"do_sample": False, "num_beams": 1, "top_k": 50, "torchscript": False, "dropout": 0.0, "pruned_heads": {}}
    clip["vision_config"] |= old
    clip |= {"vision_config_dict": {"patch_size": 32}, "text_config_dict": None}
    assert build_config("clip", clip) == build_config("clip", {})
    assert build_config("vit", ViTConfig().to_dict()) == build_config("vit", {})
    assert build_config("siglip2", Siglip2Config().to_dict()).hidden_size == 768
    assert build_config("siglip_ecg", Siglip2Config().to_dict()) == build_config("siglip_ecg", {})


def build_config(name: str, fields: dict) -> Any:
    return nnx.eval_shape(lambda: build_encoder(name, fields, 1, nnx.Rngs(0))).config  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("clip", 87_849_216), ("vit", 86_389_248 - 768 * 769 - 2 * 768 + 768), ("siglip2", 427_888_064),
     ("siglip", 92_884_224), ("dinov2", 86_580_480)],
)
def test_the_defaults_are_the_published_models(name: str, parameters: int) -> None:
    """By their number of parameters; of ViT the pooler and the last norm are not held, and the mask token is."""
    leaves = structure_of(lambda: build_encoder(name, {}, 1, nnx.Rngs(0))).leaves
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == parameters


def test_siglip_ecg_starts_from_the_blocks_of_siglip2() -> None:
    """The patches and positions of images are no use to it: its own are drawn; its own checkpoint must have them."""
    config = CONFIGS["siglip_ecg"]
    found = load_encoder("siglip_ecg", published("siglip2"), **config).module
    fresh = load_encoder("siglip_ecg", **config).module
    np.testing.assert_array_equal(found.positions[...], fresh.positions[...])
    np.testing.assert_array_equal(found.patches.kernel[...], fresh.patches.kernel[...])
    kernel = found.transformer.blocks.mlp.fc1.kernel[...]
    np.testing.assert_array_equal(kernel, tiny("siglip2")[1]["transformer.blocks.mlp.fc1.kernel"])
    stem = "vision_encoder.vision_model.embeddings.position_embedding.weight"
    tensors = {key: tensor for key, tensor in published("siglip_ecg").items() if key != stem}
    with pytest.raises(UserError, match=f"found no {stem}"):
        load_encoder("siglip_ecg", tensors, **config)


def test_siglip_ecg_takes_the_sizes_of_a_siglip2_folder(tmp_path: Path) -> None:
    own = {key: CONFIGS["siglip_ecg"][key] for key in ("patch_size", "num_leads")}
    for nested in (True, False):
        folder = write_folder(tmp_path / str(nested), "siglip2", nested, 1)
        if not nested:
            fields = json.loads((folder / "config.json").read_text()) | {"model_type": "siglip2_vision_model"}
            (folder / "config.json").write_text(json.dumps(fields))
        encoder = load_encoder("siglip_ecg", folder, tokens=2, segment_len=40, num_encoder_tokens=2, **own)
        assert encoder(inputs("siglip_ecg")).shape == (3, 2, 16)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json: found .*No such file"),
        ({"config.json": "{}"}, "found no safetensors"),
        ({"config.json": "[]"}, "config.json: found list; expected a JSON object"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pytorch_model.bin: found "),
    ],
)
def test_folders_that_are_not_whole_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        load_encoder("vit", tmp_path)


def test_a_folder_whose_images_were_normalised_otherwise_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "vit", False, 1)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": list(VIT.mean), "image_std": [0.5, 0.5, 0.5]}))
    load_encoder("vit", folder)
    file.write_text(json.dumps({"image_mean": [0.4, 0.5, 0.5]}))
    with pytest.raises(UserError, match=r"preprocessor_config.json image_mean: found \[0.4, 0.5, 0.5\]; expected"):
        load_encoder("vit", folder)


@pytest.mark.parametrize("name", ["owner/no-such-model", "no-such-folder", "a/b/c", "owner/weights.pt"])
def test_what_is_neither_here_nor_in_the_hub_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"encoder.checkpoint: found '?{name}"):
        load_encoder("clip", name)


def test_the_hub_is_asked_for_safetensors_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = write_folder(tmp_path / "model", "clip", True, 1), []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, "pytorch_model.bin" in allow_patterns))
        return str(folder)

    monkeypatch.setattr("elm_jax.weights.files.snapshot_download", download)
    assert load_encoder("clip", "owner/clip").width == 12
    assert set(asked) == {("owner/clip", False)}


def test_what_a_processor_returns_is_taken() -> None:
    """A Mapping that is no dict, such as Hugging Face's BatchFeature."""
    encoder = load_encoder("siglip2", published("siglip2"), **CONFIGS["siglip2"])
    np.testing.assert_array_equal(encoder(UserDict(inputs("siglip2"))), encoder(inputs("siglip2")))
