"""Run folders made without training: what a run of no steps would have left, around weights that a test gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from jax.sharding import SingleDeviceSharding
from parity import e2e
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elm_jax.assemble import assemble
from elm_jax.cli import guard
from elm_jax.config import Config, resolve
from elm_jax.elms import ELMS
from elm_jax.run import folder as run
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.weights import TrainedWeights, Weights, frozen_fingerprints
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.text.render import THINK_TOKENS
from elm_jax.training.state import split_names
from elm_jax.weights.safetensors import Safetensors, save_safetensors

ADDED = 1 + len(THINK_TOKENS)  # tokens that a run of phase sft adds
ENCODER = e2e.ENCODER_FOLDER
Golden = Callable[[str], Path]


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words and special tokens, without a chat template."""
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(size - 3))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )


def llm_folder(
    source: Path, target: Path, tokens: int = 512 - ADDED, dtype: str = "float32", config: str = "config.json"
) -> Path:
    """The LLM of a golden with a tokenizer of `tokens` tokens; its weights cast to `dtype`, its files as they are."""
    target.mkdir(parents=True)
    for file in source.glob("*.safetensors*"):
        if file.suffix == ".json":
            shutil.copyfile(file, target / file.name)
        else:
            kept = Safetensors(file)
            save_safetensors(target / file.name, {n: x.astype(jax.numpy.dtype(dtype)) for n, x in kept.items()})
    text = (source / config).read_text().replace('"float32"', json.dumps(dtype))
    (target / "config.json").write_text(text)
    shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    word_tokenizer(tokens).save_pretrained(target)
    return target


def settings(elm: str, llm: Path, **changes: Any) -> dict[str, Any]:
    """Keys of a run on this LLM in float32; `changes` are keys with `__` for the dot."""
    kind = ELMS[elm]["ecg"].connector
    tree: dict[str, Any] = {
        "elm": elm,
        "update": ("llm",) if kind is None else ("connector",),
        "llm": {"name": str(llm), "compute_dtype": "float32", "lora": {}},
        "data": {"names": ("demo:train=64,val=8,test=8",), "segment_len": e2e.SAMPLES, "max_len": 64},
        "encoder": {},
        "log": {"progress": False},
    }
    if kind is None:
        tree["data"] |= {"representation": "symbolic", "min_ecg_tokens": 8}
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def encoder_settings(golden: Golden) -> dict[str, Any]:
    """The tiny ST-MEM of the goldens, frozen."""
    folder = golden(ENCODER)
    fields = json.loads((folder / "config.json").read_text())
    return {
        "encoder__name": "st_mem",
        "encoder__checkpoint": str(folder / "model.safetensors"),
        "encoder__config": fields,
    }


def make_run(folder: Path, tree: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Config:
    """A run folder whose trained arrays are these, else what a new run begins with; on one device but with `mesh`."""
    config = resolve({**tree, "workdir": str(folder)})
    assembly = assemble(config)
    run.open_folder(config)
    run.keep_tokenizer(folder, assembly.tokenizer, assembly.signal.ecg_byte)
    here: dict[str, Any] = dict.fromkeys(assembly.structure.leaves, SingleDeviceSharding(jax.devices()[0]))
    if "mesh" in tree:
        here = dict(array_shardings(assembly.structure, make_mesh(config.mesh)))
    made = Weights(assembly).place(here) | {name: jax.device_put(x, here[name]) for name, x in (arrays or {}).items()}
    trained, moving, frozen = split_names(assembly.structure, config.update)
    checkpoints = Checkpoints(folder)
    items = {"trained": {n: made[n] for n in trained}, "statistics": {n: made[n] for n in moving}}
    history = {"best_step": None, "best_val_loss": None, "val_losses": [], "bad": []}
    prints = frozen_fingerprints(assembly.structure.leaves, {name: made[name] for name in frozen})
    checkpoints.save(3, items, {"frozen": prints, "frozen_ids": {}, "data": "", "history": history})
    checkpoints.wait()
    checkpoints.close()
    return config


def export_command(*args: Any) -> int:
    """The command `export` in this process; its status."""
    from elm_jax.export import main

    return guard(main, [str(arg) for arg in args])


def arrays_of(config: Config) -> dict[str, np.ndarray]:
    """All arrays of a run as they are kept."""
    weights = TrainedWeights(Path(config.workdir), "best", config)
    return {name: np.array(x) for name, x in weights.arrays(list(weights.leaves))}


def has_encoder(elm: str) -> bool:
    return ELMS[elm]["ecg"].encoder


def tokenizer_in(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


