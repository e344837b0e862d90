"""LoRA against PEFT's own numbers: adapters read, run unmerged and merged, trained by a step, written again."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity_log import compare, record

from elm_jax.config import OptimConfig, TrainConfig
from elm_jax.models.decoder import Decoder
from elm_jax.models.lora import LoraSpec, add_lora, is_lora
from elm_jax.training.optim import make_optimizer
from elm_jax.weights.load import load_llm, parameters
from elm_jax.weights.peft import WEIGHTS, load_adapter, merged, save_adapter
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
COMPAT = ("gpt2_positions",)  # the inputs are padded on the left
FORWARD, GRADIENT = 1e-5, 1e-4


@dataclass(frozen=True)
class Case:
    name: str
    folder: Path
    llm: Decoder  # with the adapter
    spec: LoraSpec
    adapter: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    @property
    def picked(self) -> np.ndarray:
        """(B, T) bool: every fourth valid position, as the goldens' logits are."""
        flat = np.flatnonzero(self.inputs["attention_mask"])
        chosen = np.zeros(self.inputs["attention_mask"].size, bool)
        chosen[flat[::4]] = True
        return chosen.reshape(self.inputs["attention_mask"].shape)


@cache
def load_case(name: str, folder: Path, llm_folder: Path) -> Case:
    llm = load_llm(llm_folder, compat=COMPAT)
    spec, found = load_adapter(folder, llm.config)
    adapter = found.arrays()
    add_lora(llm, spec, nnx.Rngs(0))
    with_values(llm, adapter)
    return Case(
        name,
        folder,
        llm,
        spec,
        adapter,
        dict(np.load(llm_folder / "inputs.npz")),
        dict(np.load(folder / "outputs.npz")),
    )


def with_values(llm: Decoder, arrays: dict) -> None:
    variables = parameters(nnx.state(llm))
    for name, array in arrays.items():
        assert variables[name].shape == array.shape, name
        variables[name].set_value(jnp.asarray(array))
    nnx.update(llm, nnx.from_flat_state({tuple(n.split(".")): v for n, v in variables.items()}))


@pytest.fixture(params=LLMS)
def case(request, golden) -> Case:
    return load_case(request.param, golden(request.param), golden(LLMS[request.param]))


def arrays_of(llm: Decoder) -> dict[str, jax.Array]:
    return {name: variable[...] for name, variable in parameters(nnx.state(llm)).items()}


def loss_of(llm: Decoder, inputs: dict) -> jax.Array:
    logits = llm(inputs["input_ids"], inputs["attention_mask"])[:, :-1]
    labels = inputs["labels"][:, 1:]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(picked * (labels >= 0)) / (labels >= 0).sum()


def test_logits_match(case):
    logits = case.llm(case.inputs["input_ids"], case.inputs["attention_mask"])
    compare(case.name, "logits", logits[case.picked], case.expected["logits_unmerged_valid_every4"], FORWARD)


def test_merged_logits_match(case):
    bare = Decoder(case.llm.config, nnx.Rngs(0), positions_count_padding=case.llm.positions_count_padding)
    lora_first = sorted(jax.device_get(arrays_of(case.llm)).items(), key=lambda item: not is_lora(item[0]))
    with_values(bare, dict(merged(lora_first, case.spec.scale)))
    logits = bare(case.inputs["input_ids"], case.inputs["attention_mask"])
    compare(case.name, "merged logits", logits[case.picked], case.expected["logits_merged_valid_every4"], FORWARD)


def test_a_step_of_adamw_matches(case, tmp_path):
    """Loss, gradients of the adapter alone, its values after the step, and the loss with them."""
    graph, state = nnx.split(case.llm)
    paths = {name: tuple(name.split(".")) for name in parameters(state)}

    def loss(adapter: dict) -> jax.Array:
        llm = nnx.merge(graph, state)
        flat = dict(nnx.to_flat_state(nnx.state(llm)))
        for name, array in adapter.items():
            flat[paths[name]] = flat[paths[name]].replace(array)
        return loss_of(nnx.merge(graph, nnx.from_flat_state(flat)), case.inputs)

    adapter = {name: jnp.asarray(array) for name, array in case.adapter.items()}
    value, gradients = jax.jit(jax.value_and_grad(loss))(adapter)
    compare(case.name, "loss", value, case.expected["loss_unmerged"], FORWARD)
    optim = OptimConfig(name="adamw", lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=1e-2, warmup_ratio=0.0)
    tx = make_optimizer(optim, TrainConfig(), 1)
    updates, _ = tx.update(gradients, tx.init(adapter), adapter)
    after = optax.apply_updates(adapter, updates)
    compare(case.name, "loss after a step", loss(after), case.expected["loss_after_one_step"], FORWARD)

    stored = np.load(case.folder / "step.npz")
    for kind, arrays in (("grad", gradients), ("after", after)):
        save_adapter(tmp_path / kind, jax.device_get(arrays), case.spec, case.llm.config)
        ours = Safetensors(tmp_path / kind / WEIGHTS)
        theirs = {n.removeprefix(f"{kind}/").replace(".default", ""): n for n in stored if n.startswith(f"{kind}/")}
        assert set(ours) == set(theirs)
        for name in ours:
            expected, grad = stored[theirs[name]], stored[theirs[name].replace("after/", "grad/")]
            if kind == "grad":
                compare(case.name, f"gradient of {name}", ours[name], expected, GRADIENT)
            else:
                # The first step of Adam moves by the rate times the gradient's sign: noise where there is none.
                off = np.abs(ours[name] - expected)[np.abs(grad) >= 1e-6]
                record(case.name, f"{name} after a step", off.max(initial=0.0), 2e-5)


def test_adapters_are_written_as_they_were(case, tmp_path):
    save_adapter(tmp_path, case.adapter, case.spec, case.llm.config, base="somewhere")
    ours, theirs = Safetensors(tmp_path / WEIGHTS), Safetensors(case.folder / WEIGHTS)
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes(), name
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    original = json.loads((case.folder / "adapter_config.json").read_text())
    different = {k for k in written if k not in original or (written[k] != original[k] and k != "target_modules")}
    assert different == {"base_model_name_or_path"}
    assert set(written["target_modules"]) == set(original["target_modules"])
    assert load_adapter(tmp_path, case.llm.config)[0] == case.spec


def test_a_fresh_adapter_is_as_peft_begins(golden):
    """As many arrays in the same shapes; lora_A within the same bounds, lora_B zero."""
    case = load_case("lora_llama", golden("lora_llama"), golden("llm_llama_tied"))
    llm = load_llm(golden("llm_llama_tied"))
    add_lora(llm, LoraSpec(case.spec.rank, case.spec.alpha, targets="peft"), nnx.Rngs(0))
    fresh = {name: array for name, array in arrays_of(llm).items() if is_lora(name)}
    assert {n: x.shape for n, x in fresh.items()} == {n: x.shape for n, x in case.adapter.items()}
    theirs = np.load(case.folder / "init.npz")
    wide = np.concatenate([theirs[n].ravel() for n in theirs if "lora_A" in n])
    ours = np.concatenate([np.ravel(x) for n, x in fresh.items() if n.endswith(".a")])
    assert np.abs(ours).max() == pytest.approx(np.abs(wide).max(), rel=0.01)
    assert ours.std() == pytest.approx(wide.std(), rel=0.05)
    assert all(not np.any(x) for n, x in fresh.items() if n.endswith(".b"))
