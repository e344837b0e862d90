"""Small text towers with random weights and a tokenizer of letters and digits, as Hugging Face folders."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elm_jax.models.encoders import build_encoder, kind_of
from elm_jax.models.encoders.text_tower import BERT, TextConfig, TextFamily, TextTower
from elm_jax.models.functional import structure_of
from elm_jax.weights.encoders import to_published

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 40, "type_vocab_size": 2,
}  # fmt: skip
CONTROLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters."""
    characters = string.ascii_lowercase + string.digits
    tokens = [*CONTROLS, *characters, *(f"##{c}" for c in characters)]
    backend = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), CONTROLS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def tensors_of(family: TextFamily, fields: dict[str, Any], seed: int = 0, before: str = "") -> dict[str, np.ndarray]:
    """Random weights of a tower under its own names."""
    leaves = structure_of(lambda: TextTower(TextConfig.from_fields(fields), rngs=nnx.Rngs(0))).leaves
    rng, found = np.random.default_rng(seed), {}
    for name, leaf in leaves.items():
        rule = family.rule(name, before)
        for theirs in rule.names(leaf.shape):
            values = 0.2 * rng.standard_normal(rule.their_shape(leaf.shape), dtype=np.float32)
            found[theirs] = values + np.float32(theirs.endswith("weight") and values.ndim == 1)
    return found


def bert_folder(folder: Path) -> Path:
    """A tiny BERT with its tokenizer in a folder."""
    config = {"model_type": "bert", **SIZES, "vocab_size": len(letters()), "pad_token_id": 0}
    return _folder(folder, config, tensors_of(BERT, BERT.fields_of(config, "config.json")))


def pair_folder(folder: Path, name: str) -> Path:
    """A tiny SigLIP 2 or CLIP, images and text, with its tokenizer in a folder. `name`: siglip2 or clip."""
    sizes = {**SIZES, "vocab_size": 100, "pad_token_id": 0, "eos_token_id": 3}  # transformers adds controls of its own
    vision = {n: SIZES[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    vision |= {"patch_size": 8, **({"num_patches": 16} if name == "siglip2" else {"image_size": 16})}
    config = {"model_type": name, "text_config": {"model_type": f"{name}_text_model", **sizes}, "vision_config": vision}
    config |= {"projection_dim": 24} if name == "clip" else {}
    paired = kind_of(f"{name}.pretraining").text
    assert paired is not None
    fields = {**config, "text": paired.family.fields_of(config, "config.json")}
    built = build_encoder(f"{name}.pretraining", fields, 1, nnx.Rngs(0))
    structure = structure_of(lambda: build_encoder(f"{name}.pretraining", fields, 1, nnx.Rngs(0)))
    return _folder(folder, config, to_published(f"{name}.pretraining", jax.device_get(structure.arrays(built))))


def _folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    letters().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder
