"""Checkpoints of encoders, in the forms that their authors publish, and adapter folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from import_weights import checkpoints
from import_weights.conftest import imported, loaded
from parity import e2e
from tiny_llms import tiny_config

from elm_jax.exchange.reference import Kinds, published_rules
from elm_jax.models.encoders import build_encoder
from elm_jax.models.functional import structure_of
from elm_jax.weights.encoders import load_encoder, to_published
from elm_jax.weights.files import open_checkpoint
from elm_jax.weights.load import load_llm
from elm_jax.weights.peft import load_adapter
from elm_jax.weights.safetensors import Safetensors, save_safetensors

Golden = Callable[[str], Path]
Refused = Callable[..., str]
State = dict[str, np.ndarray]
MERL = {"resnet_type": "resnet18", "width": 4}


@pytest.fixture(scope="module")
def merl() -> State:
    structure = structure_of(lambda: build_encoder("merl", MERL, 1, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return to_published("merl", {n: rng.random(leaf.shape, np.float32) for n, leaf in structure.leaves.items()})


@pytest.fixture
def llm(golden: Golden, workplace: Path) -> list[str]:
    """The flags that name a language model."""
    return [f"--config.llm.name={checkpoints.llm_folder('llama', golden, workplace)}", "--config.data.max_len=128"]


def save(path: Path, state: Mapping[str, np.ndarray], key: str | None = "model_state_dict") -> Path:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    torch.save({key: tensors, "epoch": 3} if key else tensors, path)
    return path


def arrays_of(run: Path) -> State:
    """The encoder's arrays in a run, under their published names."""
    config = json.loads((run / "config.json").read_text())["encoder"]
    found = Safetensors(run / "inherited" / "arrays.safetensors")
    assert all(name.startswith("encoder.") for name in found)
    return to_published(config["name"], {name.removeprefix("encoder."): x for name, x in found.items()})


