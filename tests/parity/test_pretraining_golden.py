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
from elm_jax.models.encoders.dit import Dit, DitConfig, DitText, dit_errors, embedded_time
from elm_jax.models.encoders.mae_pretraining import rebuilding_error
from elm_jax.models.encoders.next_token import next_id_errors
from elm_jax.models.encoders.sequence import next_embedding_error
from elm_jax.models.encoders.text_tower import TextConfig
from elm_jax.models.functional import Structure, structure_of
from elm_jax.training.optim import clip_coefficient, learning_rate_multiplier, make_optimizer
from elm_jax.training.state import averaged
from elm_jax.weights.encoders import from_published, read_checkpoint, to_published
from elm_jax.weights.load import load_llm

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
    compare("ssl_decoder_transformer", "logits", np.asarray(model.logits(hidden))[real], wanted["logits_valid"], 1e-5)
    for labels, loss in (("labels", "loss"), ("forecast_labels_ratio_0.5", "forecast_loss")):
        counted = jnp.asarray({**given, **wanted}[labels][:, 1:] >= 0)
        found = next_id_errors(model, ids, counted).sum() / counted.sum()
        compare("ssl_decoder_transformer", loss, found, wanted[loss], 1e-5)

    def mean_loss(arrays: Any) -> jax.Array:
        return next_id_errors(structure.bind(arrays), ids).sum() / (given["labels"][:, 1:] >= 0).sum()

    norms = published_norms("next_token", jax.grad(mean_loss)(arrays))
    for tensor, norm in json.loads((folder / "grad_norms.json").read_text()).items():
        np.testing.assert_allclose(norms[tensor], norm, rtol=1e-3, atol=1e-6, err_msg=tensor)
    follow(folder.name, "next_token", mean_loss, arrays, *steps_of(folder))

    def continued(prompt: np.ndarray, length: int) -> jax.Array:
        return model.forecast(jnp.pad(jnp.asarray(prompt, jnp.int32), ((0, 0), (0, length)), constant_values=PADDED))

    prompt = given["generate_prompt"]
    made = continued(prompt, wanted["generate_tokens"].shape[1] - prompt.shape[1])
    np.testing.assert_array_equal(made, wanted["generate_tokens"])
    logits = model.logits(model.hidden(made))[:, prompt.shape[1] - 1 : -1]
    compare("ssl_decoder_transformer", "logits of a forecast", logits, wanted["generate_logits"], 1e-5)
    row, whole = given["tgt_ids"][:1], wanted["generate_to_max_tokens"]
    np.testing.assert_array_equal(continued(row, whole.shape[1] - row.shape[1]), whole)


class OfFeatures(DitText):
    """What a tower makes of texts is given in place of the texts."""

    def conditions(self, given: Any) -> jax.Array:
        return self.of_texts(given)


def dit_of(folder: Path, case: str) -> tuple[Structure, dict[str, jax.Array], dict[str, Any], dict[str, Any]]:
    """A variant of the golden, its arrays, its inputs and its outputs: signals of all leads, and conditions."""
    config = json.loads((folder / "config.json").read_text())[case]
    unlike = ("dropout", "text_max_len", "text_feature_extractor", "input_dim", "max_seq_len")
    fields = {n: x for n, x in config.items() if n not in unlike} | {"seq_len": config["max_seq_len"]}
    tower = TextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    name, sizes = "dit_text" if case == "rf_text" else "dit", DitConfig.from_fields(fields)
    with_text = name == "dit_text"
    structure = structure_of(
        lambda: OfFeatures((sizes, tower), rngs=nnx.Rngs(0)) if with_text else Dit(sizes, rngs=nnx.Rngs(0))
    )
    tensors, _ = read_checkpoint(folder / f"model_{case}.safetensors")
    arrays = {n: jnp.zeros(leaf.shape) for n, leaf in structure.leaves.items() if n.startswith("text.")}
    arrays |= jax.tree.map(jnp.asarray, from_published(f"{name}.pretraining", structure.leaves, tensors))
    given, wanted = (
        {n.partition("/")[2]: x for n, x in np.load(folder / f"{file}.npz").items() if n.startswith(f"{case}/")}
        for file in ("inputs", "outputs")
    )  # fmt: skip
    whole = np.zeros((len(given["signal"]), 12, given["signal"].shape[2]), np.float32)
    whole[:, sizes.generated] = given["signal"]
    if case == "ddpm_lead":
        whole[:, 0] = given["condition"]
        given["condition"] = whole
    return structure, arrays, {**given, "signals": whole}, wanted


