"""Every mesh trains the same model, and what the rules divide is divided."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import towers
from flax import nnx
from support import LEADS, SIGNAL_LAYOUT, SIGNAL_TOKENS, RandomConversations, stack_micro_batches

from elm_jax.assemble import Assembly, assemble
from elm_jax.config import Config, MeshConfig, resolve
from elm_jax.data.batch import Batch, BatchShape, Group, collate
from elm_jax.data.loader import StepSource
from elm_jax.data.plan import Plan
from elm_jax.models.connectors import build_connector
from elm_jax.models.decoder import Decoder
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import build_encoder, merl
from elm_jax.models.families import scratch_config
from elm_jax.models.functional import Structure, structure_of
from elm_jax.models.hints import placed
from elm_jax.run.weights import Weights
from elm_jax.runtime.mesh import SMALL, MeshPlacement, array_shardings, batch_sharding, make_mesh, to_device
from elm_jax.scoring.rewards import REWARDS
from elm_jax.symbols.coder import EcgByte
from elm_jax.training import loop
from elm_jax.training.optim import make_optimizer
from elm_jax.training.state import TrainState, abstract_state, new_state, split_names
from elm_jax.training.step import loss_and_gradients, make_train_step

STEPS, MICRO_STEPS, ROWS = 20, 6, 8  # convolutions in the loop over micro-batches are slow on a CPU
TOLERANCE = 2e-5  # nats; 1e-4 is promised, 7e-6 was the worst seen
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
FROZEN, TRAINED = ("connector", "llm"), ("encoder", "connector", "llm")
HIDDEN, VOCABULARY = 128, 256  # so that every kind of matrix has SMALL elements or more

Sizes = tuple[int, int, int]


def build(dtype: Any = jnp.float32) -> ELM:
    rngs = nnx.Rngs(0)
    sizes = {"hidden": HIDDEN, "layers": 2, "heads": 8, "kv_heads": 8, "mlp": 2 * HIDDEN, "max_len": 128}
    encoder = build_encoder("merl", {"resnet_type": "tiny", "width": 128, "num_leads": LEADS}, SIGNAL_TOKENS, rngs)
    connector = build_connector("mlp", encoder.width, HIDDEN, rngs=rngs)
    llm = Decoder(scratch_config(sizes, VOCABULARY), rngs, remat="dots")
    return ELM(encoder, connector, llm, jnp.dtype(dtype))


@functools.cache
def structure(dtype: Any = jnp.float32) -> Structure:
    merl.LAYOUTS["tiny"] = (merl.basic, (1,))
    try:
        return structure_of(functools.partial(build, dtype))
    finally:
        del merl.LAYOUTS["tiny"]


@functools.cache
def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, leaf in structure().leaves.items():
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        scale = 0.0 if name.endswith(".mean") else 0.3 if "embedding" in name else 1.0
        drawn = scale * fan_in**-0.5 * rng.standard_normal(leaf.shape)
        value = np.ones(leaf.shape) if name.endswith((".scale", ".var")) else drawn
        arrays[name] = value.astype(np.float32)
    return arrays


@functools.cache
def batches(micro: int) -> list[Batch]:
    """Steps of shared, plain and empty rows; the rows of a step divide over `micro` micro-batches."""
    talk = RandomConversations(1)
    found = []
    for _ in range(4):
        rows = []
        for r in range(ROWS - 1):
            recording = talk.recording()
            asked = [talk.ask(recording, 3 + n, 1 + n % 2) for n in range(1 + r % 3)]
            rows.append([Group(5 + SIGNAL_TOKENS, asked), Group(0, [talk.ask(talk.recording(2), 3, 2, late_ecgs=1)])])
        rows.append([])
        each = ROWS // micro
        parts = [rows[m * each : (m + 1) * each] for m in range(micro)]
        with mock.patch("elm_jax.data.batch.BLOCK", 16):  # attention leaves out hidden blocks, on every mesh
            shape = BatchShape(64, 4, 16, key_blocks=4)
            found.append(stack_micro_batches([collate(part, shape, SIGNAL_LAYOUT) for part in parts]))
    return found


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    state: TrainState


def config(micro: int = 1) -> Config:
    return resolve(
        {
            "optim": {"lr": 3e-3, "accum_steps": micro, "grad_clip": 1.0, "schedule": "cosine"},
            "train": {"batch_size": ROWS, "steps": STEPS},
        }
    )


def train(sizes: Sizes, update: tuple[str, ...], micro: int = 1) -> Trained:
    settings = config(micro)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    shardings = array_shardings(structure(), mesh)
    arrays = {name: jax.device_put(x, shardings[name]) for name, x in initial().items()}
    trained, moving, frozen = split_names(structure(), update)
    tx = make_optimizer(settings.optim, settings.train, STEPS)
    kept = {n: arrays[n] for n in frozen}
    like = abstract_state(structure(), trained, moving, tx, mesh, shardings)
    state = new_state(arrays, like, tx)
    layout = jax.tree.map(lambda x: x.sharding, like)
    step = make_train_step(structure(), settings, tx, mesh, layout, {n: shardings[n] for n in frozen})
    losses, norms = [], []
    for k in range(STEPS if micro == 1 else MICRO_STEPS):
        batch = batches(micro)[k % len(batches(micro))]
        placed = jax.tree.map(lambda x: to_device(mesh, x, batch_sharding(mesh), row_axis=1), batch)
        state, metrics = step(state, kept, placed)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert step._cache_size() == 1, "the step was compiled again: its output is laid out differently from its input"
    return Trained(losses, norms, state)


@functools.cache
def alone(update: tuple[str, ...], micro: int = 1) -> Trained:
    return train((1, 1, 1), update, micro)


def assert_divided(state: TrainState, sizes: Sizes) -> None:
    """Weights of the LLM and the connector lie over fsdp x tensor, kernels of the encoder over fsdp."""
    _, fsdp, tensor = sizes
    large = 0
    for path, array in jax.tree_util.tree_leaves_with_path(state):
        if array.size < SMALL:
            continue
        large += 1
        name = jax.tree_util.keystr(path)
        ways = fsdp if "encoder." in name else fsdp * tensor
        shapes = {shard.data.shape for shard in array.addressable_shards}
        assert len(array.addressable_shards) == 8 and len(shapes) == 1, name
        assert np.prod(shapes.pop()) * ways == array.size, f"{name} {array.shape} is not in {ways} parts"
    # q, k, v, o, gate, up, down, embedding, head or not, two of the connector; and two moments of each.
    assert large >= 3 * 10


@pytest.mark.slow
@pytest.mark.parametrize("update", [FROZEN, TRAINED], ids=["frozen", "trained"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_has_the_losses_of_one_device(sizes: Sizes, update: tuple[str, ...]) -> None:
    expected, found = alone(update), train(sizes, update)
    assert expected.losses[-1] < 0.8 * expected.losses[0], "nothing was learnt, so nothing was compared"
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-4)
    for name, value in expected.state.statistics.items():
        # Adam turns rounding of gradients near zero into steps of the kernels, which these statistics follow.
        scale = float(jnp.abs(value).max())
        np.testing.assert_allclose(found.state.statistics[name], value, rtol=0, atol=2e-3 * scale, err_msg=name)
    assert bool(expected.state.statistics) == (update == TRAINED)
    assert_divided(found.state, sizes)


@pytest.mark.slow  # long: compiles for a mesh of eight and for one device
def test_micro_batches_on_a_mesh_have_the_losses_of_one_device() -> None:
    expected, found = alone(TRAINED, 2), train((2, 2, 2), TRAINED, 2)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_frozen_micro_batches_have_the_losses_of_one_batch() -> None:
    """Without batch statistics, accumulation changes nothing at all."""
    np.testing.assert_allclose(alone(FROZEN, 2).losses, alone(FROZEN).losses[:MICRO_STEPS], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_the_trainer_on_a_mesh_has_the_losses_of_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.prepare(monkeypatch, tmp_path / "cache")

    def run(name: str, **mesh: int) -> dict[int, dict[str, Any]]:
        loop.train(runs.config(tmp_path / name, train__steps=6, **mesh))
        return runs.logged(tmp_path / name)

    found = run("mesh", mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    expected = run("alone")
    assert found.keys() == expected.keys() == set(range(1, 7))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), f"step {step}"


LEARNING: dict[str, dict[str, Any]] = {
    "sapo": {"rl__answers": 3, "rl__max_new_tokens": 4, "rl__rewards": ["of_length"], "rl__kl": 0.1},
    "dpo": {},
}


@functools.cache
def learnt_alone(objective: str, folder: Path) -> dict[int, dict[str, Any]]:
    with mock.patch.object(loop, "make_mesh", lambda _: make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        return learnt(objective, folder, (1, 1, 1))


def learnt(objective: str, folder: Path, sizes: Sizes) -> dict[int, dict[str, Any]]:
    """What is logged of answers that the model draws, or of pairs."""
    pairs = folder / "pairs.jsonl"
    if objective == "dpo" and not pairs.exists():
        rows = [
            {"ecg_path": f"demo:train:{i}", "prompt": f"How fast is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
            for i in range(16)
        ]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        LEARNING["dpo"]["data__names"] = [str(pairs)]
    workdir = folder / f"{objective}-{'-'.join(map(str, sizes))}"
    mesh = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    made = runs.config(
        workdir, objective=objective, train__steps=4, train__save_every=4, data__max_len=128, data__val_fraction=0.0,
        llm__scratch={**runs.TINY["llm.scratch"], "layers": 1}, **LEARNING[objective], **mesh,
    )  # fmt: skip
    assert loop.train(made)
    told = (*runs.VALUES, "reward", "ratio", "kl", "answer_tokens", "margin", "chosen", "rejected")
    lines = [line for line in runs.lines(workdir) if "loss" in line]
    return {line["step"]: {name: line[name] for name in told if name in line} for line in lines}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learnt")


@pytest.mark.slow  # long: answers and steps are compiled for each mesh, so that not every pair is tested each time
@pytest.mark.parametrize(("objective", "sizes"), [("sapo", (2, 2, 2)), ("dpo", (1, 8, 1))], ids=str)
def test_answers_and_pairs_are_learnt_alike_on_every_mesh(
    objective: str, sizes: Sizes, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.prepare(monkeypatch, place / "cache")
    monkeypatch.setitem(REWARDS, "of_length", lambda answered: len(answered.answer) % 5)
    expected, found = learnt_alone(objective, place), learnt(objective, place, sizes)
    assert found.keys() == expected.keys() == set(range(1, 5))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4, abs=2e-5), f"step {step}"


WIDE = {"d_model": 128, "n_heads": 2, "dim_ff": 128, "num_layers": 1}  # some of its matrices have SMALL elements
OF_ENCODERS: dict[str, dict[str, Any]] = {
    "dit": {"encoder__config": {**WIDE, "num_steps": 4}, "data__segment_len": 50, "data__sampling_rate": 5},
    "next_token": {
        "encoder__config": {**WIDE, "max_seq_len": 56}, "data__representation": "symbolic", "data__leads": ["II"],
        "data__segment_len": 50, "data__sampling_rate": 5,
    },
    "merl": {
        "encoder__config": {**runs.TINY["encoder.config"], "proj_hidden": 128, "proj_out": 128}, "data__max_len": 16
    },
}  # fmt: skip


class Learner(NamedTuple):
    assembly: Assembly
    arrays: dict[str, np.ndarray]
    batch: Batch


@functools.cache
def learner(objective: str, folder: Path) -> Learner:
    """An encoder alone with the first step of its run, of 7 recordings and an empty row."""
    own = {"next_token": {"data__ecg_tokenizer": folder / "ecg_byte.json"}, "merl": {"ssl__text": folder / "bert"}}
    if objective == "next_token":
        EcgByte([bytes([letter]) * 2 for letter in b"abcdefgh"]).save(folder / "ecg_byte.json")
    if objective == "merl":
        towers.bert_folder(folder / "bert")
    assembly = assemble(runs.config(
        folder / objective, objective=objective, encoder__name=objective, update="encoder", data__val_fraction=0.0,
        data__names=["demo:train=7,val=1,test=1"], **OF_ENCODERS[objective], **own.get(objective, {}),
    ))  # fmt: skip
    dataset, data = assembly.dataset("train"), assembly.config.data
    index = dataset.length_index(data.share, data.max_bad_records)
    plan = Plan(index, max_len=data.max_len, rows=ROWS, pack=False, seed=0, ways=1)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arrays = Weights(assembly).place(array_shardings(assembly.structure, mesh))
    return Learner(assembly, jax.device_get(arrays), StepSource(dataset, plan, steps=1)[0].batch)


def gradients_of(one: Learner, sizes: Sizes) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of the step and its gradients, computed as the train step does on a mesh."""
    shape, mesh = one.assembly.structure, make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    shardings = array_shardings(shape, mesh)
    arrays = {name: jax.device_put(x, shardings[name]) for name, x in one.arrays.items()}
    parts = [{n: arrays[n] for n in names} for names in split_names(shape, ("encoder",))]

    def run(trained: Any, moving: Any, frozen: Any, batch: Batch) -> Any:
        with placed(MeshPlacement(mesh)):
            key, objective = jax.random.key(0), one.assembly.objective
            return loss_and_gradients(shape, trained, moving, frozen, batch, key, objective=objective)[:2]

    rows = jax.device_put(one.batch, batch_sharding(mesh))
    loss, gradients = jax.jit(run, out_shardings=(None, {n: shardings[n] for n in parts[0]}))(*parts, rows)
    return float(loss), jax.device_get(gradients)


