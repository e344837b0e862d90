"""`configs/reference`: the reference's own recipe. On real recordings and questions, packed and not, the losses of each
step are those of its training loop, written here once more in PyTorch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from elm_jax.assemble import Assembly, assemble
from elm_jax.cli import ConfigFlags, read_config_file
from elm_jax.config import Config, resolve
from elm_jax.data.plan import Plan
from elm_jax.run.weights import Weights
from elm_jax.text.render import add_tokens
from elm_jax.training import loop

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "reference").glob("[!_]*.py"))
BATCH, ACCUM, EPOCHS, QUESTIONS = 16, 2, 2, 100  # the last step of an epoch has one micro-batch only
MAX_LEN = 4096  # the shortest packed rows are an eighth of it, and hold two of these conversations
LR, WARMUP, DECAY, BETAS = 1e-4, 0.1, 1e-2, (0.9, 0.99)  # what the reference's commands say nothing about


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_config_has_the_references_recipe(name: str) -> None:
    tree, stem = read_config_file(str(ROOT / "configs" / "reference" / f"{name}.py"))
    c = resolve(tree, stem)
    assert c.workdir == f"runs/reference/{name}" and c.compat == ("elm-2026-08",) and c.encoder.tokens == 1
    assert (c.train.conversations, c.train.batch_size, c.train.epochs, c.optim.ref_batch) == (1, None, 1, 1)
    assert (c.optim.schedule, c.optim.warmup_ratio, c.optim.weight_decay) == ("constant", WARMUP, DECAY)
    assert (c.optim.beta1, c.optim.beta2, c.optim.grad_clip, c.optim.accum_steps) == (*BETAS, 0.0, 1)
    assert (c.llm.param_dtype, c.llm.lora.rank, c.data.val_fraction) == ("bfloat16", 0, 0.0)
    phases = {"pretrain_connector": ("adamw", 5e-4), "finetune": ("adamw", LR)}
    assert (c.optim.name, c.optim.lr) == phases.get(name, ("adam", LR))


def made_records(shared: Path, folder: Path) -> None:
    """Real questions about one recording each, and these recordings."""
    source, found = shared / "real" / "ecg" / "ptbxl", []
    for path in sorted((shared / "real" / "text" / "ecgqa" / "ptbxl" / "paraphrased").glob("*/*.json")):
        found += [item for item in json.loads(path.read_text()) if len(item["ecg_id"]) == 1]
    with (folder / "records.jsonl").open("w") as file:
        for item in found[:QUESTIONS]:
            (header,) = source.rglob(f"{item['ecg_id'][0]:05d}_hr.hea")
            for suffix in (".hea", ".dat"):
                shutil.copy(header.with_suffix(suffix), folder)
            text = [item["question_type"], item["question"], item["answer"]]
            row = {"ecg_path": header.name, "text": json.dumps(text), "name": "x", "patient_id": header.stem}
            file.write(json.dumps(row) + "\n")


def made_llm(tokenizer: Path, folder: Path) -> None:
    """A tiny Qwen2 whose vocabulary is the tokenizer's with what training adds to it."""
    shutil.copytree(tokenizer, folder)
    words = AutoTokenizer.from_pretrained(folder)
    add_tokens(words)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=MAX_LEN, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def small(shared: Path, folder: Path, workdir: Path, **changes: Any) -> Config:
    """configs/reference/llava_merl.py with a small model, in float32, of which one GPU takes BATCH conversations."""
    values: dict[str, Any] = {
        "llm.name": folder / "llm", "llm.compute_dtype": "float32", "llm.param_dtype": "float32",
        "encoder.config": {"resnet_type": "resnet18", "width": 8}, "data.root": folder, "data.names": "records.jsonl",
        "data.max_len": MAX_LEN, "train.conversations": BATCH * ACCUM, "optim.accum_steps": ACCUM,
        "optim.ref_batch": BATCH * ACCUM, "train.epochs": EPOCHS, "train.log_every": 1, "log.progress": False,
        "workdir": workdir, **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    text = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}
    config = str(ROOT / "configs" / "reference" / "llava_merl.py")
    return ConfigFlags.parse(["--config", config, *(f"--config.{n}={v}" for n, v in text.items())]).load()


