"""What a Hugging Face folder has beside the weights: configuration, generation configuration, tokenizer, licence."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from elm_jax.assemble import Assembly
from elm_jax.exchange.chat_template import chat_template
from elm_jax.models.families import to_hf
from elm_jax.text.render import stop_ids

_DTYPE_KEYS = ("dtype", "torch_dtype")  # of newer and of older configurations
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
GENERATION = "generation_config.json"


def write_config(folder: Path, assembly: Assembly, dtypes: Iterable[np.dtype], as_it_came: bool) -> None:
    """Write config.json, where there was one as it was but for the size of the vocabulary and the dtype.

    `as_it_came`: the weights are those of the folder that the run names, so that its dtype holds too.
    """
    source, rows = assembly.llm_folder, assembly.llm.vocab_size
    dtype = str(functools.reduce(jnp.promote_types, dtypes))
    if source is None:
        content = {**to_hf(assembly.llm), "dtype": dtype, **_token_ids(assembly)}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return
    text = (source / "config.json").read_text(encoding="utf-8")
    changes: dict[str, Any] = {} if as_it_came else dict.fromkeys(_DTYPE_KEYS, dtype)
    (folder / "config.json").write_text(edited(text, {"vocab_size": rows, **changes}), encoding="utf-8")


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a JSON object with other values of those of these keys that it has; nothing else of it changes."""
    wanted = json.loads(text)
    changes = {key: value for key, value in changes.items() if key in wanted and wanted[key] != value}
    wanted |= changes
    for key, value in changes.items():
        said = json.dumps(value)
        text = re.sub(rf'("{key}"\s*:\s*)("[^"]*"|[^\s,}}]+)', lambda match, said=said: match[1] + said, text, count=1)
    # A key of the same name within another value may have come first.
    return text if json.loads(text) == wanted else json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"


def write_companions(folder: Path, assembly: Assembly) -> str:
    """The tokenizer with its added tokens and the run's chat template, the generation configuration, the base's
    licences. Returns why there is no chat template, or "".

    A template that the tokenizer came with does not stay: it asks otherwise than the run has trained.
    """
    tokenizer, source = assembly.tokenizer, assembly.llm_folder
    given = tokenizer.chat_template
    tokenizer.chat_template, reason = chat_template(assembly.text, tokenizer)
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = given
    if source is not None and (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    else:
        content = {"do_sample": False, **_token_ids(assembly)}
        content["eos_token_id"] = list(stop_ids(tokenizer, assembly.text.family))
        (folder / GENERATION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in [] if source is None else [file for pattern in _LICENCES for file in source.glob(pattern)]:
        shutil.copyfile(file, folder / file.name)
    return reason


def _token_ids(assembly: Assembly) -> dict[str, int]:
    ids = {f"{name}_token_id": getattr(assembly.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {name: value for name, value in ids.items() if value is not None}