@functools.cache
def gradients_alone(one: str, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    return gradients_of(learner(one, folder), (1, 1, 1))


@pytest.mark.slow  # compiles for each mesh
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("objective", OF_ENCODERS)
def test_encoders_alone_have_the_gradients_of_one_device(
    objective: str, sizes: Sizes, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.prepare(monkeypatch, place / "cache")
    expected, theirs = gradients_alone(objective, place)
    found, ours = gradients_of(learner(objective, place), sizes)
    assert found == pytest.approx(expected, rel=1e-6) and any(x.size >= SMALL for x in theirs.values())
    largest = max(float(np.abs(x).max()) for x in theirs.values())
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-4, atol=5e-6 * largest, err_msg=name)


def lowered(dtype: Any) -> Any:
    """The step on an fsdp mesh, in a compute dtype."""
    settings = config()
    mesh = make_mesh(MeshConfig(1, 8, 1))
    shape = structure(dtype)
    shardings = array_shardings(shape, mesh)
    trained, moving, _ = split_names(shape, TRAINED)
    tx = make_optimizer(settings.optim, settings.train, STEPS)
    state = abstract_state(shape, trained, moving, tx, mesh, shardings)
    step = make_train_step(shape, settings, tx, mesh, jax.tree.map(lambda x: x.sharding, state), {})
    return step.lower(state, {}, batches(1)[0])


@pytest.mark.slow
def test_weights_are_cast_before_they_are_gathered() -> None:
    """The collectives of CPU widen bfloat16, so this reads the constraints that decide what travels."""
    text = lowered(jnp.bfloat16).as_text()
    constrained = re.findall(r"sharding_constraint [^\n]*: tensor<(\d+x\d+)x(\w+)>", text)
    of_weights = [kind for shape, kind in constrained if shape in (f"{HIDDEN}x{2 * HIDDEN}", f"{2 * HIDDEN}x{HIDDEN}")]
    assert len(of_weights) >= 6 and set(of_weights) == {"bf16"}


@pytest.mark.slow
def test_layers_are_gathered_one_at_a_time() -> None:
    text = lowered(jnp.float32).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
    assert f"{HIDDEN},{2 * HIDDEN}" in gathered, "no layer's weights are gathered"
    stacked = [shape for shape in gathered if shape.startswith("2,") and shape.count(",") == 2 and "128" in shape]
    assert not stacked, f"all layers are gathered at once: {stacked}"