def reference_losses(folder: Path, assembly: Assembly, order: list[list[int]]) -> list[float]:
    """The loop of the reference over micro-batches of these samples: left-padded rows of one conversation each."""
    dataset, device = assembly.dataset("train"), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = Weights(assembly).place(dict.fromkeys(assembly.structure.leaves, device))
    elm = assembly.structure.bind(arrays)
    llm = Qwen2ForCausalLM.from_pretrained(folder / "llm", attn_implementation="eager").float()
    sizes = [arrays[f"connector.{part}.kernel"].shape for part in ("hidden", "projection")]
    layers = [torch.nn.Linear(inputs, outputs) for inputs, outputs in sizes]
    for layer, part in zip(layers, ("hidden", "projection"), strict=True):
        layer.load_state_dict({
            "weight": torch.from_numpy(np.array(arrays[f"connector.{part}.kernel"]).T.copy()),
            "bias": torch.from_numpy(np.array(arrays[f"connector.{part}.bias"])),
        })  # fmt: skip
    connector = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])
    an_epoch = len(order) // EPOCHS  # micro-batches
    warmup = int(WARMUP * math.ceil(an_epoch / ACCUM) * EPOCHS)
    optimizer = torch.optim.Adam(
        [*llm.parameters(), *connector.parameters()], lr=LR, betas=BETAS, eps=1e-8, weight_decay=DECAY
    )
    losses, total = [], 0.0
    for number, samples in enumerate(order):
        rendered = [dataset.render(i) for i in samples]
        longest = max(len(one.ids) for one in rendered)
        ids, labels = np.full((2, len(samples), longest), -100)
        signals = jnp.asarray(np.stack([np.asarray(dataset.signals(i)[0]["ecg"]) for i in samples]))
        features = torch.from_numpy(np.array(elm.encoder(signals, jnp.ones(len(samples)), train=False)))
        places = []
        for row, one in enumerate(rendered):
            ids[row, longest - len(one.ids) :] = one.ids
            labels[row, longest - len(one.ids) :] = np.where(one.supervised, one.ids, -100)
            places.append(longest - len(one.ids) + one.signal_positions[0])
        mask = torch.from_numpy(ids >= 0)
        x = llm.get_input_embeddings()(torch.from_numpy(np.maximum(ids, 0)))
        index = torch.from_numpy(np.stack(places))[..., None].expand(-1, -1, x.shape[-1])
        out = llm(
            inputs_embeds=x.scatter(1, index, connector(features)), attention_mask=mask, labels=torch.from_numpy(labels)
        )
        loss = out.loss / ACCUM
        loss.backward()
        total += loss.item()
        place = number % an_epoch + 1
        if place % ACCUM == 0 or place == an_epoch:
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (len(losses) + 1) / max(1, warmup))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            total = 0.0
    return losses


@pytest.mark.slow  # long: the reference's loop in PyTorch beside two trainings of ours
def test_llava_merl_has_the_losses_of_the_references_loop_packed_and_not(
    shared: Path, golden: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELM_JAX_CACHE", str(tmp_path / "cache"))
    made_records(shared, tmp_path)
    made_llm(golden("text_tokenizer_qwen"), tmp_path / "llm")
    assembly = assemble(small(shared, tmp_path, tmp_path / "none"))
    index = assembly.dataset("train").length_index("none", 0.0)
    plan = Plan(index, conversations=BATCH * ACCUM, micro_batches=ACCUM, max_len=MAX_LEN, pack=False, seed=0)
    order = []
    for step in range(plan.steps_before(EPOCHS)):
        samples = [row[0].samples[0] for row in plan.rows(step) if row]
        order += [samples[first : first + BATCH] for first in range(0, len(samples), BATCH)]
    assert sorted(s for part in order for s in part) == sorted(EPOCHS * list(range(QUESTIONS)))
    expected = reference_losses(tmp_path, assembly, order)
    packed = Plan(index, conversations=BATCH * ACCUM, micro_batches=ACCUM, max_len=MAX_LEN, pack=True, seed=0)
    assert len([row for row in packed.rows(0) if row]) < 0.8 * BATCH * ACCUM
    for pack in (True, False):
        workdir = tmp_path / f"pack={pack}"
        loop.train(small(shared, tmp_path, workdir, data__pack=pack))
        found = [line["loss"] for line in runs.logged(workdir).values()]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
