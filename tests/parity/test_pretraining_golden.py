"""Self-supervised objectives of encoders against the reference's numbers, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity_log import compare

from elm_jax.data.ecg_ids import PADDED
from elm_jax.keys import OptimConfig, TrainConfig
from elm_jax.models.encoders import build_encoder
from elm_jax.models.encoders.mae_pretraining import rebuilding_error
from elm_jax.models.encoders.next_token import next_id_errors
from elm_jax.models.encoders.sequence import next_embedding_error
from elm_jax.models.functional import Structure, structure_of
from elm_jax.training.optim import clip_coefficient, learning_rate_multiplier, make_optimizer
from elm_jax.training.state import averaged
from elm_jax.weights.encoders import from_published, read_checkpoint, to_published

Golden = Callable[[str], Path]
MASKED = ("st_mem", "mtae", "mlae")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def loaded(folder: Path, name: str) -> tuple[Structure, dict[str, jax.Array], dict[str, Any]]:
    """The encoder of a golden with its decoder, its arrays, and its config."""
    config = json.loads((folder / "config.json").read_text())
    structure = structure_of(lambda: build_encoder(f"{name}.pretraining", config, 1, nnx.Rngs(0)))
    tensors, _ = read_checkpoint(folder / "model.safetensors")
    arrays = jax.tree.map(jnp.asarray, from_published(f"{name}.pretraining", structure.leaves, tensors))
    return structure, arrays, config


@pytest.mark.parametrize("case", [f"{name}{norm}" for name in MASKED for norm in ("", "_normpix")])
def test_masked_autoencoders(case: str, golden: Golden) -> None:
    folder, name = golden(f"ssl_{case}"), case.removesuffix("_normpix")
    structure, arrays, config = loaded(folder, name)
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    norms = json.loads((folder / "meta.json").read_text())
    for ratio in ("0.75", "0.5"):
        noise = jnp.asarray(wanted[f"{ratio}/noise"])

        def rebuilt(arrays: Any, noise: Any = noise, ratio: str = ratio) -> Any:
            return structure.bind(arrays).rebuild(jnp.asarray(given["ecg"]), noise, float(ratio))

        found = rebuilt(arrays)
        np.testing.assert_array_equal(found.hidden, wanted[f"{ratio}/mask"])
        compare(f"ssl_{case}", "encoder_latent", found.latent, wanted[f"{ratio}/encoder_latent"], 1e-5)
        compare(f"ssl_{case}", "pred", found.patches, wanted[f"{ratio}/pred"], 1e-5)

        for kind in ("nopad", "pad"):
            if f"{ratio}/{kind}/loss" not in wanted:  # the reference's MLAE fails with padding
                continue
            padded = None
            if kind == "pad":
                whole = np.broadcast_to(given["padding_mask"][:, None] > 0, given["ecg"].shape)
                padded = structure.bind(arrays).config.cut(jnp.asarray(whole)).any(-1)

            def loss(arrays: Any, rebuilt: Any = rebuilt, padded: Any = padded) -> jax.Array:
                errors, counted = rebuilding_error(rebuilt(arrays), config["norm_pix_loss"], padded)
                return errors.sum() / counted.sum()

            value, gradients = jax.value_and_grad(loss)(arrays)
            compare(f"ssl_{case}", f"loss, {kind}", value, wanted[f"{ratio}/{kind}/loss"], 1e-5)
            theirs = norms[f"{ratio}/{kind}/grad_norms"]
            ours = {n: float(np.linalg.norm(g)) for n, g in to_published(f"{name}.pretraining", gradients).items()}
            assert set(theirs) <= set(ours)
            for tensor, norm in theirs.items():
                np.testing.assert_allclose(ours[tensor], norm, rtol=1e-3, atol=1e-6, err_msg=tensor)


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The reference's fields of its post-norm encoders under our names."""
    names = {"patch_dim": "seq_len", "max_patches": "num_leads", "input_dim": "num_leads", "max_seq_len": "seq_len"}
    names |= {"num_encoder_layers": "num_layers"}
    if "vocab_size" in config:  # ids, not samples
        del names["max_seq_len"]
    unlike = ("dropout", "decoder_d_model", "pad_id")
    return {names.get(name, name): x for name, x in config.items() if name not in unlike}


def published_norms(name: str, gradients: Any) -> dict[str, float]:
    return {n: float(np.linalg.norm(g)) for n, g in to_published(name, gradients).items()}


