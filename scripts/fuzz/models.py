"""Weights, tokenizers and configurations of models: valid files, and what reads them."""

import io
import json
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.text.vocabulary import load_tokenizer, vocabulary
from elm_jax.weights.safetensors import Safetensors, save_safetensors
from scripts.fuzz.changes import Files, in_json

VALUES = np.arange(24, dtype=np.float32)


def safetensors() -> list[Files]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        two = {"w": VALUES.reshape(4, 6), "b": VALUES[:3].astype(np.int8)}
        for tensors in (two, {"none": VALUES[:0], "one": VALUES[0]}):
            save_safetensors(Path(folder, "a.safetensors"), tensors, {"format": "pt"})
            found.append({"a.safetensors": Path(folder, "a.safetensors").read_bytes()})
    return found


def in_header(rng: random.Random, data: bytes) -> bytes:
    """Another header of a safetensors file, with the length that fits it."""
    length = int.from_bytes(data[:8], "little")
    header = in_json(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def read_safetensors(path: Path) -> None:
    """Every tensor, in its shape."""
    found = Safetensors(path)
    assert all(tensor.shape == found.info[name].shape and tensor.nbytes >= 0 for name, tensor in found.items())
    assert all(isinstance(text, str) for pair in found.metadata.items() for text in pair)


def torch_files() -> list[Files]:
    """None without PyTorch."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "t": torch.ones(2, 3).T}
    found = []
    for value in (tensors, {"model_state_dict": tensors, "epoch": 3}, {"state_dict": {"w": tensors["w"]}}):
        for zipped in (True, False):
            sink = io.BytesIO()
            torch.save(value, sink, _use_new_zipfile_serialization=zipped)
            found.append({"a.pt": sink.getvalue()})
    return found


def in_zip(rng: random.Random, data: bytes) -> bytes:
    """One member of an archive changed, in an archive that is whole: what checks its sums lets it pass."""
    from scripts.fuzz.changes import WAYS

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # of what is no archive any more
        return rng.choice(WAYS)(rng, data)
    pickled = next((member for member in members if member.endswith("data.pkl")), "")
    name = pickled if rng.random() < 0.8 else rng.choice([*members, ""])
    if name not in members:
        return data[: len(data) // 2]
    members[name] = rng.choice(WAYS)(rng, members[name])
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return sink.getvalue()


def read_torch(path: Path) -> None:
    """Every tensor of a file of PyTorch's."""
    from elm_jax.weights.torch_file import TorchFile

    found = TorchFile(path)
    assert all(found[name].shape == info.shape for name, info in found.info.items())


def tokenizers() -> list[Files]:
    """Two small ones: bytes, and words of Llama 2's kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters | {"ab": 256, "abc": 257}, [("a", "b"), ("ab", "c")]))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>", "<signal>", "<think>"])
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3, "<signal>": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return [
        {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(extra).encode()}
        for made, extra in ((tokenizer, told), (words, {**told, "bos_token": None, "unk_token": "[UNK]"}))
    ]


def read_tokenizer(path: Path) -> None:
    """A tokenizer's folder, opened and used; texts must get ids that it has."""
    tokenizer = load_tokenizer(path.parent, str(path.parent))
    words = vocabulary(tokenizer)
    for text in ("abc <signal> \u00e9\U0001f600", ""):
        ids = words.encode(text)
        assert all(i >= 0 for i in ids)
        assert isinstance(words.text(list(ids)), str)


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 64, "rope_type": "llama3"},
}  # fmt: skip


def llm_configs() -> list[Files]:
    """config.json of language models, as the hub has it: every family's, and some with scaled RoPEs."""
    from elm_jax.models.families import FAMILIES, from_hf, to_hf

    found = [LLAMA]
    for name, family in FAMILIES.items():
        plain = {theirs: LLAMA.get(theirs, 16) for theirs, ours in family.fields.items() if ours not in family.derived}
        plain |= {} if family.windows is None else {"sliding_window": 8}
        try:
            found.append(to_hf(from_hf({"model_type": name, **plain}, name)))
        except ValueError:
            continue  # a family that needs more is reached from the others by its name
    longrope = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0]}
    local = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {}}
    for config in found[1:]:
        if config["model_type"] in ("phi3", "gemma3_text"):
            del config["rope_theta"]
            rope = {**longrope, "original_max_position_embeddings": 64} if config["model_type"] == "phi3" else local
            found.append({**config, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope})
    return [{"config.json": json.dumps(config).encode()} for config in found]


def read_llm_config(path: Path) -> None:
    from elm_jax.weights.load import read_llm_config

    assert read_llm_config(path.parent).layers >= 1


ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "use_rslora": False, "rank_pattern": {}, "modules_to_save": None,
}  # fmt: skip


def adapters() -> list[Files]:
    return [{"adapter_config.json": json.dumps(ADAPTER).encode()}]


def read_adapter(path: Path) -> None:
    """What a folder of PEFT's says of an adapter."""
    from elm_jax.keys import LoraConfig
    from elm_jax.weights.peft import spec_of

    spec = spec_of(LoraConfig(adapter=str(path.parent)))
    assert spec is not None and spec.rank >= 1
