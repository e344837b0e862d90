"""Small text towers with random weights and a tokenizer of letters and digits, as Hugging Face folders."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elm_jax.models.encoders.text_tower import TextConfig, TextFamily, TextTower
from elm_jax.models.functional import structure_of

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


def bert_folder(folder: Path, family: TextFamily, **changes: Any) -> Path:
    """A tiny BERT with its tokenizer in a folder."""
    tokenizer = letters()
    config = {"model_type": "bert", **SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, **changes}
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(family, family.fields_of(config, "config.json")), folder / "model.safetensors")
    return folder
