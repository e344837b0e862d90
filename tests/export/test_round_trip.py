"""Out and in again: what is exported is imported as it was, and a run's weights are checked as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from export.made_runs import Golden, encoder_settings, export_command, has_encoder, llm_folder, make_run, settings
from parity import e2e

from elm_jax.cli import guard
from elm_jax.run import fingerprints
from elm_jax.run.fingerprints import fingerprint, joined, summary_of

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mlp_llava with LoRA": ("mlp_llava", "llm_qwen2_tied", {"llm__lora": {"rank": 4}, "update": ("connector", "llm")}),
    "linear_llava": ("linear_llava", "llm_llama_untied_sharded", {"update": ("encoder", "connector", "llm")}),
    "conv_elf": ("conv_elf", "llm_gemma2", {"encoder__tokens": 5}),
}


@pytest.mark.parametrize(("elm", "llm", "changes"), MODELS.values(), ids=MODELS)
def test_an_exported_checkpoint_is_imported_and_exported_as_it_was(
    golden: Golden, tmp_path: Path, elm: str, llm: str, changes: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    from elm_jax.import_weights import main

    base = llm_folder(golden(llm), tmp_path / "base", tokens=510, dtype="bfloat16")
    changes = {"encoder__tokens": 2, **changes, **(encoder_settings(golden) if has_encoder(elm) else {})}
    make_run(tmp_path / "run", settings(elm, base, **changes))
    assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "one") == 0
    known = {"llm.name": tmp_path / "one" / "llm", "data.segment_len": e2e.SAMPLES, "data.max_len": 64,
             "encoder.tokens": changes["encoder__tokens"]}  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in known.items()]
    assert guard(main, [str(tmp_path / "one" / "elm.pt"), "--out", str(tmp_path / "imported"), *flags]) == 0
    assert export_command("--checkpoint", tmp_path / "imported", "--out", tmp_path / "two") == 0
    one, two = (
        torch.load(tmp_path / out / "elm.pt", weights_only=True)["model_state_dict"] for out in ("one", "two")
    )
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
    embedding = next(tensor for name, tensor in one.items() if name.endswith("embed_tokens.weight"))
    assert len(embedding) == 515  # the tokenizer's


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_fingerprints_of_arrays_that_come_one_by_one_are_those_of_all(dtype: Any, monkeypatch) -> None:
    monkeypatch.setattr(fingerprints, "_PIECE", 1000)
    rng = np.random.default_rng(0)
    shapes = {"stacked": (3, 70, 41), "rows": (501, 9), "scalar": (), "none": (0, 4), "vector": (1001,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["turned"] = rng.standard_normal((80, 50)).astype(np.float32).T
    whole = fingerprint({name: jnp.asarray(x).astype(dtype) for name, x in arrays.items()})
    assert joined({name: summary_of(x, dtype) for name, x in arrays.items()}) == whole
    arrays["rows"][500, 8] += 1
    assert joined({name: summary_of(x, dtype) for name, x in arrays.items()}) != whole
