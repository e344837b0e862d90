"""The whole way of the reference, from recordings to answers, through our own parts under its compat preset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_log import compare, record

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import resolve
from elm_jax.data.batch import Batch
from elm_jax.data.dataset import Dataset
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.inference.generate import generate
from elm_jax.models.connectors import RULES
from elm_jax.models.functional import Arrays
from elm_jax.run.weights import Weights
from elm_jax.text.render import decode
from elm_jax.training.step import loss_and_gradients
from elm_jax.weights.safetensors import Safetensors

NAME = "pipeline_full_qwen"
Golden = Callable[[str], Path]


@pytest.fixture(scope="module")
def run(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> tuple[Assembly, Arrays, Dataset]:
    """The golden's models, arrays and records, put together as a run of ours is."""
    folder, work = golden(NAME), tmp_path_factory.mktemp("pipeline")
    setup, records = (json.loads((folder / f"{n}.json").read_text()) for n in ("setup", "evaluate"))
    args, encoder = setup["args"], golden(f"encoder_tiny_{setup['args']['encoder']}")
    llm = work / "llm"
    shutil.copytree(golden("text_tokenizer_qwen"), llm)
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(folder / file, llm / file)
    with (work / "records.jsonl").open("w") as file:
        for row, raw in zip(records["records"], np.load(folder / "batch.npz")["ecg_raw"], strict=True):
            np.save(work / row["ecg_path"], raw)
            file.write(json.dumps({**row, "name": "x", "patient_id": row["ecg_path"]}) + "\n")
    config = resolve({
        "elm": args["elm"],
        "compat": ["elm-2026-08"],
        "data": {
            "names": ["records.jsonl"], "root": str(work), "val_fraction": 0.0, "segment_len": args["segment_len"],
            "system_prompt": (folder / args["system_prompt"]).read_text(), "max_len": args["llm_input_len"],
        },
        "llm": {"name": str(llm), "compute_dtype": "float32", "remat": "none"},
        "encoder": {
            "name": args["encoder"], "tokens": args["num_encoder_tokens"],
            "checkpoint": str(encoder / "model.safetensors"),
            "config": json.loads((encoder / "config.json").read_text()),
        },
    })  # fmt: skip
    assembly = assemble(config)
    assert len(assembly.tokenizer) == setup["vocab"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = Weights(assembly).place(dict.fromkeys(assembly.structure.leaves, device))
    connector = Safetensors(folder / "connector_init.safetensors")
    for rule in RULES[str(assembly.config.view.connector)]:
        (theirs,) = [name for name in connector if name.endswith(rule.theirs)]
        arrays[f"connector.{rule.ours}"] = jnp.asarray(rule.arrange([connector[theirs]]))
    return assembly, arrays, assembly.dataset("train")


def batch_of(dataset: Dataset, max_len: int) -> Batch:
    index = dataset.length_index("none", 0.0)
    plan = Plan(index, rows=len(dataset), max_len=max_len, pack=False, seed=0, shuffle=False)
    return StepSource(dataset, plan, steps=1)[0].batch


def test_tokens_and_labels(run: tuple[Assembly, Arrays, Dataset], golden: Golden) -> None:
    _, _, dataset = run
    expected, wrong = np.load(golden(NAME) / "batch.npz"), 0
    for i in range(len(dataset)):
        rendered, real = dataset.render(i), expected["elm_attention_mask"][i] == 1
        labels = np.where(rendered.supervised, rendered.ids, -100)
        wrong += not np.array_equal(rendered.ids, expected["elm_input_ids"][i][real])
        wrong += not np.array_equal(labels, expected["elm_labels"][i][real])
        start = int(real.argmax())
        wrong += not np.array_equal(rendered.signal_positions[0] + start, expected["signal_id_indices"][i])
        compare(NAME, "normalised ECG", dataset.signals(i)[0]["ecg"], expected["ecg_normalised"][i], 1e-6)
    record(NAME, "differing ids, labels and positions", wrong, 0)


def test_loss_and_logits(run: tuple[Assembly, Arrays, Dataset], golden: Golden) -> None:
    assembly, arrays, dataset = run
    expected = np.load(golden(NAME) / "outputs.npz")
    batch = batch_of(dataset, assembly.config.data.max_len)
    trained = {n: x for n, x in arrays.items() if n.startswith("connector.")}
    frozen = {n: x for n, x in arrays.items() if n not in trained}
    with jax.default_matmul_precision("highest"):
        loss, *_ = loss_and_gradients(assembly.structure, trained, {}, frozen, batch)
        micro = jax.tree.map(lambda x: x[0], batch)
        elm = assembly.structure.bind(arrays)
        logits = np.asarray(elm.llm.logits(elm.hidden(micro)))
    compare(NAME, "loss", loss, expected["loss"], 1e-5)
    assert micro.sample_ids[:, 0].tolist() == list(range(len(dataset)))
    real = np.concatenate([row[groups > 0] for row, groups in zip(logits, micro.group_ids, strict=True)])
    # Half a unit in the last place of the ECG already moves our own logits by 1e-5 of scale: the golden's bound.
    compare(NAME, "logits", real[::16], expected["logits_valid_every16"], 3e-5)


@pytest.mark.slow
def test_answers(run: tuple[Assembly, Arrays, Dataset], golden: Golden) -> None:
    assembly, arrays, dataset = run
    expected = json.loads((golden(NAME) / "evaluate.json").read_text())["result"]
    elm, found = assembly.structure.bind(arrays), []
    new = json.loads((golden(NAME) / "setup.json").read_text())["args"]["max_new_tokens"]
    eos = (assembly.tokenizer.eos_token_id,)
    for i in range(len(dataset)):
        signal = jax.tree.map(lambda x: jnp.asarray(x)[None, None], dataset.signals(i)[0])
        for prompt, truth in dataset.prompts(i):
            slot = np.full((1, len(prompt.ids)), -1, np.int32)
            slot[0, prompt.signal_positions.reshape(-1)] = np.arange(prompt.signal_positions.size)
            embeddings = elm.signal_embeddings(signal, jnp.ones((1, 1)))
            x = elm.inputs(jnp.asarray(prompt.ids)[None], jnp.asarray(slot), embeddings)
            ids = np.asarray(generate(elm.llm, inputs_embeds=x, max_new_tokens=new, eos_ids=eos))[0]
            found.append((prompt, truth, decode(ids, assembly.tokenizer, assembly.text.family)))
    words = assembly.tokenizer
    prompts = [words.decode(p.ids, skip_special_tokens=True).strip() for p, _, _ in found]
    record(NAME, "differing prompts", sum(a != b for a, b in zip(prompts, expected["prompts"], strict=True)), 0)
    record(NAME, "differing truths", sum(t != e for (_, t, _), e in zip(found, expected["references"], strict=True)), 0)
    answers = [a.strip() for _, _, a in found]
    record(NAME, "differing answers", sum(a != b for a, b in zip(answers, expected["hypotheses"], strict=True)), 0)
