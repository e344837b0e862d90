"""LoRA out of a run: the adapter byte for byte, or merged as PEFT merges it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from export.made_runs import Golden, export_command, llm_folder, make_run, settings

from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.peft import CONFIG, WEIGHTS
from elm_jax.weights.safetensors import Safetensors

LLMS = {
    "lora_llama": "llm_llama_tied",
    "lora_llama_untied": "llm_llama_untied_sharded",
    "lora_qwen2": "llm_qwen2_tied",
    "lora_qwen3": "llm_qwen3",
    "lora_gemma2": "llm_gemma2",
    "lora_gpt2": "llm_gpt2",
    "lora_opt": "llm_opt",
}
DTYPES = ("float32", "bfloat16")


@pytest.fixture
def exported(golden: Golden, tmp_path: Path):
    """exported(golden, ...): the folders of the LLM before it was trained and of the export of a run with LoRA."""

    def make(name: str, *flags: str, dtype: str = "float32", update: tuple[str, ...] = ("connector",)):
        source = llm_folder(golden(LLMS[name]), tmp_path / "before", dtype=dtype)
        lora = {"llm__lora__adapter": str(golden(name)), "update": update}
        make_run(tmp_path / "run", settings("base_elf", source, llm__compute_dtype=dtype, **lora))
        assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "out", *flags) == 0
        return source, tmp_path / "out"

    return make


TRAINED, FROZEN = ("connector", "llm"), ("connector",)


@pytest.mark.parametrize(("name", "update"), [*((name, TRAINED) for name in LLMS), ("lora_llama", FROZEN)])
def test_the_adapter_and_the_weights_beneath_come_out_byte_for_byte(
    exported, golden: Golden, name: str, update: tuple[str, ...]
) -> None:
    before, out = exported(name, update=update)
    theirs, ours = Safetensors(golden(name) / WEIGHTS), Safetensors(out / "adapter" / WEIGHTS)
    assert {n: x.tobytes() for n, x in theirs.items()} == {n: x.tobytes() for n, x in ours.items()}
    was, now = (json.loads((folder / CONFIG).read_text()) for folder in (golden(name), out / "adapter"))
    for field in ("r", "lora_alpha", "peft_type", "task_type", "bias", "fan_in_fan_out"):
        assert now[field] == was[field], field
    assert set(now["target_modules"]) == set(was["target_modules"])
    base, kept = open_checkpoint(before), open_checkpoint(out / "llm")
    assert {n: x.tobytes() for n, x in base.items()} == {n: x.tobytes() for n, x in kept.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LLMS)
def test_a_merged_model_is_the_one_that_peft_merges(exported, name: str, dtype: str) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    before, out = exported(name, "--merge", dtype=dtype)
    assert not (out / "adapter").exists()
    base = AutoModelForCausalLM.from_pretrained(before)
    assert base.dtype == getattr(torch, dtype)
    original = {n: x.clone() for n, x in base.state_dict().items()}
    adapter = json.loads((before.parent / "run" / "config.json").read_text())["llm"]["lora"]["adapter"]
    wrapped = peft.PeftModel.from_pretrained(base, adapter)
    terms = _sizes_of_terms(wrapped)
    merged = wrapped.merge_and_unload().state_dict()
    tensors, moved = open_checkpoint(out / "llm"), 0
    # float32: each product is rounded, in an order that depends on the processor; bfloat16: their sum is rounded once.
    most = 1 + json.loads((Path(adapter) / CONFIG).read_text())["r"] if dtype == "float32" else 1
    for theirs, tensor in tensors.items():
        expected = merged[theirs].float().numpy().astype(tensor.dtype)
        assert np.isfinite(expected).all()
        size = np.maximum(np.abs(expected.astype(np.float64)), np.abs(_as_float(original[theirs])))
        assert _places_apart(tensor, expected, np.maximum(size, terms.get(theirs, 0))) <= most, theirs
        moved += not torch.equal(merged[theirs], original[theirs])
    assert moved > 0 and set(tensors) | {"lm_head.weight"} >= set(merged)
    model = AutoModelForCausalLM.from_pretrained(out / "llm")
    assert model.dtype == getattr(torch, dtype)


def _as_float(tensor) -> np.ndarray:
    return tensor.float().numpy()


def _sizes_of_terms(wrapped) -> dict[str, np.ndarray]:
    """By weight: the sum of the absolute products that each change is the sum of.

    (Where they all but cancel, the last places of the change depend on how a processor adds them up.)
    """
    found = {}
    for name, module in wrapped.named_modules():
        for adapter in getattr(module, "lora_A", ()):
            scale = module.scaling[adapter]
            a, b = (np.abs(_as_float(part[adapter].weight.detach())) for part in (module.lora_A, module.lora_B))
            change = scale * (b @ a)
            found[name.removeprefix("base_model.model.") + ".weight"] = change.T if module.fan_in_fan_out else change
    return found


def _places_apart(found: np.ndarray, expected: np.ndarray, size: np.ndarray) -> float:
    """The largest difference in units of the last place of numbers of this size."""
    ends = ml_dtypes.finfo(found.dtype)
    unit = 2.0 ** np.floor(np.log2(np.maximum(size, float(ends.tiny)))) * float(ends.eps)
    return float((np.abs(found.astype(np.float64) - expected.astype(np.float64)) / unit).max())


def test_merging_what_has_no_adapter_is_refused(golden: Golden, tmp_path: Path, capsys) -> None:
    source = llm_folder(golden("llm_gpt2"), tmp_path / "before")
    make_run(tmp_path / "run", settings("base_elf", source))
    assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--merge") == 2
    assert capsys.readouterr().err.startswith("error: --merge: found a run without LoRA")
    assert not (tmp_path / "out").exists()
