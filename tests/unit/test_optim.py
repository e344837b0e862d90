"""Schedules, clipping and updates are the reference's; what they are given in float64, these compute in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity_log import compare, record
from support import VOCABULARY, RandomConversations, batch_of, tiny_elm

from elm_jax.config import OptimConfig, TrainConfig
from elm_jax.data.batch import Group
from elm_jax.keys import MuonConfig
from elm_jax.models.decoder import Decoder
from elm_jax.models.elm import ELM
from elm_jax.models.families import scratch_config
from elm_jax.models.functional import Leaf, structure_of
from elm_jax.models.names import Rule
from elm_jax.training.muon import is_matrix_by_name, matrices, matrices_by_name, orthogonalised
from elm_jax.training.optim import (
    batch_scale,
    clip_coefficient,
    learning_rate_multiplier,
    make_optimizer,
    weight_decay,
)
from elm_jax.training.step import loss_and_gradients

ROUNDING = 1e-6  # some units in the last place of float32
Golden = Callable[[str], Path]


@pytest.fixture(scope="module")
def cases(golden: Golden) -> dict[str, Any]:
    return json.loads((golden("optim_schedule") / "cases.json").read_text())


def test_multipliers(cases: dict[str, Any]) -> None:
    """At every step, and past the last one."""
    assert {case["schedule"] for case in cases["multipliers"]} == {"constant", "cosine", "inv_sqrt"}
    for case in cases["multipliers"]:
        config = OptimConfig(
            schedule=case["schedule"], warmup_ratio=case["warmup_ratio"], min_lr_ratio=case["min_lr_ratio"]
        )
        multiplier = learning_rate_multiplier(config, case["max_steps"])
        found = [float(multiplier(step)) for step in range(len(case["multipliers"]))]
        compare("optim_schedule", f"multipliers of {case['schedule']}", found, case["multipliers"], ROUNDING)


def test_scaling_with_the_batch(cases: dict[str, Any]) -> None:
    for case in cases["scaling"]:
        # Ours counts all rows of a step; theirs those of a micro-batch.
        optim = OptimConfig(
            lr=1e-3, ref_batch=case["ref_global_bs"] or None, weight_decay=case["weight_decay"],
            weight_decay_scale=case["scale_wd"], accum_steps=case["grad_accum_steps"],
        )  # fmt: skip
        train = TrainConfig(batch_size=case["batch_size"] * case["grad_accum_steps"])
        assert train.batch_size == case["eff_bs"]
        scale = batch_scale(optim, train)
        compare("optim_schedule", "batch scale", scale, case["scale"], 1e-12)
        compare("optim_schedule", "peak rate", optim.lr * scale, case["peak_lr"], 1e-12)
        compare("optim_schedule", "weight decay", weight_decay(optim, train), case["effective_wd"], 1e-12)


def test_clipping(golden: Golden) -> None:
    with np.load(golden("optim_clip") / "cases.npz") as file:
        stored = dict(file)
    numbers = sorted({name.split("/")[0] for name in stored})
    assert numbers
    for n in numbers:
        gradients = {g: jnp.asarray(stored[f"{n}/{g}"]) for g in ("g0", "g1")}
        norm = optax.tree.norm(gradients)
        compare("optim_clip", "norm", norm, stored[f"{n}/norm"], ROUNDING)
        coefficient = clip_coefficient(norm, float(stored[f"{n}/max_norm"]))
        for g, value in gradients.items():
            compare("optim_clip", "clipped", value * coefficient, stored[f"{n}/{g.replace('g', 'c')}"], ROUNDING)


def test_clipping_keeps_away_from_zero_as_torch_does() -> None:
    assert float(clip_coefficient(jnp.float32(1e-6), 1e-7)) == pytest.approx(0.05, rel=1e-5)


def test_a_limit_of_zero_clips_nothing() -> None:
    assert float(clip_coefficient(jnp.float32(1e6), 0.0)) == 1.0


def test_updates(golden: Golden) -> None:
    """Three steps; Adam has the decay in the gradient, AdamW beside it."""
    with np.load(golden("optim_updates") / "cases.npz") as file:
        stored = {name: file[name] for name in file.files if name.startswith("adam")}
    names = sorted({name.split("/")[0] for name in stored})
    assert {name.split("_")[0] for name in names} == {"adam", "adamw"}
    for name in names:
        kind, _, decay = name.split("_")
        optim = OptimConfig(
            name=kind, lr=1e-2, weight_decay=float(decay.removeprefix("wd")), warmup_ratio=0.0, beta1=0.9, beta2=0.99
        )
        tx = make_optimizer(optim, TrainConfig(), 3)
        weights = {"w": jnp.asarray(stored[f"{name}/w0"])}
        state = tx.init(weights)
        for gradient, expected in zip(stored[f"{name}/grads"], stored[f"{name}/w"], strict=True):
            updates, state = jax.jit(tx.update)({"w": jnp.asarray(gradient)}, state, weights)
            weights = optax.apply_updates(weights, updates)
            compare("optim_updates", name, weights["w"], expected, ROUNDING)


@pytest.mark.parametrize("whole", [False, True], ids=["small", "all"])
def test_muon_updates(golden: Golden, request: pytest.FixtureRequest, whole: bool) -> None:
    """Three steps. Ours keep (in, out), theirs (out, in); PyTorch iterates in bfloat16, which costs it digits."""
    folder = request.getfixturevalue("shared") / "golden/optim_updates" if whole else golden("optim_updates")
    with np.load(folder / "cases.npz") as file:
        stored = {name: file[name] for name in file.files if name.startswith("muon")}
    noise: dict[str, float] = {}
    for part in json.loads((folder / "muon_bf16_vs_f32.json").read_text()):
        noise |= part
    names = sorted({name.split("/")[0] for name in stored})
    assert set(names) <= set(noise) and names
    for name in names:
        decay = float(name.split("_wd")[1])
        optim = OptimConfig(name="muon", lr=1e-2, weight_decay=decay, warmup_ratio=0.0)
        tx = make_optimizer(optim, TrainConfig(), 3, {"w": -1})
        weights = {"w": jnp.asarray(stored[f"{name}/w0"].T)}
        state = tx.init(weights)
        exact, rounded = stored[f"{name}/w_float32_newton_schulz"], stored[f"{name}/w"]
        for step, gradient in enumerate(stored[f"{name}/grads"]):
            updates, state = jax.jit(tx.update)({"w": jnp.asarray(gradient.T)}, state, weights)
            weights = optax.apply_updates(weights, updates)
            compare("optim_updates", f"{name}, float32", weights["w"].T, exact[step], 1e-5)
            off = float(np.abs(weights["w"].T - rounded[step]).max())
            record("optim_updates", f"{name}, against PyTorch's bfloat16", off, noise[name] + 1e-5)


def test_muon_takes_stacked_layers_apart() -> None:
    """Each layer of a stack moves as it does alone; the first step has no noise of the other layers in it."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((3, 6, 4)).astype(np.float32) * [[[1]], [[100]], [[1e-3]]]
    optim = OptimConfig(name="muon", weight_decay=0.1)
    tx = make_optimizer(optim, TrainConfig(), 10, {"w": -1})
    stack = jnp.asarray(rng.standard_normal((3, 6, 4)), jnp.float32)
    together, _ = tx.update({"w": jnp.asarray(gradients, jnp.float32)}, tx.init({"w": stack}), {"w": stack})
    for layer in range(3):
        weights = {"w": stack[layer]}
        alone, _ = tx.update({"w": jnp.asarray(gradients[layer], jnp.float32)}, tx.init(weights), weights)
        np.testing.assert_allclose(together["w"][layer], alone["w"], rtol=1e-5, atol=1e-9)