def test_mae_vit(golden: Golden) -> None:
    folder = golden("ssl_mae_vit")
    structure, arrays = sequence(folder, "mae_vit")
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    noise = jnp.asarray(1.0 - given["visible_mask"])  # ties: in their own order

    def loss(arrays: Any) -> Any:
        found = structure.bind(arrays).rebuild(jnp.asarray(given["patches"]), noise)
        errors, counted = rebuilding_error(found, normalised=False)
        return errors.sum() / counted.sum(), found

    (value, found), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    np.testing.assert_array_equal(found.hidden > 0, wanted["mask"] > 0)
    compare("ssl_mae_vit", "enc", found.latent, wanted["enc"], 1e-5)
    compare("ssl_mae_vit", "pred", found.patches, wanted["pred"], 1e-5)
    compare("ssl_mae_vit", "loss", value, wanted["loss_masked_only"], 1e-5)
    theirs = dict(np.load(folder / "grads.npz"))
    ours = to_published("mae_vit", gradients)
    for tensor, gradient in theirs.items():
        compare("ssl_mae_vit", "gradients", ours[tensor], gradient, 1e-4)


def test_vit(golden: Golden) -> None:
    folder = golden("vision_vit_mim")
    structure, arrays, config = loaded(folder, "vit")
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    images, hidden = jnp.asarray(given["pixel_values"]), jnp.asarray(given["bool_masked_pos"], jnp.float32)
    found = structure.bind(arrays).paint(images, hidden)
    size, across = config["patch_size"], config["image_size"] // config["patch_size"]

    def picture(patches: Any) -> np.ndarray:
        cut = np.asarray(patches).reshape(len(images), across, across, 3, size, size)
        return cut.transpose(0, 3, 1, 4, 2, 5).reshape(images.shape)

    np.testing.assert_array_equal(picture(found.truth), images)
    compare("vision_vit_mim", "reconstruction", picture(found.patches), wanted["reconstruction"], 1e-5)
    errors, counted = rebuilding_error(found, normalised=False, absolute=True)
    compare("vision_vit_mim", "loss", errors.sum() / counted.sum(), wanted["loss"], 1e-5)
    drawn = structure.bind(arrays).rebuild(images, structure.bind(arrays).noise(jax.random.key(0), len(images)), 0.5)
    np.testing.assert_array_equal(drawn.hidden.sum(1), 8)


@pytest.mark.parametrize("case", ["nopad", "pad", "modality", "pad_modality"])
def test_nepa(case: str, golden: Golden) -> None:
    folder = golden("ssl_nepa")
    structure, arrays = sequence(folder, "nepa")
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    padded = jnp.asarray(given["padding_mask"] > 0) if case.startswith("pad") else None
    signal = jnp.asarray(given["signal"])
    if case.endswith("modality"):  # a lead that is left out is one of zeros
        signal = jnp.where(jnp.asarray(given["modality_mask"] > 0)[..., None], 0.0, signal)
    counts = 1.0 if padded is None else (~padded[:, 1:]).sum(1)

    def loss(arrays: Any) -> jax.Array:
        errors = next_embedding_error(structure.bind(arrays), signal, padded)
        return (errors * counts).sum() / jnp.broadcast_to(jnp.asarray(counts, jnp.float32), errors.shape).sum()

    value, gradients = jax.value_and_grad(loss)(arrays)
    np.testing.assert_allclose(value, wanted[f"{case}/loss"], atol=2e-6)
    elm = structure.bind(arrays)
    embedded = elm.embed(jnp.asarray(given["signal"]))
    if case == "nopad":
        compare("ssl_nepa", "input_embed", embedded, wanted["nopad/input_embed"], 1e-5)
        compare("ssl_nepa", "pred_embed", elm.predict(embedded), wanted["nopad/pred_embed"], 1e-5)
        compare("ssl_nepa", "encode", elm.layers(embedded), wanted["encode"], 1e-5)
        theirs = json.loads((folder / "grad_norms_nopad.json").read_text())
        ours = published_norms("nepa", gradients)
        for tensor, norm in theirs.items():
            np.testing.assert_allclose(ours[tensor], norm, rtol=1e-3, atol=1e-6, err_msg=tensor)


