"""GEM's and PULSE's folders: in, the same model as before; out again, the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from parity.test_llava_golden import conversation, embedded

from elm_jax import cli
from elm_jax.cli import ConfigFlags
from elm_jax.data.batch import ArraySpec, BatchShape, Group, collate
from elm_jax.export import main as export_main
from elm_jax.import_weights import main as import_main
from elm_jax.inference.model import TrainedModel
from elm_jax.run.config import config_of_run
from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.safetensors import Safetensors, save_safetensors

Golden = Callable[[str], Path]


def folder_of(golden: Path, out: Path, **fields: Any) -> Path:
    """A folder as LLaVA's program saves one: tensors, config.json, tokenizer."""
    tensors = dict(Safetensors(golden / "model.safetensors"))
    rows, width = tensors["model.embed_tokens.weight"].shape
    texts.chat_tokenizer().save_pretrained(out)
    mlp = tensors["model.layers.0.mlp.up_proj.weight"].shape[0]
    content = {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": rows,
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336", **fields,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(content))
    save_safetensors(out / "model.safetensors", tensors)
    return out


def brought_in(source: Path, out: Path, *flags: str) -> TrainedModel:
    plain = "--config.llm.chat=plain"  # for the demo has a tokenizer of its own
    assert cli.guard(import_main, [str(source), "--out", str(out), plain, *flags]) == 0
    return TrainedModel(config_of_run(str(out), ConfigFlags.parse([])), "latest")


def test_gem_comes_in_and_goes_out(golden: Golden, tmp_path: Path) -> None:
    folder = golden("gem_fusion")
    fields = {"ecg_projector_type": "linear", "mm_ecg_tower": "/a/path", "image_aspect_ratio": "ori"}
    source = folder_of(folder, tmp_path / "gem", **fields)
    heads = ["--config.encoder.config.heads=3", "--config.encoders.image.config.num_attention_heads=4"]
    model = brought_in(source, tmp_path / "run", *heads)
    config = model.config
    assert config.elm == "gem" and config.encoder.tokens == 6 and config.encoders["image"]["tokens"] == 9
    assert (config.data.segment_len, config.data.sampling_rate, config.data.normalize) == (250, 500, "none")
    given, wanted = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    shown = [{"ecg": given["ecgs"][0], "image": given["images"][0].transpose(1, 2, 0)}]
    row = conversation(given["input_ids"][0], given["labels"][0], 15, shown)
    layout = {**model.assembly.signal.layout, "image": ArraySpec((42, 42, 3))}
    batch = collate([[Group(0, [row])]], BatchShape(30, 1, 16), layout)
    elm = model.assembly.structure.bind(model.arrays)
    np.testing.assert_allclose(embedded(elm, batch)[0], wanted["merged_embeds"][0], atol=5e-5)
    out = tmp_path / "out"
    assert cli.guard(export_main, ["--checkpoint", str(tmp_path / "run"), "--out", str(out), "--llava"]) == 0
    check_same(source, out / "llava")
    again = brought_in(out / "llava", tmp_path / "again", *heads)
    assert again.arrays.keys() == model.arrays.keys()
    assert json.loads((out / "llm" / "config.json").read_text())["model_type"] == "llama"


def check_same(source: Path, out: Path) -> None:
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # of a vocabulary that has grown, the rows that there were
        np.testing.assert_array_equal(after[name][: len(tensor)], tensor, err_msg=name)


def test_pulse_comes_in_and_goes_out(golden: Golden, tmp_path: Path) -> None:
    grids = json.loads((golden("llava_anyres") / "config.json").read_text())["image_grid_pinpoints"]
    fields = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": grids, "mm_patch_merge_type": "spatial_unpad"}
    source = folder_of(golden("llava_anyres"), tmp_path / "pulse", **fields)
    heads = "--config.encoder.config.num_attention_heads=2"
    model = brought_in(source, tmp_path / "run", heads)
    assert model.config.elm == "mlp_llava" and model.config.data.representation == "rgb"
    assert model.config.encoder.tokens == len(model.assembly.structure.bind(model.arrays).encoder.newlines)
    out = tmp_path / "out"
    assert cli.guard(export_main, ["--checkpoint", str(tmp_path / "run"), "--out", str(out), "--llava"]) == 0
    check_same(source, out / "llava")


def test_what_such_a_folder_lacks_is_said(
    golden: Golden, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of(golden("gem_fusion"), tmp_path / "gem", ecg_projector_type="mlp2x_gelu")
    assert "ecg_projector_type" in refused(source)
    other = folder_of(golden("gem_fusion"), tmp_path / "other", new_field=3)
    assert "new_field" in refused(other)
    assert "its folder" in refused(other / "model.safetensors")