def test_orthogonalised_multiplies_in_float32_on_every_device() -> None:
    steps = jax.make_jaxpr(lambda x: orthogonalised(x, 5))(jnp.ones((6, 4))).jaxpr.eqns
    inner = [eqn for step in steps for eqn in (step.params["jaxpr"].eqns if "jaxpr" in step.params else [step])]
    products = [eqn for eqn in inner if eqn.primitive.name == "dot_general"]
    assert len(products) == 15
    assert all(eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for eqn in products)


def test_orthogonalised_has_singular_values_near_one() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 24, 10))
    values = np.linalg.svd(np.asarray(orthogonalised(x, 5)), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert not np.any(np.asarray(orthogonalised(jnp.zeros((3, 3)), 5)))


def test_what_is_no_matrix_is_moved_by_adamw_at_its_own_rate() -> None:
    """And rates and decay of both follow the batch."""
    optim = OptimConfig(
        name="muon", lr=1e-2, weight_decay=0.5, weight_decay_scale="inv_sqrt", ref_batch=2, warmup_ratio=0.0,
        muon=MuonConfig(adamw_lr_ratio=0.1),
    )  # fmt: skip
    train = TrainConfig(batch_size=8)
    params = {"kernel": jnp.eye(4), "bias": jnp.full((4,), 2.0)}
    gradients = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
    tx = make_optimizer(optim, train, 1, {"kernel": -1})
    updates, state = tx.update(gradients, tx.init(params), params)
    rate, decay = 1e-2 * 4, 0.5 / 2
    np.testing.assert_allclose(updates["bias"], -rate * 0.1 * (1 + decay * 2), rtol=1e-5)
    expected = -rate * (orthogonalised(jnp.eye(4), 5) + decay * jnp.eye(4))
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5, atol=1e-8)
    shapes = sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)
    assert shapes == [(4,), (4,), (4, 4)]  # two moments of the bias, one momentum of the kernel


