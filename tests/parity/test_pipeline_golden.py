"""The whole way of the reference, from recordings to answers, through our own parts under its compat preset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity_log import compare, record

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import RlConfig, resolve
from elm_jax.data.batch import Batch, BatchShape, Conversation, Group, collate
from elm_jax.data.dataset import Dataset
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.inference.generate import generate
from elm_jax.models.connectors import RULES
from elm_jax.models.functional import Arrays
from elm_jax.objectives import log_probs, objective_of
from elm_jax.run.weights import Weights
from elm_jax.text.render import decode
from elm_jax.training.optim import make_optimizer
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


def test_a_step_of_the_references_reinforcement_learning(
    run: tuple[Assembly, Arrays, Dataset], golden: Golden
) -> None:
    """Two prompts, four given answers each: log probabilities, advantages, two updates."""
    name = "rl_train_step_qwen"
    trace = json.loads((golden(name) / "trace.json").read_text())
    given, wanted = (dict(np.load(golden(name) / f"{file}.npz")) for file in ("inputs", "outputs"))
    assembly, arrays, dataset = run
    config = replace(
        assembly.config, objective="sapo",
        rl=RlConfig(answers=4, max_new_tokens=48, temperature=trace["args"]["rl_temperature"], top_p=1.0),
        optim=replace(assembly.config.optim, lr=1e-3, grad_clip=1.0, warmup_ratio=0.0),
    )  # fmt: skip
    objective = objective_of(config)
    experience = objective.samples.experience
    assert experience is not None and experience.updates == trace["args"]["rl_updates_per_rollout"]
    family, rows = assembly.text.family, []
    for i, rollout in enumerate(trace["rollouts"]):
        prompt, masks = rollout["pL"], wanted[f"{i}/resp_mask"].astype(bool)
        real = given["elm_attention_mask"][i] == 1
        positions = given["signal_id_indices"][i] - int(real.argmax())
        truth = decode(given["elm_labels"][i][given["elm_labels"][i] >= 0], assembly.tokenizer, family)
        answers = [ids[mask] for ids, mask in zip(given[f"sampled_{i}"], masks, strict=True)]
        texts = [decode(ids, assembly.tokenizer, family).strip() for ids in answers]
        assert texts == trace["texts"][i]
        parts = [experience.reward(None, text, truth) for text in texts]
        means = {part: np.mean([found[part] for found in parts]) for part in ("format", "tags", "answer")}
        assert list(means.values()) == pytest.approx(list(rollout["mean_reward_components"].values()))
        rewards = np.asarray([[sum(found.values()) for found in parts]])
        advantages = experience.advantages(rewards)[0]
        np.testing.assert_allclose(advantages, wanted[f"{i}/advantages"][:, 0], atol=1e-5)
        begin = wanted[f"{i}/full_ids"][0][:prompt][wanted[f"{i}/full_attn"][0][:prompt] == 1]
        branches = []
        for ids, advantage in zip(answers, advantages, strict=True):
            whole = np.concatenate([begin, ids]).astype(np.int32)
            extras = {"advantage": float(advantage), "learnt": 1.0}
            supervised = np.arange(len(whole)) >= len(begin)
            branches.append(Conversation(i, whole, supervised, positions[None], dataset.signals(i), extras))
        rows.append([Group(len(begin), branches)])
    batch = collate(rows, BatchShape(256, 1, 64), assembly.signal.layout, objective.samples.extras)

    def probabilities(arrays: Arrays) -> jax.Array:
        elm = assembly.structure.bind(arrays)
        return log_probs(elm.llm, elm.hidden(batch), batch, objective.temperature)

    trained = {n: x for n, x in arrays.items() if not n.startswith("encoder.")}
    frozen = {n: x for n, x in arrays.items() if n not in trained}
    optimizer = make_optimizer(config.optim, config.train, 2, set())
    state, losses = optimizer.init(trained), []
    with jax.default_matmul_precision("highest"):
        old = probabilities(arrays)
        for i in range(len(rows)):
            masks, ours = wanted[f"{i}/resp_mask"].astype(bool), np.asarray(old[i][batch.target_weights[i] > 0])
            compare(name, "log probabilities", ours, wanted[f"{i}/old_log_prob"][masks], 2e-4)
        batch = batch._replace(extras={**batch.extras, "old": old})
        for _ in range(experience.updates):
            whole = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
            loss, gradients, _, others = loss_and_gradients(
                assembly.structure, trained, {}, frozen, whole, objective=objective
            )
            losses.append((float(loss), {told: float(value) for told, value in others.items()}))
            norm = optax.tree.norm(gradients)
            gradients = jax.tree.map(lambda g, norm=norm: g * jnp.minimum(1.0, 1.0 / (norm + 1e-6)), gradients)
            updates, state = optimizer.update(gradients, state, trained)
            trained = optax.apply_updates(trained, updates)
    calls = trace["loss_calls"]
    for update, (loss, others) in enumerate(losses):
        theirs = calls[2 * update : 2 * update + 2]
        compare(name, f"loss of update {update + 1}", loss, sum(call["loss"] for call in theirs), 1e-4)
        tokens = [float((batch.target_weights[i] > 0).sum()) for i in range(2)]
        for ours, told in (("kl_from_old", "ppo_kl"), ("sapo_weight", "sapo_weight")):
            mean = np.average([call[f"actor/{told}"] for call in theirs], weights=tokens)
            np.testing.assert_allclose(others[ours], mean, rtol=1e-3, atol=1e-4)
    for rule in RULES[str(assembly.config.view.connector)]:
        (theirs,) = [n for n in wanted if n.startswith("final/") and n.endswith(rule.theirs)]
        expected = rule.arrange([wanted[theirs]])
        np.testing.assert_allclose(trained[f"connector.{rule.ours}"], expected, atol=2e-4)
