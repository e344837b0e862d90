"""GEM and PULSE against their references: images in tiles, both towers, what the LLM reads, and three steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity_log import compare, record

from elm_jax.config import resolve
from elm_jax.data.batch import ArraySpec, Batch, BatchShape, Conversation, Group, collate
from elm_jax.data.pages import image_layout
from elm_jax.data.shown import Views
from elm_jax.ecg import tiles
from elm_jax.ecg.images import CLIP, process
from elm_jax.exchange.reference import Kinds, reference_of
from elm_jax.inference.generate import generate
from elm_jax.models.connectors import build_connector
from elm_jax.models.decoder import Decoder
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import build_encoder, kind_of
from elm_jax.models.families import scratch_config
from elm_jax.models.functional import Arrays, Structure, structure_of
from elm_jax.text.render import Rendered
from elm_jax.training.optim import make_optimizer
from elm_jax.training.step import loss_and_gradients
from elm_jax.weights import llava
from elm_jax.weights.safetensors import Safetensors

Golden = Callable[[str], Path]
PLACEHOLDER, PROJECTION = -200, ("connector.ecg", "connector.image", "connector", "llm")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
         "hidden_act", "layer_norm_eps", "projection_dim")  # fmt: skip


@dataclass(frozen=True)
class Model:
    structure: Structure
    arrays: Arrays
    rules: Mapping[str, Any]  # of LLaVA's names

    @property
    def elm(self) -> ELM:
        return self.structure.bind(self.arrays)

    def published(self, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found = {}
        for ours, array in arrays.items():
            rule, x = self.rules[ours], np.asarray(array)
            found |= dict(zip(rule.names(x.shape), rule.restore(x), strict=True))
        return found


def model(folder: Path, told: Mapping[str, Any], llm: Mapping[str, Any], merge: str = "flat", **image: Any) -> Model:
    """The golden's whole model, of both views or of the image alone, from its own tensors."""
    encoders = {"image": ("clip_patches", {name: told["vision"][name] for name in SIZES} | {"merge": merge} | image)}
    if "ecg_cfg" in told:
        ecg = told["ecg_cfg"]
        sizes = {"num_leads": ecg["lead_num"], "seq_len": ecg["seq_length"], "heads": ecg["width"] // ecg["head_width"]}
        sizes |= {name: ecg[name] for name in ("layers", "width", "patch_size")} | {"embed_dim": told["ecg_embed_dim"]}
        encoders = {"ecg": ("ecg_coca", sizes), **encoders}
    sizes = {"ecg": 6, "image": len(kind_of("clip_patches").config(encoders["image"][1]).order)}

    config = scratch_config({"family": "llama", "tied": False, **llm}, 1)

    def build() -> ELM:
        rngs, f32 = nnx.Rngs(0), jnp.dtype(jnp.float32)
        built: dict[str, Any] = {
            view: build_encoder(name, fields, sizes[view], rngs) for view, (name, fields) in encoders.items()
        }
        decoder = Decoder(config, rngs)
        after = build_connector("mlp", built["image"].width, decoder.config.hidden, rngs=rngs,
                                newlines=built["image"].newlines)  # fmt: skip
        if len(built) == 1:
            return ELM(built["image"], after, decoder, f32)
        before = build_connector("linear", built["ecg"].width, built["image"].width, rngs=rngs)
        return ELM(built, {"ecg": before, "image": after}, decoder, f32, (), {"ecg": "image"})

    structure, several = structure_of(build), len(encoders) > 1
    kinds = Kinds(
        config, {f"encoder.{v}" if several else "encoder": name for v, (name, _) in encoders.items()},
        {"connector.ecg": "linear", "connector.image": "mlp"} if several else {"connector": "mlp"},
    )  # fmt: skip
    table = reference_of(structure.leaves, kinds, structure.leaves["llm.embedding.table"].shape[0])
    rules = {ours: llava.their_rule(rule) for ours, rule in table.rules.items()}
    tensors = Safetensors(folder / "model.safetensors")
    unread = {llava.NEWLINE} - {name for rule in rules.values() for name in (rule.theirs,)}
    for name in tensors.keys() - unread:  # and back
        assert llava.our_name(name, several) in table.expected()
    arrays = {
        ours: jnp.asarray(rule.arrange([np.asarray(tensors[n]) for n in rule.names(structure.leaves[ours].shape)]))
        for ours, rule in rules.items()
    }
    assert {n for ours, rule in rules.items() for n in rule.names(arrays[ours].shape)} == tensors.keys() - unread
    return Model(structure, arrays, rules)


def conversation(ids: np.ndarray, labels: np.ndarray, width: int, ecgs: list[dict[str, Any]]) -> Conversation:
    """A row of a golden, with a place for each embedding where its placeholder is."""
    (places,) = np.nonzero(ids == PLACEHOLDER)
    repeats = np.where(ids == PLACEHOLDER, width, 1)
    kept, learnt = np.repeat(np.maximum(ids, 0), repeats), np.repeat(labels >= 0, repeats)
    positions = places[:, None] + np.arange(width)[None]
    return Conversation(0, kept.astype(np.int32), learnt, positions.astype(np.int32), ecgs[: len(places)])


def embedded(elm: ELM, batch: Batch) -> np.ndarray:
    signals, weights = jax.tree.map(jnp.asarray, (batch.signals, batch.signal_weights))
    return np.asarray(elm.inputs(batch.tokens, batch.signal_slot, elm.signal_embeddings(signals, weights)))


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def gem(golden: Golden) -> tuple[Path, Model, Batch]:
    folder = golden("gem_fusion")
    told, given = read(folder, "config.json"), np.load(folder / "inputs.npz")
    own = told["llm"]
    llm = {"hidden": own["H"], "layers": own["L"], "heads": own["nh"], "mlp": own["I"], "vocab_size": own["V"]}
    ours = model(folder, told, llm | {"norm_eps": own["rms_norm_eps"], "max_len": 64}, fit="crop")
    rows = []
    for ids, labels, seen, ecg, image in zip(*(given[n] for n in ("input_ids", "labels", "attention_mask", "ecgs",
                                                                 "images")), strict=True):  # fmt: skip
        shown = [{"ecg": ecg, "image": image.transpose(1, 2, 0)}]
        rows.append([Group(0, [conversation(ids[seen == 1], labels[seen == 1], 15, shown)])])
    layout = {"ecg": ArraySpec(given["ecgs"].shape[1:]), "image": ArraySpec((42, 42, 3))}
    return folder, ours, collate(rows, BatchShape(30, 1, 16), layout)


def test_gem_reads_both_and_answers_as_its_reference(gem: tuple[Path, Model, Batch]) -> None:
    folder, ours, batch = gem
    wanted, elm = np.load(folder / "outputs.npz"), ours.elm
    seen = wanted["merged_attention_mask"] == 1
    np.testing.assert_array_equal(batch.group_ids > 0, seen)
    compare("gem_fusion", "merged embeddings", embedded(elm, batch)[seen], wanted["merged_embeds"][seen], 1e-5)
    logits = jax.jit(lambda: elm.llm.logits(elm.hidden(batch)))()
    compare("gem_fusion", "logits", np.asarray(logits)[seen], wanted["logits_valid"], 2e-5)
    trained = {name: x for name, x in ours.arrays.items() if ours.structure.leaves[name].is_of(PROJECTION)}
    frozen = {name: x for name, x in ours.arrays.items() if name not in trained}
    micro = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    step = jax.jit(lambda x: loss_and_gradients(ours.structure, x, {}, frozen, micro)[:2])
    loss, gradients = step(trained)
    compare("gem_fusion", "loss", loss, wanted["loss"], 2e-5)
    named, norms, some = ours.published(gradients), read(folder, "grad_norms.json"), np.load(folder / "grads.npz")
    for name in some.files:
        compare("gem_fusion", f"gradient of {name}", named[name], some[name], 1e-4)
    assert norms.keys() <= named.keys()
    for name, norm in norms.items():
        error = abs(float(np.linalg.norm(named[name])) - norm) / norm
        record("gem_fusion", f"norm of the gradient of {name}", error, 1e-3)
    optim = {"lr": 1e-3, "beta2": 0.999, "weight_decay": 0.0, "grad_clip": 1.0, "warmup_ratio": 0.0}
    config = resolve({"optim": optim, "train": {"batch_size": 4}})
    tx = make_optimizer(config.optim, config.train, 3, {name: False for name in trained})
    state, trace = tx.init(trained), read(folder, "train_trace.json")["steps"]
    for number, each in enumerate(trace):
        loss, gradients = step(trained)
        compare("gem_fusion", f"loss of step {number}", loss, each["loss"], 5e-5)
        norm = optax.tree.norm(gradients)
        compare("gem_fusion", f"gradient norm of step {number}", norm, each["grad_norm_before_clip"], 1e-3)
        clipped = jax.tree.map(lambda g, norm=norm: g * jnp.minimum(1.0, 1.0 / norm), gradients)
        updates, state = tx.update(clipped, state, trained)
        trained = optax.apply_updates(trained, updates)
    found = ours.published(dict(trained))  # type: ignore[arg-type]
    for name, theirs in (("ecg_projector.weight", "ecg_projector_weight"), ("mm_projector.0.weight",) * 2):
        compare("gem_fusion", f"{name} after them", found[f"model.{name}"], wanted[f"final_{theirs}"], 1e-4)


def test_gem_writes_what_its_reference_writes(gem: tuple[Path, Model, Batch]) -> None:
    folder, ours, batch = gem
    wanted = np.load(folder / "outputs.npz")["generated_rows_0_3"]
    x, mask = embedded(ours.elm, batch)[[0, 3]], (batch.group_ids > 0)[[0, 3]]
    said = generate(ours.elm.llm, inputs_embeds=jnp.asarray(x), attention_mask=jnp.asarray(mask), max_new_tokens=12)
    np.testing.assert_array_equal(said, wanted)


def test_what_is_left_out_or_swapped_is_a_sequence_without_it(gem: tuple[Path, Model, Batch]) -> None:
    """The other view alone, or first, stands in the places: as if nothing else had ever been there."""
    folder, ours, _ = gem
    given = np.load(folder / "inputs.npz")
    views, elm = Views({"ecg": 6, "image": 9}), ours.elm
    ecg, image = given["ecgs"][0], given["images"][0].transpose(1, 2, 0)
    layout = {"ecg": ArraySpec(ecg.shape), "image": ArraySpec(image.shape)}
    parts = elm.signal_embeddings({"ecg": ecg[None, None], "image": image[None, None]}, jnp.ones((1, 1)))[0]
    ids, labels = given["input_ids"][0], given["labels"][0]
    before, after = np.split(elm.llm.embed(jnp.asarray(ids[ids != PLACEHOLDER])[None], elm.dtype)[0], [6])
    for shown, own in (
        ({"image": image}, parts[6:]), ({"ecg": ecg}, parts[:6]),
        ({"image": image, "ecg": ecg}, jnp.concatenate([parts[6:], parts[:6]])),
    ):  # fmt: skip
        whole = conversation(ids, labels, 15, [shown])
        fitted = views.fitted(Rendered("", whole.ids, whole.supervised, whole.signal_positions, 0, 21), [shown])
        length = 15 + len(own)
        assert len(fitted.ids) == length and fitted.supervised.sum() == whole.supervised.sum()
        assert fitted.signal_end == 6 + len(own) and views.fitted(fitted, [shown]).ids.tolist() == fitted.ids.tolist()
        one = Conversation(0, fitted.ids, fitted.supervised, fitted.signal_positions, [shown])
        batch = collate([[Group(0, [one])]], BatchShape(30, 1, 16), layout)
        found = embedded(elm, batch)[0, :length]
        np.testing.assert_allclose(found, jnp.concatenate([before, own, after]), atol=1e-6)


def test_the_rules_for_tiles_hold_for_pages_of_any_size(golden: Golden) -> None:
    rules = read(golden("llava_anyres"), "rules_336.json")
    grids = [(height, width) for width, height in rules["pinpoints_w_h"]]
    for case in rules["cases"]:
        width, height = case["size_w_h"]
        assert list(tiles.grid_of((height, width), grids)) == case["best_w_h"][::-1], case
        lines = tiles.order((height, width), 336, grids, 24, "spatial_unpad")
        assert len(lines) == case["tokens_spatial_unpad"], case
        assert (lines == tiles.NEWLINE).sum() == case["unpadded_h_w"][0], case
        assert len(tiles.order((height, width), 336, grids, 24, "flat")) == case["tokens_flat"], case


@pytest.mark.parametrize("merge", tiles.MERGES)
def test_pulse_reads_tiles_as_its_reference(golden: Golden, merge: str) -> None:
    folder = golden("llava_anyres")
    told, given, wanted = read(folder, "config.json"), np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    grids = told["image_grid_pinpoints"]
    own = told["llm"]
    llm = {"hidden": 32, "layers": 2, "heads": 4, "mlp": 64, "vocab_size": 96, "norm_eps": own["rms_norm_eps"]}
    for number in range(4):
        image, name = given[f"image{number}_uint8"], f"{merge}/embeds"
        fields = {"merge": merge, "fit": "anyres", "grids": [[n // 32 for n in grid] for grid in grids]}
        fields |= {"page": image.shape[:2]}
        if number == 2:
            fields |= {"page": (50, 50)}
        processing = kind_of("clip_patches").image_processing({n: told["vision"][n] for n in SIZES} | fields, ())
        assert processing is not None
        cut = np.asarray(process(image, processing))
        assert image_layout(processing) == ArraySpec(cut.shape, np.uint8)
        normal = (cut / 255 - np.array(CLIP.mean)) / np.array(CLIP.std)
        np.testing.assert_allclose(normal.transpose(0, 3, 1, 2), wanted[f"image{number}_tiles"], atol=1e-5)
        grid = tiles.on_grid(image, tiles.grid_of(image.shape[:2], [(h, w) for w, h in grids]), CLIP.resample)
        np.testing.assert_array_equal(grid, wanted[f"image{number}_padded_uint8"])
        if number not in (0, 2):
            continue  # two shapes are enough of what is compiled
        ours = model(folder, told, llm, **fields)
        ids, labels = given["input_ids"][number], given["labels"][number]
        ids = ids[: int((ids != 0).sum())]
        shown = conversation(ids, labels[: len(ids)], ours.elm.encoder.tokens, [{"image": cut}])
        batch = collate([[Group(0, [shown])]], BatchShape(len(shown.ids), 1, 8), {"image": image_layout(processing)})
        compare("llava_anyres", f"{name} {number}", embedded(ours.elm, batch)[0],
                wanted[name][number][wanted[f"{merge}/attention_mask"][number] == 1], 1e-5)  # fmt: skip
