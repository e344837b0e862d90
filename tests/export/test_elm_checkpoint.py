"""elm.pt: the reference's names and shapes for every kind of model, and in PyTorch our loss and our answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export import made_runs
from export.made_runs import ADDED, ENCODER, Golden, encoder_settings, export_command, has_encoder, make_run, settings
from parity import e2e

from elm_jax.assemble import assemble
from elm_jax.data.batch import Batch
from elm_jax.inference.generate import generate
from elm_jax.symbols.coder import EcgByte
from elm_jax.training.step import loss_and_gradients
from elm_jax.weights.safetensors import Safetensors

torch = pytest.importorskip("torch")

from export.torch_elm import TorchElm  # noqa: E402

NAMES = [
    pytest.param(f"e2e_{kind}_{llm}", marks=pytest.mark.slow if llm == "qwen2" else ())
    for kind in e2e.KINDS for llm in e2e.LLMS
]  # fmt: skip
LORA = ("e2e_linear_llava_qwen2", "e2e_linear_llava_llama")
def export_case(case: e2e.Case, golden: Golden, folder: Path, **changes: Any) -> Path:
    """The golden's model as the export of a run; the tokenizer has 512 tokens, as the golden's."""
    kind, llm = e2e.split_name(case.name)
    tokens = 512 - ADDED
    if kind == "ecg_byte":
        symbols = EcgByte([b"aa", b"ab"])
        symbols.save(folder / "symbols.json")
        changes["data__ecg_tokenizer"] = str(folder / "symbols.json")
        tokens -= len(symbols)
    if has_encoder(kind):
        changes |= encoder_settings(golden)
    places = case.inputs.get("batch0/signal_id_indices")
    if places is not None:
        changes["encoder__tokens"] = places.shape[1]
    base = made_runs.llm_folder(golden(e2e.LLMS[llm]), folder / "llm", tokens)
    trained = {n: x for n, x in case.arrays.items() if n.startswith("connector.")}
    make_run(folder / "run", settings(kind, base, **changes), trained)
    assert export_command("--checkpoint", folder / "run", "--out", folder / "out") == 0
    return folder / "out"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def described(state: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_elm_pt_is_the_references_and_computes_what_ours_does(golden: Golden, tmp_path: Path, name: str) -> None:
    case = e2e.load_case(name, golden)
    out = export_case(case, golden, tmp_path)
    checkpoint = load(out / "elm.pt")
    names = json.loads((golden("elm_state_dict") / "names.json").read_text())[name.removeprefix("e2e_")]
    assert described(checkpoint["model_state_dict"]) == names
    assert {"epoch", "step", "optimizer_state_dict", "n_current_steps", "best_loss"} < set(checkpoint)
    batch = {n.removeprefix("batch0/"): x for n, x in case.inputs.items() if n.startswith("batch0/")}
    places, signals = batch.get("signal_id_indices"), batch.get("ecg_signal")
    heads = json.loads((golden(ENCODER) / "config.json").read_text())["num_heads"]
    model = TorchElm(
        out / "llm", case.kind, checkpoint["model_state_dict"], 0 if places is None else places.shape[1], heads
    )
    shaped = None if signals is None else signals.reshape(-1, *case.signal_shape)
    inputs = model.inputs(batch["elm_input_ids"], places, shaped)
    loss = model.loss(inputs, batch["elm_attention_mask"], batch["elm_labels"])
    expected = np.load(case.folder / "outputs.npz")
    for other in (_our_loss(case), float(expected["loss"])):
        assert abs(loss - other) <= 1e-5 * abs(loss)
    first, last = int(np.argmax(batch["elm_attention_mask"][1])), int(np.argmax(batch["elm_labels"][1] >= 0))
    new = expected["gen_row1_logits"].shape[1]
    answer = model.greedy(inputs[1:2, first:last], new)
    assert answer == _our_answer(case, first, last, new) == expected["gen_row1"][0, -new:].tolist()


def _our_loss(case: e2e.Case) -> float:
    batch = case.batch(0)
    micro = Batch(*(jax.tree.map(lambda x: x[None], part) for part in batch))
    arrays = {name: jnp.asarray(x) for name, x in case.arrays.items()}
    return float(jax.jit(lambda x: loss_and_gradients(case.structure, {}, {}, x, micro)[0])(arrays))


def _our_answer(case: e2e.Case, first: int, last: int, new: int) -> list[int]:
    """Our `new` greedy tokens after columns `first` to `last` of row 1 of the golden's first batch."""
    batch = case.batch(0)
    elm = case.structure.bind({name: jnp.asarray(x) for name, x in case.arrays.items()})
    signals = elm.signal_embeddings(*jax.tree.map(jnp.asarray, (batch.signals, batch.signal_weights)))
    inputs = elm.inputs(jnp.asarray(batch.tokens), jnp.asarray(batch.signal_slot), signals)
    prompt = inputs[1:2, : last - first]  # ours has no padding on the left
    return np.asarray(generate(elm.llm, inputs_embeds=prompt, max_new_tokens=new))[0].tolist()


