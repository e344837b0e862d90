"""Losses and rewards of policy and preference objectives, against the goldens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.data.batch import Batch, BatchShape, empty_batch
from elm_jax.objectives import policy
from elm_jax.objectives.policy import ADVANTAGES, Policy
from elm_jax.objectives.preference import Preference
from elm_jax.scoring.rewards import REWARDS, Answered, reward_of

Golden = Callable[[str], Path]


def read(folder: Path, file: str = "cases.json") -> Any:
    return json.loads((folder / file).read_text())


def arrays(folder: Path, file: str) -> dict[str, np.ndarray]:
    with np.load(folder / file) as found:
        return dict(found)


def batch_of(mask: np.ndarray, **extras: np.ndarray) -> Batch:
    """A batch whose rows are one answer each."""
    rows, tokens = mask.shape
    found = empty_batch(BatchShape(64, 1, tokens), {}, rows, extras=("learnt", *extras))
    samples = np.full((rows, tokens), -1, np.int32)
    samples[:, 0] = np.arange(rows)
    given = {"learnt": np.ones_like(mask), **extras}
    return found._replace(target_weights=mask, sample_ids=samples, extras=given)


# -- rewards ----------------------------------------------------------------------------------------------------


def test_the_references_rewards(golden: Golden) -> None:
    names = {"format": "format", "tag_count": "tags", "answer": "answer"}
    for case in read(golden("rl_rewards"), "cases_successor.json"):
        answered = Answered(case["text"], case["gt"], opened=case["explicit_thinking"])
        found = {theirs: REWARDS[ours](answered) for theirs, ours in names.items()}
        assert found == pytest.approx(case["components"], abs=1e-12), case
        assert sum(found.values()) == pytest.approx(case["total"], abs=1e-12)
    for case in read(golden("rl_rewards"), "cases_april.json"):
        answered = Answered(case["text"], case["gt"])
        found = REWARDS["format_strict"](answered), REWARDS["recall"](answered)
        assert found == pytest.approx((case["format"], case["answer"]), abs=1e-12), case
        assert sum(found) == pytest.approx(case["total"], abs=1e-12)


# -- policy -----------------------------------------------------------------------------------------------------

MEANS = {
    "token-mean": "token", "seq-mean-token-mean": "sample", "seq-mean-token-sum": "sum",
    "seq-mean-token-sum-norm": "length",
}  # fmt: skip


def policy_loss(rules: Policy, new: jax.Array, batch: Batch, count: float | None = None) -> jax.Array:
    return rules.terms(new, batch)["loss"].sum() / (rules.count(batch) if count is None else count)


@pytest.mark.parametrize("version", ["successor", "april"])
def test_sapo(golden: Golden, version: str) -> None:
    stored = arrays(golden("rl_sapo_loss"), "cases.npz")
    for case in read(golden("rl_sapo_loss"), f"cases_{version}.json"):
        if "loss" not in case or case["loss"] is None:
            continue
        at, mode = case["case"], case["mode"]
        mask = stored[f"{at}/response_mask"]
        weights = stored.get(f"{at}/rollout_is_weights", np.ones_like(mask))
        batch = batch_of(
            mask, old=stored[f"{at}/old_log_prob"], advantage=stored[f"{at}/advantages"], importance=weights
        )
        rules = Policy("sapo", MEANS[mode], tau_pos=case["tau_pos"], tau_neg=case["tau_neg"], longest=mask.shape[1])
        count = None if rules.mean == "token" else case["global_batch_size"]
        if count is not None:
            count = count / case["dp_size"] * (rules.longest if rules.mean == "length" else 1)
        new = jnp.asarray(stored[f"{at}/log_prob"])
        loss, gradient = jax.value_and_grad(lambda x: policy_loss(rules, x, batch, count))(new)  # noqa: B023
        np.testing.assert_allclose(loss, case["loss"], rtol=1e-5, atol=1e-7, err_msg=str(case))
        if f"{at}/{mode}/grad_log_prob" in stored:
            np.testing.assert_allclose(gradient, stored[f"{at}/{mode}/grad_log_prob"], rtol=1e-5, atol=1e-7)
        if version == "successor":
            terms, tokens = rules.terms(new, batch), mask.sum()
            names = {"kl_from_old": "ppo_kl", "ratio": "importance_ratio", "sapo_weight": "sapo_weight"}
            for ours, theirs in names.items():
                told = case["metrics"][f"actor/{theirs}"]
                np.testing.assert_allclose(terms[ours].sum() / tokens, told, rtol=1e-5, atol=1e-6, err_msg=theirs)


def test_advantages_of_the_reference(golden: Golden) -> None:
    stored = arrays(golden("rl_rollout_parts"), "cases.npz")
    names = sorted({name.split("/")[1] for name in stored if name.startswith("adv/")})
    assert names
    for name in names:
        rewards = stored[f"adv/{name}/rewards"].astype(np.float64)[None]
        told = policy.told_apart(rewards)[0, 0]
        assert told == (not stored[f"adv/{name}/degenerate"])
        if told:
            np.testing.assert_allclose(policy.by_population(rewards)[0], stored[f"adv/{name}/successor"], atol=1e-5)


GRPO_MEANS = {"grpo": "sample", "bnpo": "token", "dapo": "token", "dr_grpo": "length"}
GRPO_ADVANTAGES = {
    "trl_sample_std_eps1e-4": "sample", "population_std_eps1e-6": "population", "no_scaling_dr_grpo": "unscaled",
    "batch_std_sample_eps1e-4": "batch",
}  # fmt: skip


def test_group_relative_losses(golden: Golden) -> None:
    given, wanted, told = (
        arrays(golden("grpo_dapo"), "inputs.npz"),
        arrays(golden("grpo_dapo"), "outputs.npz"),
        read(golden("grpo_dapo"), "cases.json"),
    )
    rewards = given["rewards"].reshape(told["groups"], told["G"])
    advantages = {theirs: ADVANTAGES[ours](rewards).reshape(-1) for theirs, ours in GRPO_ADVANTAGES.items()}
    for theirs, values in advantages.items():
        np.testing.assert_allclose(values, wanted[f"advantage/{theirs}"], atol=1e-5)
    mask = given["completion_mask"]
    new = jnp.asarray(given["new_logps"])
    assert len(told["cases"]) >= 40
    for case in told["cases"]:
        ended = given["ended_with_eos"][:, None] if case["mask_truncated"] else 1.0
        learnt = np.broadcast_to(np.asarray(ended, np.float32), mask.shape)
        advantage = np.repeat(advantages[case["advantage"]][:, None], mask.shape[1], 1).astype(np.float32)
        batch = batch_of(mask, old=given["old_logps"], reference=given["ref_logps"], advantage=advantage, learnt=learnt)
        rules = Policy(
            mean=GRPO_MEANS[case["loss_type"]], low=case["eps_low"], high=case["eps_high"], kl=case["beta_kl"],
            sequence=case["level"] == "sequence", cap=case["delta"], longest=told["max_completion_length"],
        )  # fmt: skip
        loss, gradient = jax.value_and_grad(lambda x: policy_loss(rules, x, batch))(new)  # noqa: B023
        np.testing.assert_allclose(loss, case["loss"], rtol=1e-5, atol=1e-6, err_msg=str(case))
        terms = rules.terms(new, batch)
        if case["level"] == "token":
            tokens = (mask * learnt).sum()
            for ours, theirs in (("clipped_low", "low_clip_fraction"), ("clipped_high", "high_clip_fraction")):
                np.testing.assert_allclose(terms[ours].sum() / tokens, case[theirs], atol=1e-6)
        key = f"grad_dapo_.2_.28_truncmask{int(case['mask_truncated'])}"
        plain = (case["eps_low"], case["eps_high"], case["beta_kl"], case["delta"]) == (0.2, 0.28, 0.0, None)
        if plain and case["loss_type"] == "dapo" and case["advantage"].startswith("trl"):
            np.testing.assert_allclose(gradient, wanted[key], atol=1e-6)


def test_groups_that_teach_nothing_and_answers_that_are_too_long(golden: Golden) -> None:
    given, wanted, told = (
        arrays(golden("grpo_dapo"), "inputs.npz"),
        arrays(golden("grpo_dapo"), "outputs.npz"),
        read(golden("grpo_dapo"), "cases.json"),
    )
    rewards = given["rewards"].reshape(told["groups"], told["G"])
    keep = policy.told_apart(rewards)[:, 0]
    np.testing.assert_array_equal(keep, wanted["dynamic_sampling_keep_group"] > 0)
    mask, new = given["completion_mask"], jnp.asarray(given["new_logps"])
    advantage = np.repeat(ADVANTAGES["population"](rewards).reshape(-1, 1), mask.shape[1], 1).astype(np.float32)
    rules = Policy(mean="token", low=0.2, high=0.28)
    for learnt, name in (
        (np.ones(told["groups"]), "loss_all_tokens_in_denominator"),
        (keep, "loss_after_dropping_degenerate_groups"),
    ):
        each = np.repeat(np.asarray(learnt, np.float32), told["G"])[:, None] * np.ones_like(mask)
        batch = batch_of(mask, old=given["old_logps"], advantage=advantage, learnt=each)
        loss = policy_loss(rules, new, batch)
        np.testing.assert_allclose(loss, told["dynamic_sampling"][name], rtol=1e-5, atol=1e-6)
    most = told["overlong"]
    found = policy.overlong(wanted["overlong_lengths"], most["L_max"], most["cache"])
    np.testing.assert_allclose(found, wanted["overlong_penalty"], atol=1e-12)


# -- preference -------------------------------------------------------------------------------------------------

LOSSES = {
    "sigmoid": {}, "sigmoid_label_smoothing_cDPO": {}, "robust": {"loss": "robust"}, "hinge": {"loss": "hinge"},
    "ipo_length_normalised": {"loss": "ipo"}, "sigmoid_length_normalised": {"loss": "sigmoid_norm"},
    "no_reference_sigmoid": {"reference": False}, "simpo": {"loss": "simpo"},
}  # fmt: skip


def pairs_of(given: dict[str, np.ndarray]) -> tuple[Batch, Any]:
    """A batch whose rows are a pair each, chosen first; and the logits' log probabilities of its targets."""
    both = ("chosen", "rejected")
    masks = [given[f"completion_mask_{side}"][:, 1:].astype(np.float32) for side in both]
    mask = np.concatenate(masks, 1)
    batch = batch_of(mask)
    half = masks[0].shape[1]
    batch = batch._replace(target_sample=np.repeat([[0, 1]], half, 1).repeat(len(mask), 0).astype(np.int32))

    def log_probs(logits: Any) -> jax.Array:
        found = []
        for side in both:
            ids = given[f"ids_{side}"][:, 1:, None]
            found.append(jnp.take_along_axis(jax.nn.log_softmax(logits[side][:, :-1]), ids, 2)[..., 0])
        return jnp.concatenate(found, 1)

    return batch, log_probs


