"""Language models of every family inside a checkpoint, whole or cut to their tokenizer, and their adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from import_weights import checkpoints
from import_weights.conftest import imported
from transformers import AutoTokenizer

from elm_jax.text.render import THINK_TOKENS, add_tokens
from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.load import open_llm, read_llm_config
from elm_jax.weights.peft import load_adapter
from elm_jax.weights.safetensors import Safetensors

Golden = Callable[[str], Path]
Refused = Callable[..., str]
LLMS = ["llama_tied", "llama_untied_sharded", "qwen2_tied", "qwen3", "gemma2", "gpt2", "opt"]
ADAPTERS = {"llama": "llama_tied", "llama_untied": "llama_untied_sharded", "qwen2": "qwen2_tied",
            **{name: name for name in ("qwen3", "gemma2", "gpt2", "opt")}}  # fmt: skip


def folder_of(name: str, golden: Golden, tmp_path: Path) -> Path:
    """The folder of an LLM golden, with a tokenizer."""
    target = tmp_path / name
    shutil.copytree(golden(f"llm_{name}"), target, ignore=shutil.ignore_patterns("*.npz", "README.md"))
    checkpoints.tokenizer().save_pretrained(target)
    return target


def tokens_of(llm: Path) -> int:
    """How many tokens the reference's tokenizer has when it fine-tunes this LLM."""
    made = AutoTokenizer.from_pretrained(llm)
    add_tokens(made, "sft")
    return len(made)


def state_of(llm: Path, rows: int | None = None) -> checkpoints.State:
    """The state dict of base_elf around an LLM, whose vocabulary has `rows` rows."""
    config = read_llm_config(llm)
    tensors = {name: np.asarray(x) for name, x in open_checkpoint(llm).items()}
    table = max((n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight"))), key=len)
    tensors |= {"lm_head.weight": tensors[table]} if config.tied else {}
    cut = {name: x[:rows] if name in (table, "lm_head.weight") else x for name, x in tensors.items()}
    width = config.hidden
    connector = {"project_layer.projection.weight": np.ones((width, 12 * 250), np.float32),
                 "project_layer.projection.bias": np.ones(width, np.float32)}  # fmt: skip
    return {**connector, **{f"llm.llm.{name}": x for name, x in cut.items()}}


def flags_of(llm: Path) -> list[str]:
    return [f"--config.llm.name={llm}", "--config.data.max_len=64", "--config.data.segment_len=250"]


@pytest.mark.parametrize("is_cut", [False, True], ids=["padded", "cut"])
@pytest.mark.parametrize("name", LLMS)
def test_every_family_comes_in_as_its_folder_does(golden: Golden, tmp_path: Path, name: str, is_cut: bool) -> None:
    llm = folder_of(name, golden, tmp_path)
    rows = tokens_of(llm) if is_cut else None
    run = imported(checkpoints.save(tmp_path / "elm.pt", state_of(llm, rows)), tmp_path / "run", *flags_of(llm))
    found = Safetensors(run / "inherited" / "arrays.safetensors")
    expected = open_llm(llm, read_llm_config(llm)).arrays()
    assert {n.removeprefix("llm.") for n in found if n.startswith("llm.")} == set(expected)
    for own, array in expected.items():
        got, want = found[f"llm.{own}"], np.asarray(array)
        assert got.shape == want.shape
        if own in ("embedding.table", "head.kernel") and rows is not None:
            got, want = (x.T if own == "head.kernel" else x for x in (got, want))
            assert np.isfinite(got).all() and len(np.unique(got[rows:], axis=0)) == len(got) - rows  # told apart
            got, want = got[:rows], want[:rows]
        np.testing.assert_array_equal(got, want, err_msg=own)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_every_family_comes_in(golden: Golden, tmp_path: Path, name: str) -> None:
    """By itself, and within a checkpoint: then its rank and targets are told by names and shapes."""
    llm = folder_of(ADAPTERS[name], golden, tmp_path)
    adapter, config = golden(f"lora_{name}"), read_llm_config(llm)
    alone = imported(adapter, tmp_path / "alone", *flags_of(llm), "--config.elm=base_elf")
    tensors, plain = Safetensors(adapter / "adapter_model.safetensors"), state_of(llm)
    wrapped = {
        f"llm.llm.{checkpoints.beneath(n.removeprefix('llm.llm.'), tensors)}" if n.startswith("llm.") else n: x
        for n, x in plain.items()
    }
    wrapped |= {f"llm.llm.{n.removesuffix('.weight')}.default.weight": x for n, x in tensors.items()}
    file = checkpoints.save(tmp_path / "lora.pt", wrapped)
    inside = imported(file, tmp_path / "inside", *flags_of(llm))
    spec, opened = load_adapter(adapter, config)
    arrays = opened.arrays()
    found = [Safetensors(run / "inherited" / "arrays.safetensors") for run in (alone, inside)]
    for each in found:
        assert {n for n in each if ".lora." in n} == {f"llm.{n}" for n in arrays}
        for own, array in arrays.items():
            np.testing.assert_array_equal(each[f"llm.{own}"], array)
    told = [json.loads((run / "config.json").read_text())["llm"]["lora"] for run in (alone, inside)]
    assert told[0] == told[1] and (told[0]["rank"], told[0]["alpha"]) == (spec.rank, spec.alpha)


def test_the_phase_follows_from_the_tokens(golden: Golden, tmp_path: Path, refused: Refused) -> None:
    """The reference gives a model that is pretrained no think and answer tags: its table has fewer rows."""
    llm = folder_of("llama_tied", golden, tmp_path)
    tokens = tokens_of(llm)
    for rows, phase in ((tokens, "sft"), (tokens - len(THINK_TOKENS), "pretrain"), (None, "sft")):
        file = checkpoints.save(tmp_path / f"{rows}.pt", state_of(llm, rows))
        run = imported(file, tmp_path / f"run_{rows}", *flags_of(llm))
        assert json.loads((run / "config.json").read_text())["objective"] == phase
    other = refused(checkpoints.save(tmp_path / "other.pt", state_of(llm, tokens - 1)), *flags_of(llm))
    assert f"of {tokens - 1} tokens; expected as many as the tokenizer has: {tokens} (sft) or" in other
    pretrained = refused(tmp_path / f"{tokens}.pt", *flags_of(llm), "--config.phase=pretrain")
    assert f"{tokens - len(THINK_TOKENS)} (pretrain)" in pretrained and "(sft)" not in pretrained
