"""The table of the reference's names: complete, and read in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llms import TINY, tiny_config

from elm_jax.exchange.reference import Kinds, Reference, reference_of
from elm_jax.models.connectors import RULES, SIGNAL_KINDS, build_connector, build_signal_connector
from elm_jax.models.decoder import Decoder
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import ENCODERS, build_encoder
from elm_jax.models.functional import Leaf, structure_of
from elm_jax.models.lora import LoraSpec, add_lora
from elm_jax.weights.published import match

LEADS, SAMPLES, TOKENS, ROWS = 3, 64, 2, 50
LLM = {"llm.embedding.table": Leaf((64, 4), None, (), False)}  # no more of it where only the encoder matters
ENCODER_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "merl": {"resnet_type": "resnet18", "width": 8, "num_leads": LEADS},
    **{
        name: {"seq_len": SAMPLES, "patch_size": patch, "num_leads": LEADS, "embed_dim": 16, "depth": 2,
               "num_heads": 1, "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}
        for name, patch in (("st_mem", 16), ("mtae", 16), ("mlae", 1))
    },
}  # fmt: skip


def leaves_of(family: str, encoder: str | None, connector: str | None, lora: bool = False) -> Mapping[str, Leaf]:
    config = tiny_config(family)

    def build() -> ELM:
        rngs = nnx.Rngs(0)
        decoder = Decoder(config, rngs)
        if lora:
            add_lora(decoder, LoraSpec(2, 4.0), rngs)
        if connector is None:
            return ELM(None, None, decoder, jnp.dtype(jnp.float32))
        if connector in SIGNAL_KINDS:
            bridge = build_signal_connector(connector, LEADS, SAMPLES, TOKENS, config.embedding, rngs=rngs)
            return ELM(None, bridge, decoder, jnp.dtype(jnp.float32))
        assert encoder is not None
        tower = build_encoder(encoder, ENCODER_FIELDS[encoder], TOKENS, rngs)
        return ELM(
            tower, build_connector(connector, tower.width, config.embedding, rngs=rngs), decoder, jnp.dtype(jnp.float32)
        )  # type: ignore[arg-type]

    return structure_of(build).leaves


MODELS: Mapping[str, tuple[Any, ...]] = {
    **{f"{family}, symbols": (family, None, None) for family in TINY},
    **{f"{family}, patch, LoRA": (family, None, "patch", True) for family in TINY},
    **{f"{encoder}, linear": ("llama", encoder, "linear") for encoder in ENCODER_FIELDS},
    **{f"{kind} connector": ("qwen2", "merl" if kind not in SIGNAL_KINDS else None, kind) for kind in RULES},
}


def kinds(family: str, encoder: str | None, connector: str | None) -> Kinds:
    parts = {"encoder": encoder} if encoder else {}, {"connector": connector} if connector else {}
    return Kinds(tiny_config(family), *parts)


def table(family: str, encoder: str | None, connector: str | None, lora: bool = False) -> Reference:
    return reference_of(leaves_of(family, encoder, connector, lora), kinds(family, encoder, connector), ROWS)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_our_arrays_come_back_from_the_references_tensors(model: tuple[Any, ...]) -> None:
    reference, rng = table(*model), np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    arrays = {}
    for ours, leaf in leaves_of(*model).items():
        arrays[ours] = rng.random(leaf.shape, np.float32)
        part = arrays[ours][tuple(slice(0, size) for size in reference.shapes[ours])]
        pairs = dict(zip(reference.names(ours), reference.rules[ours].restore(part), strict=True))
        assert not pairs.keys() & tensors.keys()
        tensors |= pairs
    shapes = {name: shape for name, shape in reference.expected().items() if name in tensors}
    assert {name: x.shape for name, x in tensors.items()} == shapes
    assert set(reference.expected()) == {*tensors, *reference.aliases, *reference.counters}
    found = match("f", "it", "", reference.rules.values(), reference.shapes, tensors, {n: n for n in tensors})
    for ours, array in arrays.items():
        back = found.read(ours)
        assert back.shape == reference.shapes[ours]
        assert np.array_equal(back, array[tuple(slice(0, size) for size in back.shape)]), ours


def test_vocabulary_tables_alone_are_cut() -> None:
    leaves, reference = leaves_of("llama", None, None), table("llama", None, None)
    other = {ours for ours, shape in reference.shapes.items() if shape != leaves[ours].shape}
    assert other == {"llm.embedding.table", "llm.head.kernel"}
    expected = reference.expected()
    for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        assert expected[name] == (ROWS, 32)


@pytest.mark.parametrize("name", ["merl", "mtae", "mlae", "st_mem"])
def test_the_names_of_a_whole_encoder_are_the_references(name: str, golden: Callable[[str], Path]) -> None:
    """Counters of batch norms and tensors under two names too."""
    models = json.loads((golden(f"encoder_full_{name}") / "params.json").read_text())["models"]
    facts = models[max(models, key=lambda length: int(length) if length.isdigit() else 0)]
    config = {} if name == "merl" else facts["cfg"]
    config = {field: value for field, value in config.items() if field not in ("num_encoder_tokens",)}
    leaves = structure_of(lambda: build_encoder(name, config, 1, nnx.Rngs(0))).leaves
    leaves = {f"encoder.{own}": leaf for own, leaf in leaves.items()} | LLM
    found = reference_of(leaves, kinds("llama", name, "linear"), ROWS).expected()
    theirs = {f"encoder.{tensor['name']}": tuple(tensor["shape"]) for tensor in facts["tensors"]}
    shapes = {n: shape for n, shape in found.items() if n.startswith("encoder.")}
    aliases = {f"encoder.{second}" for second in facts.get("state_dict_aliases") or {}}
    assert {n: shapes[n] for n in theirs} == theirs
    assert set(shapes) - set(theirs) == aliases


def test_every_encoder_is_in_the_table() -> None:
    """Those of images are a Hugging Face model in a module of the reference's."""
    # The reference, or another, pretrains these, and has no model with one.
    of_no_elm = {"mae_vit", "nepa", "merl_vit", "next_token", "dit", "dit_text", "ecg_coca", "mlp_mixer"}
    of_no_elm |= {"clip_patches", "resnet18_any", "dinov2", "siglip", "orah", "signal2vec"}
    assert {"clip", "siglip2", "vit", "siglip_ecg", *of_no_elm, *ENCODER_FIELDS} == set(ENCODERS)
    leaves = {"encoder.cls": Leaf((8,), None, (), False), **LLM}
    assert reference_of(leaves, kinds("llama", "clip", "linear"), ROWS).names("encoder.cls") == [
        "encoder.vision_encoder.vision_model.embeddings.class_embedding"
    ]
