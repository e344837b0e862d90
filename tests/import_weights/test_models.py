"""The reference's checkpoints as runs: every kind of model imports, and computes what the reference computed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from import_weights import checkpoints
from import_weights.conftest import Model, imported, loaded
from parity import e2e
from parity_log import compare

from elm_jax.training.step import make_eval_step

Golden = Callable[[str], Path]
FORWARD = 1e-5


def loss_and_logits(run: Path, case: e2e.Case) -> tuple[float, np.ndarray]:
    """Of the golden's first batch, as evaluation computes them."""
    model, batch = loaded(run), case.batch(0)
    sums, counts = make_eval_step(model.assembly.structure, model.config, model.mesh)(model.arrays, batch)
    elm = model.assembly.structure.bind(model.arrays)
    logits = np.asarray(jax.jit(lambda: elm.llm.logits(elm.hidden(batch)))())
    return float(sums["loss"] / counts["loss"]), logits[np.asarray(batch.group_ids) > 0][::3]


@pytest.mark.parametrize("name", checkpoints.KINDS)
def test_a_checkpoint_of_the_reference_computes_the_same(
    model: Model, golden: Golden, workplace: Path, name: str
) -> None:
    file, flags = model(name)
    run = imported(file, workplace / f"run_{name}", *flags)
    case = e2e.load_case(f"e2e_{name}", golden)
    expected = np.load(case.folder / "outputs.npz")
    loss, logits = loss_and_logits(run, case)
    compare(f"imported {name}", "loss", loss, expected["loss"], FORWARD)
    compare(f"imported {name}", "logits", logits[:, : checkpoints.ROWS], expected["logits_valid_rows"], FORWARD)
    report = json.loads((run / "import_report.json").read_text())
    assert report["elm"] == e2e.split_name(f"e2e_{name}")[0]
    names = set(checkpoints.names_of(name, golden))
    left = {n for n, why in report["left_out"].items() if why.startswith("a copy of")}
    assert {tensor["from"] for tensor in report["tensors"]} == names - left
    assert all(n.endswith("lm_head.weight") for n in left) and not report["from_elsewhere"]
    assert "optimizer" in report["left_out"]["optimizer_state_dict"]
    for tensor in report["tensors"]:
        assert [tensor["shape"], tensor["dtype"]] == list(checkpoints.names_of(name, golden)[tensor["from"]])


@pytest.mark.parametrize("llm", e2e.LLMS)
def test_an_adapter_comes_along_or_is_merged(model: Model, golden: Golden, workplace: Path, llm: str) -> None:
    """Both compute the same, and other than the model without it."""
    file, flags = model(f"linear_llava_{llm}_lora")
    case = e2e.load_case(f"e2e_linear_llava_{llm}", golden)
    apart = imported(file, workplace / f"apart_{llm}", *flags)
    merged = imported(file, workplace / f"merged_{llm}", *flags, "--merge")
    (loss, logits), (merged_loss, merged_logits) = (loss_and_logits(run, case) for run in (apart, merged))
    compare(f"imported lora {llm}", "merged logits", merged_logits, logits, FORWARD)
    assert abs(loss - float(np.load(case.folder / "outputs.npz")["loss"])) > 1e-3 and abs(loss - merged_loss) < 1e-4
    config = json.loads((apart / "config.json").read_text())["llm"]["lora"]
    assert (config["rank"], config["alpha"], config["targets"]) == (16, 32.0, "q_proj,v_proj")
    assert json.loads((merged / "config.json").read_text())["llm"]["lora"]["rank"] == 0
    tensors = json.loads((merged / "import_report.json").read_text())["tensors"]
    kernel = next(tensor for tensor in tensors if "lora_A" in tensor["from"])
    assert kernel["to"].startswith("llm.layers.attention.") and kernel["to"].endswith(".kernel[0]")


def renamed(state: checkpoints.State, prefix: str) -> checkpoints.State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_do_not_matter(
    model: Model, golden: Golden, tmp_path: Path, workplace: Path, prefix: str
) -> None:
    """Of DistributedDataParallel and torch.compile, as trained on several devices."""
    _, flags = model("base_elf_llama")
    state = checkpoints.state_dict("base_elf_llama", golden)
    file = checkpoints.save(tmp_path / "wrapped.pt", renamed(state, prefix))
    run = imported(file, tmp_path / "run", *flags)
    plain = imported(checkpoints.save(tmp_path / "plain.pt", state), tmp_path / "plain", *flags)
    arrays = [(folder / "inherited" / "arrays.safetensors").read_bytes() for folder in (run, plain)]
    assert arrays[0] == arrays[1]
    report = json.loads((run / "import_report.json").read_text())
    assert all(tensor["from"].startswith(prefix) for tensor in report["tensors"])


def test_forms_of_files(model: Model, golden: Golden, tmp_path: Path) -> None:
    """A bare state dict, other keys, PyTorch's old form, half precision, and safetensors, which need no PyTorch."""
    torch = pytest.importorskip("torch")
    from elm_jax.weights.safetensors import Safetensors, save_safetensors

    _, flags = model("base_elf_llama")
    state = checkpoints.state_dict("base_elf_llama", golden)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    torch.save(tensors, tmp_path / "bare.pth")
    torch.save({"state_dict": tensors}, tmp_path / "key.bin")
    torch.save({"model_state_dict": tensors}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model_state_dict": half}, tmp_path / "half.pt")
    save_safetensors(tmp_path / "elm.safetensors", state)
    files = ("bare.pth", "key.bin", "old.pt", "half.pt", "elm.safetensors")
    runs = {file: imported(tmp_path / file, tmp_path / f"run_{file}", *flags) for file in files[:-1]}
    runs[files[-1]] = tmp_path / "without_torch"
    arguments = [str(tmp_path / files[-1]), "--out", str(runs[files[-1]]), *flags]
    code = f"import sys; sys.modules['torch'] = None; from elm_jax.import_weights import main; main({arguments!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    arrays = {file: Safetensors(run / "inherited" / "arrays.safetensors") for file, run in runs.items()}
    for name, expected in arrays["bare.pth"].items():
        for file in ("key.bin", "old.pt", "elm.safetensors"):
            np.testing.assert_array_equal(arrays[file][name], expected)
        assert arrays["half.pt"][name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(arrays["half.pt"][name], expected.astype(jnp.bfloat16))
    config = json.loads((runs["half.pt"] / "config.json").read_text())["llm"]
    assert config["compute_dtype"] == config["param_dtype"] == "bfloat16"