def same(found: State, expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def of_merl(state: State, form: str) -> State:
    counters = {"resnet.bn1.num_batches_tracked": np.zeros((), np.int64)}
    if form == "neural_networks":
        heads = {"lm.pooler.dense.bias": np.zeros(3), "downconv.bias": np.ones(1), "proj_t.0.weight": np.ones((2, 2))}
        return {f"module.{name}": x for name, x in {**state, **heads, **counters}.items()}
    own = {**state, **counters, "resnet.linear.weight": np.zeros((10, 32)), "resnet.linear.bias": np.zeros(10)}
    if form == "encoder":
        return {name.removeprefix("resnet."): x for name, x in own.items()}
    heads = {"lm_model.pooler.dense.bias": np.zeros(3), "att_pool_head.cls_token": np.ones((1, 1, 4))}
    return {**{name.replace("resnet.", "ecg_encoder."): x for name, x in own.items()}, **heads}


@pytest.mark.parametrize(("form", "key"), [("neural_networks", "model_state_dict"), ("encoder", None), ("whole", None)])
def test_every_form_of_merl_is_the_same_encoder(
    merl: State, llm: list[str], tmp_path: Path, form: str, key: str | None
) -> None:
    file = save(tmp_path / "merl.pth", of_merl(merl, form), key)
    run = imported(file, tmp_path / "run", *llm)
    same(arrays_of(run), merl)
    report = json.loads((run / "import_report.json").read_text())
    assert report["told"]["encoder.config.width"]["value"] == 4
    assert any("num_batches_tracked" in n and "counter" in why for n, why in report["left_out"].items())
    assert report["from_elsewhere"]["connector"].startswith("as drawn") and "loaded" in report["from_elsewhere"]["llm"]
    same(to_published("merl", weights(load_encoder("merl", file, **MERL))), merl)  # as encoder.checkpoint reads it


def weights(loaded: Any) -> dict[str, jax.Array]:
    return structure_of(lambda: build_encoder("merl", MERL, 1, nnx.Rngs(0))).arrays(loaded.module)


@pytest.mark.parametrize("form", ["neural_networks", "release", "release_of_the_encoder", "fine_tuned"])
def test_every_form_of_st_mem_is_the_same_encoder(golden: Golden, llm: list[str], tmp_path: Path, form: str) -> None:
    state = dict(Safetensors(golden(e2e.ENCODER_FOLDER) / "model.safetensors"))
    rest = {"mask_embedding": np.zeros((1, 1, 8)), "decoder_norm.bias": np.zeros(8)}
    patch = {n.removeprefix("encoder."): x for n, x in state.items() if n.startswith("encoder.to_patch_embedding.")}
    if form in ("neural_networks", "release"):
        file = {**state, **rest, **patch}
    else:
        file = {name.removeprefix("encoder."): x for name, x in state.items()}
    if form == "fine_tuned":
        file |= {"head.weight": np.zeros((5, 64)), "head.bias": np.zeros(5)}
    key = "model_state_dict" if form == "neural_networks" else "model"
    run = imported(save(tmp_path / "st_mem.pth", file, key), tmp_path / "run", *llm)
    same(arrays_of(run), state)
    assert json.loads((run / "config.json").read_text())["data"]["segment_len"] == e2e.SAMPLES


@pytest.mark.parametrize("name", ["mtae", "mlae"])
def test_autoencoders_are_told_apart(golden: Golden, llm: list[str], tmp_path: Path, name: str) -> None:
    """They have the same names. Those of the patch embedding are in the file twice, and must agree."""
    state = dict(Safetensors(golden(f"encoder_tiny_{name}") / "model.safetensors"))
    run = imported(save(tmp_path / "mae.pt", state), tmp_path / "run", *llm)
    same(arrays_of(run), state)
    config = json.loads((run / "config.json").read_text())
    golden_config = json.loads((golden(f"encoder_tiny_{name}") / "config.json").read_text())
    assert config["encoder"]["name"] == name and config["data"]["segment_len"] == golden_config["seq_len"]


def test_an_mlae_with_several_leads_a_patch_is_known_by_its_head(llm: list[str], tmp_path: Path) -> None:
    sizes = {
        "seq_len": 40, "patch_size": 3, "embed_dim": 16, "depth": 1, "num_heads": 2,
        "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1,
    }  # fmt: skip
    structure = structure_of(lambda: build_encoder("mlae", sizes, 1, nnx.Rngs(0)))
    state = to_published("mlae", {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in structure.leaves.items()})
    run = imported(save(tmp_path / "mae.pt", state), tmp_path / "run", *llm)
    same(arrays_of(run), state)
    config = json.loads((run / "config.json").read_text())
    assert config["encoder"]["name"] == "mlae" and config["data"]["segment_len"] == 40
    assert config["encoder"]["config"]["patch_size"] == 3


@pytest.mark.parametrize(
    ("folder", "name"), [("clip_eos2", "clip"), ("vit_mim", "vit"), ("siglip2_naflex", "siglip2")]
)
def test_a_folder_of_a_vision_encoder_says_its_sizes(
    golden: Golden, llm: list[str], tmp_path: Path, folder: str, name: str
) -> None:
    run = imported(golden(f"vision_{folder}"), tmp_path / "run", *llm, "--config.elm=linear_llava")
    config = json.loads((run / "config.json").read_text())
    assert config["encoder"]["name"] == name and config["data"]["representation"] == "rgb"
    theirs = Safetensors(golden(f"vision_{folder}") / "model.safetensors")
    for own, array in arrays_of(run).items():
        np.testing.assert_array_equal(array, theirs[own])


def test_siglip_ecg_is_known_by_its_names_and_sized_by_a_flag(golden: Golden, llm: list[str], tmp_path: Path) -> None:
    folder = golden("vision_siglip_ecg")
    sizes = [json.loads((folder / name).read_text()) for name in ("siglip2_config.json", "config.json")]
    flags = [f"--config.encoder.config={json.dumps({**sizes[0], **sizes[1]})}", "--config.data.segment_len=500"]
    run = imported(folder / "model.safetensors", tmp_path / "run", *llm, *flags)
    same(arrays_of(run), Safetensors(folder / "model.safetensors"))
    assert json.loads((run / "config.json").read_text())["data"]["representation"] == "signal"


def test_what_an_encoder_may_lack_is_drawn(golden: Golden, llm: list[str], tmp_path: Path) -> None:
    """A published ViT has no mask token."""
    folder, mask = tmp_path / "vit", "vit.embeddings.mask_token"
    shutil.copytree(golden("vision_vit_mim"), folder)
    tensors = {name: np.array(x) for name, x in open_checkpoint(folder).items() if name != mask}  # copies
    save_safetensors(folder / "model.safetensors", tensors)
    run = imported(folder, tmp_path / "run", *llm, "--config.elm=linear_llava")
    assert mask not in arrays_of(run)
    assert "as drawn" in json.loads((run / "import_report.json").read_text())["from_elsewhere"]["encoder"]


def test_an_encoder_stands_in_a_model_with_the_published_llm(
    golden: Golden, workplace: Path, llm: list[str], tmp_path: Path
) -> None:
    """As evaluate and chat load the run: what was imported, the LLM of its folder, and a connector as it is drawn."""
    state = Safetensors(golden(e2e.ENCODER_FOLDER) / "model.safetensors")
    run = imported(save(tmp_path / "st_mem.pt", state), tmp_path / "run", *llm, "--config.llm.compute_dtype=float32")
    model = loaded(run)
    kinds = Kinds(tiny_config("llama"), {"encoder": "st_mem"}, {"connector": "mlp"})
    rules = {n: published_rules([n], kinds)[n] for n in model.arrays}
    table = load_llm(checkpoints.llm_folder("llama", golden, workplace)).embedding.table[...]
    np.testing.assert_array_equal(model.arrays["llm.embedding.table"], table)
    for name, array in model.arrays.items():
        if name.startswith("encoder.") and not rules[name].stacked:
            np.testing.assert_array_equal(array, rules[name].arrange([state[rules[name].theirs]]))
    assert {name.split(".")[0] for name in model.arrays} == {"encoder", "connector", "llm"}


def test_an_encoder_that_does_not_fit_is_refused_by_name(
    merl: State, llm: list[str], tmp_path: Path, refused: Refused
) -> None:
    without = {name: x for name, x in merl.items() if name != "resnet.layer4.1.bn2.running_var"}
    assert "found no encoder.resnet.layer4.1.bn2.running_var" in refused(save(tmp_path / "a.pt", without), *llm)
    twice = {**of_merl(merl, "whole"), "resnet.layer4.1.bn2.running_var": merl["resnet.layer4.1.bn2.running_var"] + 1}
    assert "each tensor once" in refused(save(tmp_path / "twice.pth", twice), *llm)
    more = {**merl, "resnet.layer4.1.bn2.extra": np.zeros(2)}
    assert "found unknown resnet.layer4.1.bn2.extra" in refused(save(tmp_path / "b.pt", more), *llm)
    thin = {**merl, "resnet.layer3.0.conv1.weight": np.zeros((16, 8, 1), np.float32)}
    assert "resnet.layer3.0.conv1.weight float32[16, 8, 1]" in refused(save(tmp_path / "c.pt", thin), *llm)
    assert "names of none of them" in refused(save(tmp_path / "d.pt", {"a.weight": np.zeros(3)}), *llm)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_folder_becomes_a_run(golden: Golden, workplace: Path, tmp_path: Path, name: str) -> None:
    """Its arrays are byte-equal; merged, its kernels are those that PEFT's merge has."""
    folder, base = golden(f"lora_{name}"), checkpoints.llm_folder(name, golden, workplace)
    model = [f"--config.llm.name={base}", "--config.elm=base_elf", "--config.data.max_len=128",
             "--config.llm.compute_dtype=float32"]  # fmt: skip
    run = imported(folder, tmp_path / "run", *model)
    found = Safetensors(run / "inherited" / "arrays.safetensors")
    decoder = load_llm(base)
    spec, adapter = load_adapter(folder, decoder.config)
    expected = adapter.arrays()
    assert set(found) == {f"llm.{n}" for n in expected}
    for n, array in expected.items():
        np.testing.assert_array_equal(found[f"llm.{n}"], array)
    theirs = Safetensors(folder / "adapter_model.safetensors")
    report = json.loads((run / "import_report.json").read_text())
    assert {tensor["from"] for tensor in report["tensors"]} == set(theirs)
    assert "loaded from" in report["from_elsewhere"]["llm"] and "as drawn" in report["from_elsewhere"]["connector"]
    merged = imported(folder, tmp_path / "merged", *model, "--merge")
    weights = Safetensors(merged / "inherited" / "arrays.safetensors")
    plain = Safetensors(golden(e2e.LLMS[name]) / "model.safetensors")
    layer = "model.layers.1.self_attn.v_proj"
    a, b = (theirs[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    change = np.float64(b) @ np.float64(a) * spec.scale
    ours = weights["llm.layers.attention.v.kernel"][1].T
    np.testing.assert_allclose(ours, plain[f"{layer}.weight"] + change, rtol=3e-7, atol=1e-7)
    assert len(weights) == 2 and json.loads((merged / "config.json").read_text())["llm"]["lora"]["rank"] == 0


def test_an_adapter_that_does_not_fit_is_refused_by_name(
    golden: Golden, llm: list[str], tmp_path: Path, refused: Refused
) -> None:
    flags = [*llm, "--config.elm=base_elf"]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((golden("lora_llama") / "adapter_config.json").read_text())
    tensors = dict(Safetensors(golden("lora_llama") / "adapter_model.safetensors"))
    name = sorted(tensors)[0]
    for change, message in (
        ({name: None}, f"found no {name}"),
        ({"base_model.model.other.weight": np.zeros(3)}, "found unknown base_model.model.other.weight"),
        ({name: np.zeros((2, 2), np.float32)}, f"found {name} float32[2, 2]"),
    ):
        changed = {n: x for n, x in {**tensors, **change}.items() if x is not None}
        save_safetensors(folder / "adapter_model.safetensors", changed)
        assert message in refused(folder, *flags)


@pytest.mark.parametrize("name", ["merl", "clip", "vit", "siglip2"])
def test_other_encoders_inside_a_model(
    merl: State, golden: Golden, llm: list[str], tmp_path: Path, name: str
) -> None:
    """With what the reference's module around them has besides: heads, text towers, counters of batches."""
    folders = {"clip": "vision_clip_eos2", "vit": "vision_vit_mim", "siglip2": "vision_siglip2_naflex"}
    if name == "merl":
        wrapped = of_merl(merl, "neural_networks").items()
        own, flags, width = {f"encoder.{n.removeprefix('module.')}": x for n, x in wrapped}, [], 32
    else:
        folder = golden(folders[name])
        own = {f"encoder.vision_encoder.{n}": x for n, x in open_checkpoint(folder).items()}
        flags = [f"--config.encoder.checkpoint={folder}"]
        width = load_encoder(name, folder).width
    model = {n: x for n, x in checkpoints.state_dict("linear_llava_llama", golden).items() if n.startswith("llm.")}
    connector = {"projection.projection.weight": np.ones((64, width), np.float32),
                 "projection.projection.bias": np.ones(64, np.float32)}  # fmt: skip
    file = checkpoints.save(tmp_path / "elm.pt", {**model, **own, **connector})
    run = imported(file, tmp_path / "run", *llm, *flags)
    report = json.loads((run / "import_report.json").read_text())
    assert report["encoder"] == name and not report["from_elsewhere"]
    taken = {tensor["from"] for tensor in report["tensors"]} | set(report["left_out"])
    assert taken >= {*model, *own, *connector}
    unused = [n for n, why in report["left_out"].items() if why.startswith("nothing")]
    assert all(n.startswith("encoder.") for n in unused) and unused
