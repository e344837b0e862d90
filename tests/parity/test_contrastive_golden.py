"""Objectives that hold ECGs against text, and their text towers, against the reference's numbers, in float32."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity_log import compare

from elm_jax.config import resolve
from elm_jax.data.batch import ArraySpec, BatchShape, empty_batch
from elm_jax.errors import UserError
from elm_jax.models.encoders import build_encoder, kind_of
from elm_jax.models.encoders.ecg_coca import EcgCocaConfig
from elm_jax.models.functional import Structure, structure_of
from elm_jax.objectives import objective_of
from elm_jax.objectives.contrastive import cosines, info_nce, pairwise_errors, unit
from elm_jax.weights.encoders import from_published, load_encoder, read_checkpoint, to_published

Golden = Callable[[str], Path]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def arrays_of(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "outputs.npz"))


def recipe(name: str, shape: list[int], salt: str) -> np.ndarray:
    """What the recipe of params.json says of a tensor."""
    z = np.random.default_rng(zlib.crc32((salt + name).encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith("running_mean"):
        return np.float32(0.1) * z
    if name.endswith("running_var"):
        return 1 + np.float32(0.2) * np.abs(z)
    if name.endswith("weight") and len(shape) == 1:
        return 1 + np.float32(0.1) * z
    if name.endswith("bias"):
        return np.float32(0.02) * z
    if name.endswith("weight"):
        return z / np.float32(np.sqrt(np.prod(shape[1:])))
    return np.float32(0.1) * z


def structure(name: str, config: dict[str, Any], text: dict[str, Any], frozen: int) -> Structure:
    family = kind_of(name).text
    assert family is not None
    fields = {**config, "text": family.family.fields_of(text, "config.json") | {"frozen": frozen}}
    return structure_of(lambda: build_encoder(name, fields, 1, nnx.Rngs(0)))


@pytest.mark.slow
def test_merl(golden: Golden) -> None:
    folder = golden("ssl_merl")
    told = json.loads((folder / "params.json").read_text())
    named = {t["name"]: t["shape"] for t in told["tensors"] if "_ids" not in t["name"]}
    tensors = {name: recipe(name, shape, told["salt"]) for name, shape in named.items()}
    for tensor in told["tensors"]:
        name = tensor["name"]
        if name in tensors and not name.endswith("num_batches_tracked"):
            assert zlib.crc32(tensors[name].astype("<f4").tobytes()) == tensor["crc32"], name
    # The recipe filled BERT's table of places too, with numbers below 1: all tokens stand at place 0.
    places = tensors["lm.embeddings.position_embeddings.weight"]
    places[:] = places[0]
    form = structure("merl.pretraining", told["cfg"], told["bert_config"], frozen=-1)
    arrays = jax.tree.map(jnp.asarray, from_published("merl.pretraining", form.leaves, tensors))
    given, wanted = arrays_of(folder)
    trained = {n: x for n, x in arrays.items() if not form.leaves[n].statistic}

    def loss(trained: Any, train: bool) -> Any:
        encoder = form.bind({**arrays, **trained})
        features = encoder.narrow_map(jnp.asarray(given["ecg"]), jnp.ones(4), train)
        pooled, views, there = encoder.att_pool(features), encoder.views(features), jnp.ones(4, bool)
        text = encoder.texts(jnp.asarray(given["input_ids"]))
        cma, uma = (jnp.stack(info_nce(x, y, there, 1 / 0.07)).sum() / 4 for x, y in ((pooled, text), views))
        return cma + uma, {"proj_ecg": pooled, "ecg_feat": features.swapaxes(1, 2), "ecg1": views[0], "ecg2": views[1],
                           "text_pooler": encoder.text(jnp.asarray(given["input_ids"])), "proj_text": text,
                           "cma_loss": cma, "uma_loss": uma, "loss_eval": cma + uma}  # fmt: skip

    for train, kind in ((False, "eval"), (True, "train")):
        (value, found), gradients = jax.jit(jax.value_and_grad(lambda x, t=train: loss(x, t), has_aux=True))(trained)
        for name, array in found.items() if not train else ():
            compare("ssl_merl", name, array, wanted[name], 1e-3)
        np.testing.assert_allclose(value, wanted[f"loss_{kind}"], rtol=1e-3 if train else 1e-4)
        ours = to_published("merl.pretraining", gradients)
        theirs = json.loads((folder / f"grad_norms_{kind}.json").read_text())
        for tensor, norm in theirs.items():
            np.testing.assert_allclose(np.linalg.norm(ours[tensor]), norm, rtol=2e-2 if train else 1e-3, err_msg=tensor)


def test_the_loss_of_a_batch(golden: Golden) -> None:
    cases = dict(np.load(golden("ssl_contrastive_loss") / "cases.npz"))
    for case in "012":
        x, y, temperature = (jnp.asarray(cases[f"{case}/{name}"]) for name in ("x", "y", "temperature"))

        def loss(x: Any, y: Any = y, temperature: Any = temperature) -> jax.Array:
            rows, columns = info_nce(x, y, jnp.ones(len(x), bool), 1 / temperature)
            return (rows + columns).sum() / len(x)

        value, gradient = jax.value_and_grad(loss)(x)
        compare("ssl_contrastive_loss", f"{case}/loss", value, cases[f"{case}/loss"], 1e-5)
        compare("ssl_contrastive_loss", f"{case}/grad_x", gradient, cases[f"{case}/grad_x"], 1e-5)


def test_siglip(golden: Golden) -> None:
    folder = golden("ssl_siglip2_ecg")
    told = json.loads((folder / "config.json").read_text())
    sizes = {"seq_len": told["segment_len"], **{name: told[name] for name in ("patch_size", "num_leads")}}
    given, wanted = arrays_of(folder)
    sizes["vision_config"] = told["siglip2"]["vision_config"]
    form = structure("siglip_ecg.pretraining", sizes, told["siglip2"], 0)
    tensors, _ = read_checkpoint(folder / "model.safetensors")
    arrays = jax.tree.map(jnp.asarray, from_published("siglip_ecg.pretraining", form.leaves, tensors))
    back = to_published("siglip_ecg.pretraining", arrays)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in back)

    def loss(arrays: Any) -> Any:
        encoder = form.bind(arrays)
        ecg, text = encoder.ecgs(jnp.asarray(given["signal"])), encoder.texts(jnp.asarray(given["input_ids"]))
        scale, bias = jnp.exp(encoder.log_scale[...]), encoder.bias[...]
        errors = pairwise_errors(text, ecg, jnp.ones(4, bool), scale, bias)
        return errors.sum() / 4, (cosines(text, ecg) * scale + bias, unit(ecg), unit(text))

    (value, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    for name, array in zip(("logits_per_text", "image_embeds", "text_embeds"), found, strict=True):
        np.testing.assert_allclose(array, wanted[name], atol=5e-5, err_msg=name)
    np.testing.assert_allclose(value, wanted["loss"], rtol=2e-5)
    ours = to_published("siglip_ecg.pretraining", gradients)
    theirs = json.loads((folder / "grad_norms.json").read_text())
    assert ours.keys() == theirs.keys()
    for name, norm in theirs.items():
        np.testing.assert_allclose(np.linalg.norm(ours[name]), norm, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", ["vision_clip_eos2", "vision_clip_eos_argfind"])
def test_clip(golden: Golden, case: str) -> None:
    folder = golden(case)
    config = json.loads((folder / "config.json").read_text())
    given, wanted = arrays_of(folder)
    form = structure("clip.pretraining", config, config, 0)
    tensors, _ = read_checkpoint(folder / "model.safetensors")
    arrays = jax.tree.map(jnp.asarray, from_published("clip.pretraining", form.leaves, tensors))
    encoder = form.bind(arrays)
    ecg, text = encoder.ecgs(jnp.asarray(given["pixel_values"])), encoder.texts(jnp.asarray(given["input_ids"]))
    np.testing.assert_allclose(unit(ecg), wanted["image_embeds"], atol=2e-5)
    np.testing.assert_allclose(unit(text), wanted["text_embeds"], atol=2e-5)


def test_coca(golden: Golden) -> None:
    folder = golden("ssl_ecg_coca")
    told = json.loads((folder / "config.json").read_text())
    ecg_cfg, decoder = told["ecg_cfg"], told["multimodal_cfg"]
    sizes = {
        "num_leads": ecg_cfg["lead_num"], "seq_len": ecg_cfg["seq_length"], "embed_dim": told["embed_dim"],
        "heads": ecg_cfg["width"] // ecg_cfg["head_width"], "decoder_layers": decoder["layers"],
        "decoder_heads": decoder["heads"], "caption_vocab": told["text_cfg"]["vocab_size"], "sees_answers": True,
        **{name: ecg_cfg[name] for name in ("patch_size", "width", "layers")},
    }  # fmt: skip
    name = "ecg_coca.pretraining"
    form = structure(name, sizes, told["bert_config"], 0)
    with pytest.raises(UserError, match=r"encoder\.config\.caption_vocab: found 89; expected 90 at least"):
        structure(name, sizes | {"caption_vocab": 89}, told["bert_config"], 0)
    tensors, _ = read_checkpoint(folder / "model.safetensors")
    arrays = jax.tree.map(jnp.asarray, from_published(name, form.leaves, tensors))
    back = to_published(name, arrays)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[n], tensors[n]) for n in back)
    given, wanted = arrays_of(folder)
    ids = jnp.asarray(given["text"])
    batch = empty_batch(BatchShape(ids.shape[1], 1, 1), {"ecg": ArraySpec(given["ecg"].shape[1:])}, len(ids))
    batch.signals["ecg"][:, 0], batch.tokens[:], batch.signal_weights[:] = given["ecg"], ids, 1
    objective = objective_of(resolve({
        "objective": "coca", "encoder": {"name": "ecg_coca"}, "data": {"max_len": ids.shape[1]}, "update": ["encoder"],
    }))  # fmt: skip

    def loss(arrays: Any) -> Any:
        encoder = form.bind(arrays)
        sums = objective.loss(cast(Any, SimpleNamespace(encoder=encoder)), batch, None, {"encoder"})
        counts = objective.counts(batch)
        means = {n: x / counts[n] for n, x in sums.items()}
        ecg, memory = encoder.both(jnp.asarray(given["ecg"]))
        return means["loss"], (means, ecg, encoder.texts(ids), encoder.captions(ids, memory))

    (value, (means, ecg, text, logits)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    np.testing.assert_allclose(unit(ecg), wanted["ecg_features"], atol=2e-5)
    np.testing.assert_allclose(unit(text), wanted["text_features"], atol=2e-5)
    np.testing.assert_allclose(logits, wanted["logits"], atol=1e-4)
    np.testing.assert_allclose(means["contrastive"], wanted["contrastive_loss"], rtol=2e-5)
    np.testing.assert_allclose(2 * means["caption"], wanted["caption_loss_times_2"], rtol=2e-5)
    np.testing.assert_allclose(value, wanted["contrastive_loss"] + wanted["caption_loss_times_2"], rtol=2e-5)
    ours, theirs = to_published(name, gradients), json.loads((folder / "grad_norms.json").read_text())
    assert ours.keys() == theirs.keys()
    for tensor, norm in theirs.items():
        np.testing.assert_allclose(np.linalg.norm(ours[tensor]), norm, rtol=1e-3, atol=1e-5, err_msg=tensor)
    # What the reference does lets a token be seen before it is written; ours does not.
    plain = structure(name, sizes | {"sees_answers": False}, told["bert_config"], 0).bind(arrays)
    other, (_, memory) = ids.at[:, 4].set(7), plain.both(jnp.asarray(given["ecg"]))
    seen, changed = plain.captions(ids, memory), plain.captions(other, memory)
    np.testing.assert_array_equal(seen[:, :4], changed[:, :4])
    assert np.abs(np.asarray(seen[:, 4] - changed[:, 4])).max() > 1e-3


def test_the_tower_of_coca(golden: Golden) -> None:
    folder = golden("encoder_tiny_ecg_coca")
    told = json.loads((folder / "config.json").read_text())
    ecg_cfg = told["ecg_cfg"]
    sizes = {"num_leads": ecg_cfg["lead_num"], "seq_len": ecg_cfg["seq_length"], "embed_dim": told["embed_dim"],
             "heads": told["heads"], **{name: ecg_cfg[name] for name in ("patch_size", "width", "layers")}}  # fmt: skip
    given, wanted = arrays_of(folder)
    encoder = load_encoder("ecg_coca", folder / "model.safetensors", tokens=11, **sizes)
    compare("encoder_tiny_ecg_coca", "gem_tokens", encoder(given["ecg"]), wanted["gem_tokens"], 3e-5)
    full, names = EcgCocaConfig(), json.loads((folder / "names.json").read_text())["tensors"]
    leaves = structure_of(lambda: build_encoder("ecg_coca", {}, 1, nnx.Rngs(0))).leaves
    rules = {ours: kind_of("ecg_coca").weight_rule(ours) for ours in leaves}
    shapes = {n: rule.their_shape(leaves[o].shape) for o, rule in rules.items() for n in rule.names(leaves[o].shape)}
    assert {n.removeprefix("ecg."): list(shape) for n, shape in shapes.items()} == names and full.patches == 100