def test_matrices_are_found_by_their_role() -> None:
    structure, _ = tiny_elm()
    found = matrices(structure.leaves)
    projections = {f"llm.layers.attention.{n}.kernel" for n in "qkvo"}
    projections |= {f"llm.layers.mlp.{n}.kernel" for n in ("gate", "up", "down")}
    assert {name for name in found if name.startswith("llm.")} == projections
    assert {name for name in found if name.startswith("connector.")} == {
        "connector.hidden.kernel", "connector.projection.kernel"
    }  # fmt: skip
    assert not any(".conv" in name or "norm" in name or name.endswith("bias") for name in found)


def test_the_reference_chooses_matrices_by_name(golden: Golden) -> None:
    cases = json.loads((golden("optim_muon_split") / "cases.json").read_text())
    entries = [entry for case in cases.values() for entry in case.items()]
    assert len(entries) > 300
    wrong = [name for name, (shape, muon) in entries if is_matrix_by_name(name, len(shape)) != muon]
    record("optim_muon_split", f"wrong of {len(entries)} names", len(wrong), 0)


def test_by_name_embeddings_of_another_name_are_matrices_and_stacks_are_not_counted_as_one_dimension_more() -> None:
    leaves = {
        "llm.table": Leaf((100, 8), jnp.float32, ("vocab", "embed"), False),
        "llm.layers.q.kernel": Leaf((2, 8, 8), jnp.float32, ("embed", "heads"), False),
        "llm.layers.q.bias": Leaf((2, 8), jnp.float32, ("heads",), False),
        "llm.layers.q.lora.a": Leaf((2, 8, 4), jnp.float32, ("embed", None), False),
        "encoder.stem.kernel": Leaf((3, 12, 8), jnp.float32, (None, None, "conv_out"), False),
        "encoder.to_patch_embedding.kernel": Leaf((9, 8), jnp.float32, ("signal", None), False),
    }
    rules = {
        "llm.table": Rule("wte.weight", "table"),
        "llm.layers.q.kernel": Rule("h.{layer}.q.weight", "layers.q.kernel"),
        "llm.layers.q.bias": Rule("h.{layer}.q.bias", "layers.q.bias"),
        "encoder.stem.kernel": Rule("stem.weight", "stem.kernel", transpose=True),
        "encoder.to_patch_embedding.kernel": Rule("to_patch_embedding.weight", "x", transpose=True),
    }
    assert matrices_by_name(leaves, rules) == {
        "llm.table": -2, "llm.layers.q.kernel": -2, "llm.layers.q.lora.a": -1
    }  # fmt: skip


def test_micro_batches_can_count_alike_whatever_their_tokens() -> None:
    """The mean over micro-batches of their own means, where by default each token counts alike."""
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16, "max_len": 64}

    def build() -> ELM:
        return ELM(None, None, Decoder(scratch_config(sizes, VOCABULARY), nnx.Rngs(0)), jnp.dtype(jnp.float32))

    structure = structure_of(build)
    arrays = jax.jit(lambda: structure.arrays(build()))()
    talk = RandomConversations(2)
    batches = [batch_of([[Group(0, [talk.ask([], answer=n)])]], 32, 0, 8) for n in (1, 6)]
    both = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    run = jax.jit(lambda batch, alike: loss_and_gradients(structure, arrays, {}, {}, batch, None, alike)[:2],
                  static_argnums=1)  # fmt: skip
    (first, first_gradients), (second, second_gradients) = (run(batch, True) for batch in batches)
    loss, gradients = run(both, True)
    np.testing.assert_allclose(loss, (first + second) / 2, rtol=1e-5)
    for name, gradient in gradients.items():
        expected = (first_gradients[name] + second_gradients[name]) / 2
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(run(both, False)[0], (first + 6 * second) / 7, rtol=1e-5)


def test_the_rate_follows_the_schedule_and_the_batch() -> None:
    """One step of Adam on a fresh state moves by the rate, whatever the gradient."""
    optim = OptimConfig(
        name="adam", lr=1e-2, ref_batch=4, weight_decay=0.0, schedule="cosine", warmup_ratio=0.5, eps=1e-12
    )
    tx = make_optimizer(optim, TrainConfig(batch_size=8), 4)
    weights = {"w": jnp.zeros(1)}
    updates, _ = tx.update({"w": jnp.ones(1)}, tx.init(weights), weights)
    assert float(updates["w"][0]) == pytest.approx(-1e-2 * 8 / 4 * 0.5, rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_the_state_counts_the_updates_that_the_rate_follows(name: str) -> None:
    """A step that is skipped restores the state: the rate that is logged must not run ahead of the one that is used."""
    params = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
    tx = make_optimizer(OptimConfig(name=name), TrainConfig(), 10, {"kernel": -1})
    state = tx.init(params)
    for done in range(3):
        assert {int(count) for _, count in optax.tree.get_all_with_path(state, "count")} == {done}
        _, state = tx.update(params, state, params)