def test_preference_losses(golden: Golden) -> None:
    given, wanted, told = (
        arrays(golden("dpo"), "inputs.npz"),
        arrays(golden("dpo"), "outputs.npz"),
        read(golden("dpo"), "cases.json"),
    )
    batch, log_probs = pairs_of(given)
    logits = {
        who: {side: jnp.asarray(given[f"logits_{who}_{side}"]) for side in ("chosen", "rejected")}
        for who in ("policy", "ref")
    }
    batch = batch._replace(extras={"reference": log_probs(logits["ref"])})
    new = log_probs(logits["policy"])
    assert {case["name"] for case in told["cases"]} == set(LOSSES)
    for case in told["cases"]:
        options = {"smoothing": case.get("label_smoothing", 0.0), "gamma": case.get("gamma", 0.0)}
        rules = Preference(beta=case["beta"], **{**options, **LOSSES[case["name"]]})
        found = rules.pairs(new, batch)["loss"][:, 0]
        np.testing.assert_allclose(found, case["per_pair"], rtol=1e-5, err_msg=case["name"])
        np.testing.assert_allclose(found.mean(), case["loss"], rtol=1e-5)
    rules = Preference(beta=0.1)
    pairs = rules.pairs(new, batch)
    rewards = told["implicit_rewards_beta_0_1"]
    np.testing.assert_allclose(pairs["chosen"][:, 0], rewards["chosen"]["0.1"], atol=1e-5)
    np.testing.assert_allclose(pairs["rejected"][:, 0], rewards["rejected"]["0.1"], atol=1e-5)
    np.testing.assert_allclose(pairs["margin"].sum() / len(new), rewards["margin_mean"], atol=1e-5)
    assert float(pairs["accuracy"].sum() / len(new)) == rewards["accuracy"]
    gradient = jax.grad(lambda x: rules.pairs(log_probs(x), batch)["loss"].sum() / len(new))(logits["policy"])
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(gradient[side], wanted[f"grad_sigmoid_beta0.1_policy_{side}"], atol=1e-6)


def test_numbers_are_close_within_a_tolerance() -> None:
    close = reward_of("numeric(5)")
    heard = {"72": 1.0, "77 bpm": 1.0, "82": 2 / 3, "<answer>72</answer>": 1.0, "none": 0.0, "120": 0.0, "92": 0.0}
    assert {text: close(Answered(text, "72")) for text in heard} == pytest.approx(heard)