def test_next_token(golden: Golden) -> None:
    """Left-padded rows, as the reference has them; a forecast against its greedy one."""
    folder = golden("ssl_decoder_transformer")
    structure, arrays = sequence(folder, "next_token")
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    model = structure.bind(arrays)
    ids = next_token_ids(given["tgt_ids"], model.config.pad_id)
    hidden, real = model.hidden(ids), np.asarray(ids) != PADDED
    compare("ssl_decoder_transformer", "hidden", np.asarray(hidden)[real], wanted["hidden_valid"], 1e-5)
    compare("ssl_decoder_transformer", "logits", np.asarray(model.head(hidden))[real], wanted["logits_valid"], 1e-5)
    for labels, loss in (("labels", "loss"), ("forecast_labels_ratio_0.5", "forecast_loss")):
        counted = jnp.asarray({**given, **wanted}[labels][:, 1:] >= 0)
        found = next_id_errors(model, ids, counted).sum() / counted.sum()
        compare("ssl_decoder_transformer", loss, found, wanted[loss], 1e-5)

    def mean_loss(arrays: Any) -> jax.Array:
        return next_id_errors(structure.bind(arrays), ids).sum() / (given["labels"][:, 1:] >= 0).sum()

    norms = published_norms("next_token", jax.grad(mean_loss)(arrays))
    for tensor, norm in json.loads((folder / "grad_norms.json").read_text()).items():
        np.testing.assert_allclose(norms[tensor], norm, rtol=1e-3, atol=1e-6, err_msg=tensor)
    follow(folder, "next_token", mean_loss, arrays)

    def continued(prompt: np.ndarray, length: int) -> jax.Array:
        return model.forecast(jnp.pad(jnp.asarray(prompt, jnp.int32), ((0, 0), (0, length)), constant_values=PADDED))

    prompt = given["generate_prompt"]
    made = continued(prompt, wanted["generate_tokens"].shape[1] - prompt.shape[1])
    np.testing.assert_array_equal(made, wanted["generate_tokens"])
    logits = model.head(model.hidden(made))[:, prompt.shape[1] - 1 : -1]
    compare("ssl_decoder_transformer", "logits of a forecast", logits, wanted["generate_logits"], 1e-5)
    row, whole = given["tgt_ids"][:1], wanted["generate_to_max_tokens"]
    np.testing.assert_array_equal(continued(row, whole.shape[1] - row.shape[1]), whole)


def next_token_ids(ids: np.ndarray, pad: int) -> jax.Array:
    return jnp.asarray(np.where(ids == pad, PADDED, ids), jnp.int32)


@pytest.mark.parametrize("name", ["mae_vit", "nepa"])
def test_steps_of_the_optimizer_and_the_average(name: str, golden: Golden) -> None:
    folder = golden(f"ssl_{name}")
    structure, arrays = sequence(folder, name)
    given = dict(np.load(folder / "inputs.npz"))

    def loss(arrays: Any) -> jax.Array:
        encoder = structure.bind(arrays)
        if name == "nepa":
            return next_embedding_error(encoder, jnp.asarray(given["signal"])).mean()
        found = encoder.rebuild(jnp.asarray(given["patches"]), jnp.asarray(1.0 - given["visible_mask"]))
        errors, counted = rebuilding_error(found, normalised=False)
        return errors.sum() / counted.sum()

    follow(folder, name, loss, arrays)


def follow(folder: Path, name: str, loss: Callable[[Any], jax.Array], arrays: dict[str, jax.Array]) -> None:
    """Take the golden's steps: AdamW, clipping, warm-up, cosine and EMA, as the train step puts them together."""
    optim = OptimConfig(
        lr=1e-3, schedule="cosine", warmup_steps=2, weight_decay=1e-2, beta1=0.9, beta2=0.95, grad_clip=1.0, ema=0.999
    )
    tx, rate = make_optimizer(optim, TrainConfig(), 20), learning_rate_multiplier(optim, 20)
    trace, wanted = json.loads((folder / "train_trace.json").read_text()), dict(np.load(folder / "outputs.npz"))
    state, average = tx.init(arrays), dict(arrays)
    gradient = jax.jit(jax.value_and_grad(loss))

    def length(tree: dict[str, jax.Array]) -> float:
        return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in tree.values())))

    for number, step in enumerate(trace):
        value, gradients = gradient(arrays)
        norm = optax.tree.norm(gradients)
        scale = clip_coefficient(norm, optim.grad_clip)
        updates, state = tx.update({n: g * scale for n, g in gradients.items()}, state, arrays)
        arrays = optax.apply_updates(arrays, updates)  # type: ignore[assignment]
        average = averaged(average, arrays, optim.ema)
        found = {"loss": value, "grad_norm_before_clip": norm, "lr": optim.lr * float(rate(number))}
        found |= {"l2_params": length(arrays), "l2_ema": length(average)}
        for quantity, number_found in found.items():
            bound = 1e-6 if quantity.startswith("l2") else 1e-4
            compare(folder.name, f"trace, {quantity}", number_found, step[quantity], bound)
    for kind, tree in (("final", arrays), ("ema", average)):
        theirs = {n.partition("/")[2]: x for n, x in wanted.items() if n.startswith(f"{kind}/")}
        ours = to_published(name, tree)
        assert theirs and set(theirs) <= set(ours)
        for tensor, value in theirs.items():
            near = np.isclose(ours[tensor], value, rtol=2e-3, atol=1e-5)
            assert near.mean() >= 0.999, f"{kind} {tensor}"


def sequence(folder: Path, name: str) -> tuple[Structure, dict[str, jax.Array]]:
    config = sizes(json.loads((folder / "config.json").read_text()))
    structure = structure_of(lambda: build_encoder(name, config, 1, nnx.Rngs(0)))
    tensors, _ = read_checkpoint(folder / "model.safetensors")
    return structure, jax.tree.map(jnp.asarray, from_published(name, structure.leaves, tensors))
