"""Importing a large model: how much memory of the host it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from import_weights import checkpoints

from elm_jax.weights.safetensors import Safetensors

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768}  # fmt: skip
SAMPLES = 250

# In processes of their own: what was in memory before is not counted.
MAKE = """
import json, sys, torch
shapes = json.load(open(sys.argv[1])).items()
tensors = {name: torch.full(shape, (i % 89) / 97, dtype=torch.bfloat16) for i, (name, shape) in enumerate(shapes)}
tensors["llm.llm.lm_head.weight"] = tensors["llm.llm.model.embed_tokens.weight"]
torch.save({"model_state_dict": tensors, "epoch": 0, "optimizer_state_dict": {"state": {}}}, sys.argv[2])
"""
IMPORT = """
import sys
from elm_jax.import_weights import main
main(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak) * 1024)
"""


def names() -> dict[str, list[int]]:
    """Of Qwen2.5-0.5B and a connector."""
    width, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], 128
    layer = {
        **{f"self_attn.{n}_proj.weight": [out, width] for n, out in (("q", width), ("k", kv), ("v", kv), ("o", width))},
        **{f"self_attn.{n}_proj.bias": [out] for n, out in (("q", width), ("k", kv), ("v", kv))},
        "mlp.gate_proj.weight": [inner, width], "mlp.up_proj.weight": [inner, width],
        "mlp.down_proj.weight": [width, inner],
        **{f"{n}_layernorm.weight": [width] for n in ("input", "post_attention")},
    }  # fmt: skip
    found = {"embed_tokens.weight": [SIZES["vocab_size"], width], "norm.weight": [width]}
    layers = range(SIZES["num_hidden_layers"])
    found |= {f"layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    return {
        **{f"llm.llm.model.{name}": shape for name, shape in found.items()},
        "project_layer.projection.weight": [width, 12 * SAMPLES], "project_layer.projection.bias": [width],
    }  # fmt: skip


@pytest.mark.slow
def test_a_model_of_half_a_billion_parameters_is_imported_tensor_by_tensor(
    golden: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    llm = checkpoints.llm_folder("qwen2", golden, tmp_path)
    config = json.loads((llm / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("head_dim", "layer_types")} | SIZES
    (llm / "config.json").write_text(json.dumps(config))
    (tmp_path / "names.json").write_text(json.dumps(names()))
    file, run = tmp_path / "elm.pt", tmp_path / "run"
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path / "names.json"), str(file)], check=True)
    flags = [f"--config.llm.name={llm}", f"--config.data.segment_len={SAMPLES}"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(file), "--out", str(run), *flags], capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    arrays = Safetensors(run / "inherited" / "arrays.safetensors")
    written, peak = (run / "inherited" / "arrays.safetensors").stat().st_size, int(done.stdout.split()[-1])
    print(f"{written / 1e9:.2f} GB written, {peak / 1e9:.2f} GB of memory at most")
    assert sum(x.size for x in arrays.values()) > 0.49e9
    assert peak < written + 1e9
    del arrays
    shutil.rmtree(run)
    file.unlink()