@pytest.mark.parametrize("name", LORA)
def test_elm_pt_has_the_adapter_as_peft_names_it_or_merged(golden: Golden, tmp_path: Path, name: str) -> None:
    case = e2e.load_case(name, golden)
    lora = {"llm__lora": {"rank": 16, "targets": "peft"}, "update": ("connector", "llm")}
    out = export_case(case, golden, tmp_path, **lora)
    names = json.loads((golden("elm_state_dict") / "names.json").read_text())
    plain = name.removeprefix("e2e_")
    assert described(load(out / "elm.pt")["model_state_dict"]) == names[f"{plain}_lora"]
    assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "merged", "--merge") == 0
    merged = load(tmp_path / "merged" / "elm.pt")["model_state_dict"]
    assert described(merged) == names[plain]


@pytest.mark.parametrize("llm", ["llm_gemma2", "llm_gpt2", "llm_opt", "llm_qwen3", "llm_llama_untied_sharded"])
def test_every_family_computes_the_same_beside_an_ecg(golden: Golden, tmp_path: Path, llm: str) -> None:
    """Gemma scales its token embeddings, GPT-2 and OPT add positions: an ECG in their midst must not notice."""
    tokens = 5
    base = made_runs.llm_folder(golden(llm), tmp_path / "llm")
    tree = settings("patch_elf", base, encoder__tokens=tokens, update=("connector", "llm"))
    config = make_run(tmp_path / "run", tree)
    assert export_command("--checkpoint", tmp_path / "run", "--out", tmp_path / "out") == 0
    rng = np.random.default_rng(0)
    ids, signals = rng.integers(3, 500, (2, 20)), rng.random((2, e2e.LEADS, e2e.SAMPLES), np.float32)
    places = np.stack([np.arange(3, 3 + tokens), np.arange(9, 9 + tokens)])
    state = load(tmp_path / "out" / "elm.pt")["model_state_dict"]
    model = TorchElm(tmp_path / "out" / "llm", "patch_elf", state, tokens, heads=0)
    with torch.no_grad():
        theirs = model.llm(inputs_embeds=model.inputs(ids, places, signals)).logits.numpy()
    assembly = assemble(config, tmp_path / "run" / "tokenizer")
    elm = assembly.structure.bind({n: jnp.asarray(x) for n, x in made_runs.arrays_of(config).items()})
    slot = np.full(ids.shape, -1, np.int32)
    np.put_along_axis(slot, places, np.arange(tokens)[None], 1)
    embeddings = elm.signal_embeddings({"ecg": jnp.asarray(signals)[:, None]}, jnp.ones((2, 1)))
    ours = np.asarray(elm.llm(inputs_embeds=elm.inputs(jnp.asarray(ids), jnp.asarray(slot), embeddings)))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_encoder_files_are_the_encoders_own_state_dict(golden: Golden, tmp_path: Path) -> None:
    out = export_case(e2e.load_case("e2e_linear_llava_qwen2", golden), golden, tmp_path)
    published = dict(Safetensors(golden(ENCODER) / "model.safetensors"))
    checkpoint = {name: x.numpy() for name, x in load(out / "encoder.pt")["model_state_dict"].items()}
    for found in (checkpoint, dict(Safetensors(out / "encoder.safetensors"))):
        assert set(found) == set(published)
        assert all(np.array_equal(found[name], tensor) for name, tensor in published.items())
