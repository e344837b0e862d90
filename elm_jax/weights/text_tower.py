"""Text towers in Hugging Face folders: their sizes, their tokenizer, their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import UserError
from elm_jax.folders import read_json
from elm_jax.keys import SslConfig
from elm_jax.models.encoders import kind_of
from elm_jax.models.encoders.text_tower import TEXT, WHERE, TextConfig
from elm_jax.text.vocabulary import TOKENIZER_FILES, load_tokenizer
from elm_jax.weights.encoders import FOLDER_FILES
from elm_jax.weights.files import HF_FOLDER, TORCH_WHOLE, download, is_repository, open_tensors
from elm_jax.weights.published import Published, match
from elm_jax.weights.safetensors import Safetensors
from elm_jax.weights.torch_file import TorchFile


def read_text_tower(name: str, ssl: SslConfig, max_len: int) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of `ssl.text`, and the fields of its tower, as the encoder `name` is pretrained against it.

    Raises:
        UserError: it is no such tower, the tokenizer is not that of its weights, or data.max_len exceeds its context.
    """
    paired, folder = kind_of(name).text, text_tower_folder(ssl.text)
    assert paired is not None
    fields = paired.family.fields_of(read_json(folder / "config.json", HF_FOLDER), str(folder))
    fields["frozen"] = paired.frozen if ssl.frozen_layers is None else ssl.frozen_layers
    sizes = TextConfig.from_fields(fields)
    if max_len > sizes.longest:
        expected, fix = f"at most the tower's context, {sizes.longest}", f"set --config.data.max_len={sizes.longest}"
        raise UserError("data.max_len", str(max_len), expected, fix)
    tokenizer = load_tokenizer(folder, WHERE)
    pad, largest = tokenizer.pad_token_id, max(tokenizer.get_vocab().values(), default=0)
    if pad is None or largest >= sizes.vocab_size or (sizes.of_bert and pad != sizes.pad_token_id):
        found = f"{folder} with a tokenizer of ids up to {largest} and padding {pad}"
        expected = f"that of its weights: ids below {sizes.vocab_size}"
        expected += f", and padding {sizes.pad_token_id}" if sizes.of_bert else ", and a padding"
        raise UserError(WHERE, found, expected, "give a folder with its own tokenizer")
    return tokenizer, {**fields, "pad_token_id": pad}  # what config.json says of it is wrong for SigLIP 2


def open_text_tower(name: str, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Published:
    """The arrays of the text tower ("text.words.table") that an encoder is pretrained against, in its own folder.

    Raises:
        UserError: tensors are missing there, or are unlike; by name.
    """
    paired = kind_of(name).text
    assert paired is not None
    mine = {ours: shape for ours, shape in shapes.items() if ours.startswith(TEXT)}
    rules = [replace(paired.family.rule(ours.removeprefix(TEXT)), ours=ours) for ours in mine]
    tensors = open_tensors(folder, WHERE)
    if not isinstance(tensors, Safetensors | TorchFile):
        tensors = {key: np.asarray(x) for key, x in tensors.items()}
    named = {key: theirs for key in tensors if (theirs := paired.family.own_name(key, paired.pool)) is not None}
    fix = "give the folder of a whole model of this kind"
    return match(str(folder), "this text tower", fix, rules, mine, tensors, named)


def text_tower_folder(name: str | None) -> Path:
    """The local folder of `ssl.text`, downloaded if it is an id of the hub.

    Raises:
        UserError: it is neither, or not given.
    """
    if name is None:
        expected = "a Hugging Face folder or id of a text tower with its tokenizer"
        raise UserError(WHERE, "nothing", expected, f"set --config.{WHERE}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_repository(name):
        raise UserError(WHERE, f"{name}, which is no folder", "a folder, or owner/name of the hub", "correct it")
    folder = download(name, WHERE, [*FOLDER_FILES, *TOKENIZER_FILES])
    return folder if list(folder.glob("*.safetensors")) else download(name, WHERE, [TORCH_WHOLE])
