"""Whose word counts: a flag's over the checkpoint's, the checkpoint's over a config file's; and what is assumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from import_weights import checkpoints
from import_weights.conftest import Model, imported

from elm_jax.symbols.coder import EcgByte

Golden = Callable[[str], Path]
Refused = Callable[..., str]


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def assumed_of(run: Path) -> set[str]:
    return set(json.loads((run / "import_report.json").read_text())["assumed"])


def test_the_checkpoint_overrides_a_config_file(model: Model, tmp_path: Path) -> None:
    """Here one of another model: MERL, an MLP with LoRA, from another run; what it says of data and training stays."""
    file, flags = model("patch_elf_llama")
    text = """
from elm_jax.config import default_config

def get_config():
    c = default_config()
    c.elm, c.encoder.name, c.encoder.config = "mlp_llava", "merl", {"width": 8}
    c.connector.hidden, c.llm.lora.rank, c.encoder.tokens = 77, 4, 9
    c.init_from, c.encoder.checkpoint, c.llm.lora.adapter = "runs/none", "none.pt", "none"
    c.llm.name, c.data.names, c.optim.lr = "LLM", ("demo",), 3e-5
    return c
"""
    path = tmp_path / "another.py"
    path.write_text(text.replace("LLM", flags[0].partition("=")[2]))
    run = imported(file, tmp_path / "run", f"--config={path}", *flags[1:])
    config = config_of(run)
    assert (config["elm"], config["encoder"]["name"], config["encoder"]["tokens"]) == ("patch_elf", None, 10)
    assert config["init_from"] is None and config["llm"]["lora"]["rank"] == 0 and config["connector"]["hidden"] is None
    assert (config["data"]["names"], config["optim"]["lr"]) == (["demo"], 3e-5)
    assert not assumed_of(run)


def test_patches_are_counted_by_the_length_of_an_ecg(model: Model, tmp_path: Path, refused: Refused) -> None:
    file, flags = model("base_elf_llama")
    short = [flag for flag in flags if "segment_len" not in flag]
    for more, expected in (
        (["--config.data.segment_len=250"], ("base_elf", 1, 250)),
        (["--config.elm=base_elf"], ("base_elf", 1, 250)),
        (["--config.elm=fuyu"], ("base_elf", 1, 250)),
        (["--config.data.segment_len=500"], ("patch_elf", 2, 500)),
        ([], ("patch_elf", 10, 2500)),
    ):
        run = imported(file, tmp_path / f"run{len(list(tmp_path.iterdir()))}", *short, *more)
        config = config_of(run)
        assert (config["elm"], config["encoder"]["tokens"], config["data"]["segment_len"]) == expected
        assert ("data.segment_len" in assumed_of(run)) == (not more)
    assert "--config.data.segment_len" in refused(file, *short, "--config.data.segment_len=251")


def test_symbols_have_their_tokens_in_the_order_of_the_reference(model: Model, tmp_path: Path) -> None:
    """Its vocabulary is not sorted, and the table of embeddings follows it; `compat` says so, or the user does."""
    file, flags = model("ecg_byte_llama")
    merges = [bytes([97, 97]), bytes([98, 98])]
    coder = EcgByte(merges, order=(257, *range(257)))
    coder.save(tmp_path / "bpe.json")
    flags = [*flags[:-1], f"--config.data.ecg_tokenizer={tmp_path / 'bpe.json'}"]
    theirs = imported(file, tmp_path / "theirs", *flags)
    ours = imported(file, tmp_path / "ours", *flags, "--config.compat=st_mem_train_positions")
    assert config_of(theirs)["compat"] == ["signal_token_order"]
    assert config_of(ours)["compat"] == ["st_mem_train_positions"]
    assert (theirs / "tokenizer" / "ecg_byte.json").is_file()
    vocabularies = [json.loads((run / "tokenizer" / "tokenizer.json").read_text()) for run in (theirs, ours)]
    first = [next(t["content"] for t in v["added_tokens"] if t["content"].startswith("signal_")) for v in vocabularies]
    assert first == ["signal_257", "signal_0"]


def test_what_the_file_leaves_open_is_told(model: Model, tmp_path: Path) -> None:
    file, flags = model("linear_llava_llama_lora")
    run = imported(file, tmp_path / "run", *[flag for flag in flags if "tokens" not in flag])
    assert assumed_of(run) == {"encoder.tokens", "llm.lora.alpha", "data.system_prompt"}
    said = imported(file, tmp_path / "said", *flags, "--config.llm.lora.alpha=8", "--config.data.system_prompt=Read.")
    assert not assumed_of(said) and config_of(said)["llm"]["lora"]["alpha"] == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flag_decides_the_dtype_of_computing(model: Model, tmp_path: Path, dtype: str) -> None:
    file, flags = model("conv_elf_qwen2")
    run = imported(file, tmp_path / "run", *flags, f"--config.llm.compute_dtype={dtype}")
    assert config_of(run)["llm"]["compute_dtype"] == dtype and config_of(run)["llm"]["param_dtype"] == "float32"


def test_a_model_from_nothing_is_known_by_its_sizes(model: Model, golden: Golden, tmp_path: Path) -> None:
    """An LLM that no folder has: `llm.scratch` says what a config.json would."""
    file, flags = model("base_elf_llama")
    sizes = {"family": "llama", "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 160, "head_dim": 16,
             "max_len": 256}  # fmt: skip
    state = checkpoints.state_dict("base_elf_llama", golden)
    tokens = 104
    names = [name for name in state if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    cut = {name: x[:tokens] if name in names else x for name, x in state.items()}
    run = imported(checkpoints.save(tmp_path / "elm.pt", cut), tmp_path / "run", *flags,
                   f"--config.llm.scratch={json.dumps(sizes)}")  # fmt: skip
    assert config_of(run)["llm"]["scratch"] == sizes
    assert json.loads((run / "import_report.json").read_text())["vocabulary"] == {
        "in_file": tokens, "rows": 128, "tokens": tokens,
    }  # fmt: skip