@pytest.mark.parametrize("case", ["rf", "ddpm", "rf_label", "ddpm_lead", "rf_text"])
def test_dit(case: str, golden: Golden) -> None:
    folder, of = golden("ssl_dit"), f"ssl_dit, {case}"
    structure, arrays, given, wanted = dit_of(folder, case)
    if case == "rf_text":
        llm, ids = load_llm(golden("llm_qwen3")), jnp.asarray(given["condition_input_ids"], jnp.int32)
        seen = jnp.asarray(given["condition_attention_mask"]) > 0
        # The reference takes the mean over padding too, which sees the text.
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)) & seen[:, None, None]
        given["condition"] = llm.hidden(llm.embed(ids), places, mask).mean(1)
    condition = jnp.asarray(given["condition"]) if "condition" in given else None
    signals, start = jnp.asarray(given["signals"]), jnp.asarray(given["sample_start"])
    chosen = given.get("drop_uniform", np.ones(len(signals)))
    drawn = tuple(map(jnp.asarray, (given["noise"], given["t"] if "t" in given else given["t_int"], chosen)))
    noise, key = given.get("sample_step_noise"), jax.random.key(0)
    noise = None if noise is None else jnp.asarray(noise)

    @jax.jit
    def outputs(arrays: Any) -> dict[str, Any]:
        model = structure.bind(arrays)
        x, none = model.of(signals), condition is None
        there, embedded = model.noised(x, *drawn[:2]), None if none else model.conditions(condition)
        found = {} if none else {"condition_embedding": embedded}
        for name, valid in (("", None), ("_padding_mask", jnp.asarray(~given["padding_mask"]))):
            predicted = model.predict(there.signal, there.time, embedded, valid)
            error = ((predicted - there.target) ** 2).sum(-1)
            # With padding the reference divides by places, not by values.
            loss = error.mean() / x.shape[-1] if valid is None else (error * valid).sum() / valid.sum()
            found |= {f"eval_prediction{name}": predicted, f"eval_loss{name}": loss}
        found["features"] = model.features(x, jnp.zeros(len(x))).mean(1)
        guidance = 1.0 if none else 2.5
        for level in (0.1, 0.5, 0.95):
            found[f"reconstruct_t{level}"] = model.rebuild_from(x, drawn[0], level, embedded, guidance)
        found["sample"] = model.generate(start, key, embedded, guidance, noise=noise)
        if noise is None:
            found["sample_7_steps_cfg1"] = model.generate(start, key, embedded, 1.0, 7)
        return found

    for name, value in outputs(arrays).items():
        theirs = wanted[name]
        ours = np.swapaxes(value, 1, 2) if theirs.ndim == 3 else value
        compare(of, name, ours, theirs, 1e-3 if name.startswith("sample") else 1e-4 if "reconstruct" in name else 1e-5)

    def loss(arrays: Any) -> jax.Array:
        return dit_errors(structure.bind(arrays), signals, condition, jax.random.key(0), True, drawn).mean()

    kind = "dit_text.pretraining" if case == "rf_text" else "dit.pretraining"
    moved = {n: x for n, x in arrays.items() if not structure.leaves[n].statistic}
    still = {n: x for n, x in arrays.items() if n not in moved}

    def of_moved(moved: Any) -> jax.Array:
        return loss({**moved, **still})

    value, gradients = jax.jit(jax.value_and_grad(of_moved))(moved)
    compare(of, "train_loss", value, wanted["train_loss"], 2e-5)
    ours = to_published(kind, gradients)
    norms = json.loads((folder / "grad_norms.json").read_text())[case]
    for tensor, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(ours[tensor]), norm, rtol=1e-3, atol=1e-6, err_msg=tensor)
    trace = json.loads((folder / "train_trace.json").read_text())[case]
    follow(of, kind, of_moved, moved, trace, wanted)


def test_the_schedule_and_the_time_of_dit(golden: Golden) -> None:
    given, wanted = (dict(np.load(golden("ssl_dit") / f"{file}.npz")) for file in ("inputs", "outputs"))
    model = Dit(DitConfig(d_model=8, n_heads=1, dim_ff=8, num_layers=1, seq_len=4, loss_type="ddpm"), rngs=nnx.Rngs(0))
    for name in ("betas", "alphas_cumprod"):
        np.testing.assert_allclose(getattr(model, name)[...], wanted[f"schedule_1000/{name}"], rtol=1e-6, atol=1e-7)
    for width in (16, 7):
        found = embedded_time(jnp.asarray(given["time_embedding/t"]), width)
        np.testing.assert_allclose(found, wanted[f"time_embedding/dim{width}"], atol=1e-6)


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

    follow(folder.name, name, loss, arrays, *steps_of(folder))


def steps_of(folder: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """A golden's steps, and its outputs."""
    return json.loads((folder / "train_trace.json").read_text()), dict(np.load(folder / "outputs.npz"))


def follow(
    of: str, name: str, loss: Callable[[Any], jax.Array], arrays: dict[str, jax.Array],
    trace: list[dict[str, float]], wanted: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """Take the golden's steps: AdamW, clipping, warm-up, cosine and EMA, as the train step puts them together."""
    optim = OptimConfig(
        lr=1e-3, schedule="cosine", warmup_steps=2, weight_decay=1e-2, beta1=0.9, beta2=0.95, grad_clip=1.0, ema=0.999
    )
    tx, rate = make_optimizer(optim, TrainConfig(), 20), learning_rate_multiplier(optim, 20)
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
            compare(of, f"trace, {quantity}", number_found, step[quantity], bound)
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
