"""Checkpoints as the reference writes them, made of the goldens' arrays and names; and the folder of their LLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from parity import e2e

from elm_jax.weights.safetensors import Safetensors

Golden = Callable[[str], Path]
State = dict[str, np.ndarray]
ROWS = 512  # of the goldens' vocabulary
KINDS = {name: e2e.split_name(f"e2e_{name}") for name in (f"{k}_{llm}" for k in e2e.KINDS for llm in e2e.LLMS)}


def names_of(model: str, golden: Golden) -> dict[str, tuple[list[int], str]]:
    """The reference's names of a model ("conv_elf_llama"), with shapes and dtypes."""
    return json.loads((golden("elm_state_dict") / "names.json").read_text())[model]


def state_dict(model: str, golden: Golden) -> State:
    """The reference's state dict of an end-to-end golden; of `..._lora` with the adapter of the lora goldens."""
    plain = model.removesuffix("_lora")
    kind, llm = e2e.split_name(plain)
    found = dict(Safetensors(golden(e2e.LLMS[llm]) / "model.safetensors"))
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    parts = {f"{'llm.' if kind == 'ecg_byte' else 'llm.llm.'}{name}": x for name, x in found.items()}
    if model.endswith("_lora"):
        adapter = Safetensors(golden(f"lora_{llm}") / "adapter_model.safetensors")
        parts = {f"llm.llm.{beneath(name.removeprefix('llm.llm.'), adapter)}": x for name, x in parts.items()}
        parts |= {f"llm.llm.{n.removesuffix('.weight')}.default.weight": x for n, x in adapter.items()}
    if kind.endswith("_llava"):
        own = Safetensors(golden(e2e.ENCODER_FOLDER) / "model.safetensors")
        parts |= {f"encoder.{name}": x for name, x in own.items()}
    connector = golden(f"e2e_{plain}") / "connector_init.safetensors"
    parts |= dict(Safetensors(connector)) if connector.is_file() else {}
    wanted = names_of(model, golden)
    return {name: np.asarray(parts[name]) for name in wanted}


def beneath(name: str, adapter: Mapping[str, Any]) -> str:
    """A name of an LLM, as PEFT has it who has wrapped the modules of `adapter`."""
    inner = f"base_model.model.{name}"
    module, _, leaf = inner.rpartition(".")
    return f"{module}.base_layer.{leaf}" if f"{module}.lora_A.weight" in adapter else inner


def save(path: Path, state: Mapping[str, np.ndarray], **more: Any) -> Path:
    """Write a checkpoint as the reference does, with an optimizer state of some size."""
    import torch

    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5)}}
    content = {
        "epoch": 2, "step": -1, "model_state_dict": tensors, "n_current_steps": 31, "best_loss": 0.25,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    }  # fmt: skip
    torch.save({**content, **more}, path)
    return path


def llm_folder(llm: str, golden: Golden, folder: Path) -> Path:
    """The LLM of a golden as a user has it: configuration and weights, and a tokenizer."""
    target = folder / llm
    if not target.is_dir():
        shutil.copytree(golden(e2e.LLMS[llm]), target, ignore=shutil.ignore_patterns("*.npz", "README.md"))
        tokenizer().save_pretrained(target)
    return target


def tokenizer() -> Any:
    """Of single characters: with the 256 symbols of an ECG-Byte it still fits the goldens' vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def flags_of(model: str, llm: Path, tokens: int) -> list[str]:
    """What a user has to say of a golden's model: its LLM, and what its file cannot tell."""
    kind = e2e.split_name(model.removesuffix("_lora"))[0]
    said = [f"--config.llm.name={llm}", "--config.data.max_len=128"]
    if kind in ("linear_llava", "mlp_llava", "conv_elf"):
        said.append(f"--config.encoder.tokens={tokens}")
    if kind in ("base_elf", "patch_elf", "conv_elf"):
        said.append(f"--config.data.segment_len={e2e.SAMPLES}")
    return said
