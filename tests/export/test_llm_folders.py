"""The exported LLM: every byte as it came where nothing was trained, and the same logits in Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from export.made_runs import ADDED, Golden, arrays_of, export_command, llm_folder, make_run, settings, tokenizer_in

from elm_jax.assemble import assemble
from elm_jax.exchange.llm_folder import edited
from elm_jax.weights.files import open_checkpoint

LLAMAS = ("llm_llama_tied", "llm_llama_untied_sharded")
LLMS = (*LLAMAS, "llm_qwen2_tied", "llm_qwen3", "llm_gemma2", "llm_gpt2", "llm_opt")
NEW = ("llm_qwen3_5", "llm_qwen3_moe")
DTYPES = ("float32", "bfloat16")


@pytest.fixture
def exported(golden: Golden, tmp_path: Path):
    """exported(golden, ...): the LLM's folder before and after, and the run's configuration."""

    def make(name: str, *flags: Any, folder: dict[str, Any] | None = None, **changes: Any):
        source = llm_folder(golden(name), tmp_path / "before", **(folder or {}))
        config = make_run(tmp_path / "run", settings("base_elf", source, **changes))
        assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "out", *flags) == 0
        return source, tmp_path / "out" / "llm", config

    return make


def assert_same(before: Path, after: Path, rows: int | None = None) -> None:
    """Every tensor has the same bytes; `rows`: the vocabulary tables have more, after those that they had."""
    ours, theirs = open_checkpoint(after), open_checkpoint(before)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        found = ours[name]
        if rows is not None and tensor.shape[0] != found.shape[0]:
            assert found.shape == (rows, *tensor.shape[1:]), name
            found = found[: len(tensor)]
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LLMS)
def test_a_frozen_llm_comes_out_byte_for_byte_whatever_the_run_computed_in(exported, name: str, dtype: str) -> None:
    other = next(each for each in DTYPES if each != dtype)
    before, after, _ = exported(name, folder={"dtype": dtype}, llm__compute_dtype=other)
    assert_same(before, after)
    for file in ("config.json", "generation_config.json"):
        assert (after / file).read_bytes() == (before / file).read_bytes()


@pytest.mark.parametrize("name", [*LLMS, *NEW])
def test_a_trained_llm_that_did_not_move_comes_out_byte_for_byte_in_its_own_style(exported, name: str) -> None:
    folder = {"config": "config_hub_style.json"}
    before, after, _ = exported(name, "--max_shard_size", "0.1MB", folder=folder, update=("connector", "llm"))
    rows = 512 if name in NEW else None  # their tables are smaller than the tokenizer
    assert_same(before, after, rows)
    assert (after / "model.safetensors.index.json").is_file()
    text = (before / "config.json").read_text()
    assert (after / "config.json").read_text() == (edited(text, {"vocab_size": rows}) if rows else text)


def test_what_was_trained_on_a_mesh_comes_out_whole(exported) -> None:
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    before, after, config = exported("llm_llama_untied_sharded", update=("connector", "llm"), mesh=mesh)
    assert config.mesh.fsdp == 4
    assert_same(before, after)


def test_a_trained_llm_is_in_the_dtype_of_its_training_or_as_asked_and_config_says_so(exported) -> None:
    folder = {"dtype": "bfloat16"}
    before, after, _ = exported("llm_qwen2_tied", folder=folder, update=("connector", "llm"))
    was, now = (json.loads((path / "config.json").read_text()) for path in (before, after))
    assert was | {"dtype": "float32"} == now != was
    tensors = open_checkpoint(after)
    for name, tensor in open_checkpoint(before).items():
        assert tensors[name].dtype == np.float32
        assert np.array_equal(tensors[name], tensor.astype(np.float32))
    run = before.parent / "run"
    assert export_command("--checkpoint", run, "--out", before.parent / "two", "--dtype", "bfloat16") == 0
    assert_same(before, before.parent / "two" / "llm")
    assert (before.parent / "two" / "llm" / "config.json").read_bytes() == (before / "config.json").read_bytes()


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in LLMS), ("llm_llama_tied", "float32")])
def test_a_larger_vocabulary_keeps_the_old_rows(exported, name: str, dtype: str) -> None:
    before, after, config = exported(name, folder={"tokens": 510, "dtype": dtype})
    rows = assemble(config, before.parent / "run" / "tokenizer").llm.vocab_size
    assert rows > 512
    assert_same(before, after, rows)
    was, now = (json.loads((path / "config.json").read_text()) for path in (before, after))
    assert was | {"vocab_size": rows} == now
    assert len(tokenizer_in(after)) == 510 + ADDED <= rows


# Beneath a frozen LLM lies the folder itself, whose new rows are of its dtype.
STATES = {
    "as it was": ({}, ("connector", "llm")),
    "larger vocabulary": ({"tokens": 510}, ("connector", "llm")),
    "frozen bfloat16 and a larger vocabulary": ({"tokens": 510, "dtype": "bfloat16"}, ("connector",)),
}


@pytest.mark.parametrize(
    ("name", "state"), [*((n, s) for n in LLMS for s in STATES), *((n, "larger vocabulary") for n in NEW)]
)
def test_transformers_computes_our_logits(exported, name: str, state: str) -> None:
    folder, update = STATES[state]
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    _, after, config = exported(name, folder=folder, update=update)
    assembly = assemble(config, Path(config.workdir) / "tokenizer")
    leaves = assembly.structure.leaves  # in the dtypes that the run computes with
    arrays = {name: jnp.asarray(x).astype(leaves[name].dtype) for name, x in arrays_of(config).items()}
    llm = assembly.structure.bind(arrays).llm
    tokens = np.random.default_rng(0).integers(0, len(assembly.tokenizer), (2, 21))
    ours = np.asarray(llm(jnp.asarray(tokens)))
    model = AutoModelForCausalLM.from_pretrained(after, attn_implementation="eager")
    assert model.dtype == getattr(torch, folder.get("dtype", "float32"))
    model = model.float()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert ours.shape == theirs.shape
    bound = 5e-5 if name == "llm_qwen3_5" else 1e-5  # see `WIDER` of tests/parity/test_llm_golden.py
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def test_the_tokenizer_has_the_added_tokens_and_how_conversations_are_written(exported) -> None:
    from elm_jax.text.render import render_prompt

    _, after, config = exported("llm_gpt2", data__system_prompt="w1 w2")
    assembly = assemble(config, Path(config.workdir) / "tokenizer")
    tokenizer = tokenizer_in(after)
    assert tokenizer.get_vocab() == assembly.tokenizer.get_vocab()
    turns = [{"role": "user", "content": "<signal>\nw3 w4"}, {"role": "assistant", "content": "w5"},
             {"role": "user", "content": "w6"}]  # fmt: skip
    system = {"role": "system", "content": "w1 w2"}
    kwargs = {"add_generation_prompt": True, "tokenize": False}
    text = tokenizer.apply_chat_template([system, *turns], **kwargs)
    names = {"user": "human", "assistant": "gpt"}
    told = [{"from": names[t["role"]], "value": t["content"].replace("<signal>", "<ecg>")} for t in turns]
    rendered = render_prompt(told, assembly.tokenizer, assembly.text.family, system_prompt="w1 w2", signal_tokens=1)
    assert text == rendered.prompt
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == rendered.ids.tolist()


def test_a_value_of_a_json_text_changes_and_nothing_else() -> None:
    text = '{\n  "a": 1e-05,\n "vocab_size" : 512, "b": {"vocab_size": 3}, "x": "\\u00e9 1.50"}\n'
    assert edited(text, {"vocab_size": 576, "dtype": "float32"}) == text.replace("512", "576")
    nested_first = '{"b": {"vocab_size": 3}, "vocab_size": 512}'
    assert json.loads(edited(nested_first, {"vocab_size": 576})) == {"b": {"vocab_size": 3}, "vocab_size": 576}
    assert edited(text, {"vocab_size": 512}) == text
