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

from elm_jax.config import OptimConfig, TrainConfig
from elm_jax.training.optim import (
    batch_scale,
    clip_coefficient,
    learning_rate_multiplier,
    make_optimizer,
    weight_decay,
)

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
        np.testing.assert_allclose(found, case["multipliers"], rtol=ROUNDING, atol=ROUNDING, err_msg=str(case))


def test_scaling_with_the_batch(cases: dict[str, Any]) -> None:
    for case in cases["scaling"]:
        # Ours counts all rows of a step; theirs those of a micro-batch.
        optim = OptimConfig(
            lr=1e-3, ref_batch=case["ref_global_bs"] or None, weight_decay=case["weight_decay"],
            weight_decay_scale=case["scale_wd"], accum_steps=case["grad_accum_steps"],
        )  # fmt: skip
        train = TrainConfig(batch_size=case["batch_size"] * case["grad_accum_steps"])
        assert train.batch_size == case["eff_bs"]
        assert batch_scale(optim, train) == pytest.approx(case["scale"], rel=1e-12)
        assert optim.lr * batch_scale(optim, train) == pytest.approx(case["peak_lr"], rel=1e-12)
        assert weight_decay(optim, train) == pytest.approx(case["effective_wd"], rel=1e-12)


def test_clipping(golden: Golden) -> None:
    with np.load(golden("optim_clip") / "cases.npz") as file:
        stored = dict(file)
    numbers = sorted({name.split("/")[0] for name in stored})
    assert len(numbers) >= 3
    for n in numbers:
        gradients = {g: jnp.asarray(stored[f"{n}/{g}"]) for g in ("g0", "g1")}
        norm = optax.tree.norm(gradients)
        assert float(norm) == pytest.approx(float(stored[f"{n}/norm"]), rel=ROUNDING)
        coefficient = clip_coefficient(norm, float(stored[f"{n}/max_norm"]))
        for g, value in gradients.items():
            np.testing.assert_allclose(value * coefficient, stored[f"{n}/{g.replace('g', 'c')}"], rtol=ROUNDING)


def test_clipping_keeps_away_from_zero_as_torch_does() -> None:
    assert float(clip_coefficient(jnp.float32(1e-6), 1e-7)) == pytest.approx(0.05, rel=1e-5)


def test_a_limit_of_zero_clips_nothing() -> None:
    assert float(clip_coefficient(jnp.float32(1e6), 0.0)) == 1.0


def test_updates(golden: Golden) -> None:
    """Three steps; Adam has the decay in the gradient, AdamW beside it."""
    with np.load(golden("optim_updates") / "cases.npz") as file:
        stored = {name: file[name] for name in file.files if name.startswith("adam")}
    names = sorted({name.split("/")[0] for name in stored})
    assert {name.split("_")[0] for name in names} == {"adam", "adamw"} and len(names) >= 12
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
            np.testing.assert_allclose(weights["w"], expected, rtol=ROUNDING, atol=ROUNDING, err_msg=name)


def test_the_rate_follows_the_schedule_and_the_batch() -> None:
    """One step of Adam on a fresh state moves by the rate, whatever the gradient."""
    optim = OptimConfig(
        name="adam", lr=1e-2, ref_batch=4, weight_decay=0.0, schedule="cosine", warmup_ratio=0.5, eps=1e-12
    )
    tx = make_optimizer(optim, TrainConfig(batch_size=8), 4)
    weights = {"w": jnp.zeros(1)}
    updates, _ = tx.update({"w": jnp.ones(1)}, tx.init(weights), weights)
    assert float(updates["w"][0]) == pytest.approx(-1e-2 * 8 / 4 * 0.5, rel=1e-5)
