"""Policy objectives: learning from the rewards of answers that the model itself has given.

Sources: SAPO, arXiv 2511.20347; GRPO, arXiv 2402.03300; DAPO, arXiv 2503.14476; GSPO, arXiv 2507.18071.

Dimension letters: B rows, M supervised slots; P prompts, G answers of each. A *sample* is one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.data.measured import Measured
from elm_jax.data.samples import Experience, Samples
from elm_jax.data.sources import Record
from elm_jax.data.specs import signal_spec
from elm_jax.errors import UserError
from elm_jax.models.elm import ELM
from elm_jax.objectives.cross_entropy import log_probs, per_target, sums_of_samples
from elm_jax.objectives.objective import Objective, Sums
from elm_jax.scoring.grounding import Evidence
from elm_jax.scoring.rewards import REWARDS, Answered, Reward, number, reward_of
from elm_jax.text.turns import last_answer
from elm_jax.text.write import THINK_PREFIX

LARGEST_LOG_RATIO = 20.0
Terms = dict[str, jax.Array]  # (B, M) by name: of each target what is summed


@dataclass(frozen=True)
class Policy:
    """How far an answer's advantage moves the model.

    r is a token's probability now by its probability when the answer was drawn, A the answer's advantage.

    Args:
        surrogate: "clip": −min(r·A, clip(r, 1 − low, 1 + high)·A); "sapo": −σ(τ(r − 1))·(4/τ)·A.
        mean: over what losses are averaged: "token" (all tokens of the step alike), "sample" (answers alike, and the
            tokens of each), "sum" (the sums of answers alike), "length" (those, by the longest answer that may be).
        low, high: of "clip". tau_pos, tau_neg: τ of "sapo" where A > 0, and elsewhere.
        sequence: r is one for an answer: the geometric mean of its tokens' (GSPO).
        cap: r is at most so much in the unclipped term (dual clip); None is no bound.
        kl: how much is added of exp(d) − d − 1, d the reference's log probability less the model's.
        longest: tokens of the longest answer, for "length".
    """

    surrogate: str = "clip"
    mean: str = "sample"
    low: float = 0.2
    high: float = 0.2
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    sequence: bool = False
    cap: float | None = None
    kl: float = 0.0
    longest: int = 1

    def terms(self, new: jax.Array, batch: Batch) -> Terms:
        """What is summed, by name: "loss", and numbers that are averaged over tokens.

        Args:
            new: (B, M) log probabilities of the targets now, float32.
            batch: its `extras` have "old", those when the answers were drawn, "advantage", "learnt" (0 of answers that
                only count), with `kl` "reference", and perhaps "importance": a weight of each token's loss, for answers
                drawn by another program than the one that learns.
        """
        mask = self.mask(batch)
        old, advantage = batch.extras["old"], batch.extras["advantage"]
        lengths = jnp.maximum(per_target(sums_of_samples(mask, batch), batch), 1.0)
        log_ratio = jnp.where(mask > 0, new - old, 0.0)
        found: Terms = {"kl_from_old": -_clamped(log_ratio) * mask, "ratio": jnp.exp(_clamped(log_ratio)) * mask}
        if self.sequence:
            log_ratio = per_target(sums_of_samples(log_ratio * mask, batch), batch) / lengths
        ratio = jnp.exp(_clamped(log_ratio))
        if self.surrogate == "sapo":
            tau = jnp.where(advantage > 0, self.tau_pos, self.tau_neg)
            gate = jax.nn.sigmoid(tau * (ratio - 1.0))
            losses = -gate * 4.0 / tau * advantage
            found["sapo_weight"] = 4.0 * gate * (1.0 - gate) * mask
        else:
            free = ratio if self.cap is None else jnp.minimum(ratio, self.cap)
            losses = -jnp.minimum(free * advantage, jnp.clip(ratio, 1.0 - self.low, 1.0 + self.high) * advantage)
            found["clipped_low"] = ((ratio < 1.0 - self.low) & (advantage < 0)) * mask
            found["clipped_high"] = ((ratio > 1.0 + self.high) & (advantage > 0)) * mask
        if self.kl:
            d = jnp.where(mask > 0, batch.extras["reference"] - new, 0.0)
            divergence = jnp.exp(_clamped(d)) - d - 1.0
            losses = losses + self.kl * divergence
            found["kl"] = divergence * mask
        losses = jnp.where(mask > 0, losses * batch.extras.get("importance", 1.0) * mask, 0.0)
        return {"loss": losses / lengths if self.mean == "sample" else losses, **found}

    @property
    def told(self) -> tuple[str, ...]:
        """The names of `terms` beside the loss."""
        own = ("sapo_weight",) if self.surrogate == "sapo" else ("clipped_low", "clipped_high")
        return ("kl_from_old", "ratio", *own, *(("kl",) if self.kl else ()))

    def count(self, batch: Batch) -> jax.Array:
        """What the sum of the losses is divided by."""
        if self.mean == "token":
            return self.mask(batch).sum()
        answers = (sums_of_samples(batch.target_weights, batch) > 0).sum()
        return answers * (self.longest if self.mean == "length" else 1)

    def mask(self, batch: Batch) -> jax.Array:
        """(B, M) float32: the targets that are learnt."""
        return batch.target_weights * batch.extras["learnt"]


def _clamped(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


Advantages = Callable[[np.ndarray], np.ndarray]
LEAST_STD = 1e-6


def by_population(rewards: np.ndarray) -> np.ndarray:
    """(P, G) rewards less their group's mean, by its population deviation + 1e-6; 0 in a group of equal rewards."""
    return _centred(rewards) / (rewards.std(1, keepdims=True) + 1e-6) * told_apart(rewards)


def by_sample(rewards: np.ndarray) -> np.ndarray:
    """As `by_population`, by the sample deviation (of G − 1) + 1e-4."""
    spread = rewards.std(1, keepdims=True, ddof=1) if rewards.shape[1] > 1 else np.zeros((len(rewards), 1))
    return _centred(rewards) / (spread + 1e-4) * told_apart(rewards)


def unscaled(rewards: np.ndarray) -> np.ndarray:
    """(P, G) rewards less their group's mean (Dr. GRPO, arXiv 2503.20783); 0 in a group of equal rewards."""
    return _centred(rewards) * told_apart(rewards)


def by_batch(rewards: np.ndarray) -> np.ndarray:
    """As `unscaled`, by the sample deviation of all rewards of the step + 1e-4."""
    return unscaled(rewards) / ((rewards.std(ddof=1) if rewards.size > 1 else 0.0) + 1e-4)


ADVANTAGES: dict[str, Advantages] = {
    "population": by_population, "sample": by_sample, "unscaled": unscaled, "batch": by_batch
}  # fmt: skip


def told_apart(rewards: np.ndarray) -> np.ndarray:
    """(P, 1): whether the rewards of a group differ. Where not, there is nothing to learn."""
    return rewards.std(1, keepdims=True) >= LEAST_STD


def overlong(lengths: np.ndarray, longest: int, cache: int) -> np.ndarray:
    """What is added to rewards of answers of these lengths (DAPO's soft punishment): 0 up to `longest` − `cache`, from
    there falling to −1 at `longest`, −1 beyond it."""
    if cache == 0:
        return -(lengths > longest).astype(float)
    return np.clip((longest - cache - lengths) / cache, -1.0, 0.0)


def _centred(rewards: np.ndarray) -> np.ndarray:
    return rewards - rewards.mean(1, keepdims=True)


# -- rows -----------------------------------------------------------------------------------------------------------

_TOLD = ("degenerate", "empty", "truncated")  # of an answer


def sapo(config: Config) -> Objective:
    """Soft gates in place of clipping."""
    rl = config.rl
    rules = Policy("sapo", rl.mean or "sample", tau_pos=rl.tau_pos, tau_neg=rl.tau_neg)
    return _objective(config, rules, rl.advantage or "population", resample=0, skip_truncated=False)


def grpo(config: Config) -> Objective:
    """Clipped ratios, answers weighing alike."""
    rl = config.rl
    high = rl.low if rl.high is None else rl.high
    rules = Policy(mean=rl.mean or "sample", low=rl.low, high=high, cap=rl.cap, sequence=rl.sequence)
    return _objective(config, rules, rl.advantage or "sample", resample=0, skip_truncated=False)


def dapo(config: Config) -> Objective:
    """Clipped further up than down, tokens weighing alike, prompts whose answers are all alike replaced, answers
    without an end not learnt."""
    rl = config.rl
    high = 0.28 if rl.high is None else rl.high
    rules = Policy(mean=rl.mean or "token", low=rl.low, high=high, cap=rl.cap, sequence=rl.sequence)
    return _objective(config, rules, rl.advantage or "sample", resample=2, skip_truncated=True)


def _objective(config: Config, rules: Policy, advantage: str, resample: int, skip_truncated: bool) -> Objective:
    rl = config.rl
    rules = replace(rules, kl=rl.kl, longest=rl.max_new_tokens)
    judge = judge_of(config)
    longest, cache = rl.max_new_tokens, rl.overlong
    experience = Experience(
        judge, ADVANTAGES[advantage], answers=rl.answers, tokens=rl.max_new_tokens,
        temperature=rl.temperature, top_p=rl.top_p, rows=rl.batch_size, updates=rl.updates,
        shaped=(lambda rewards, lengths: rewards + overlong(lengths, longest, cache)) if cache else None,
        resample=resample if rl.resample is None else rl.resample,
        skip_truncated=skip_truncated if rl.skip_truncated is None else rl.skip_truncated,
        show_every=rl.show_every,
    )  # fmt: skip
    of_answers = ("reward", *(f"reward.{name}" for name in judge.parts if len(judge.parts) > 1), *_TOLD)
    old = ("old",) if rl.updates > 1 else ()

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        # Nothing is dropped and statistics stand still, as when the answers were drawn.
        new = log_probs(model.llm, model.hidden(batch), batch, rl.temperature)
        given = batch if old else batch._replace(extras={**batch.extras, "old": jax.lax.stop_gradient(new)})
        found = rules.terms(new, given)
        mask = batch.target_weights
        lengths = jnp.maximum(per_target(sums_of_samples(mask, batch), batch), 1.0)
        found |= {name: batch.extras[name] * mask / lengths for name in of_answers}
        return {**{name: values.sum() for name, values in found.items()}, "answer_tokens": mask.sum()}

    def counts(batch: Batch) -> Sums:
        tokens, answers = rules.mask(batch).sum(), (sums_of_samples(batch.target_weights, batch) > 0).sum()
        by_token = dict.fromkeys(rules.told, tokens)
        return {"loss": rules.count(batch), **by_token, **dict.fromkeys((*of_answers, "answer_tokens"), answers)}

    samples = Samples(extras=("advantage", "learnt", *of_answers, *old), experience=experience)
    needs = frozenset({"llm", *(("reference",) if rl.kl else ())})
    return Objective(loss, counts, samples, needs, rl.temperature, better="reward")


def judge_of(config: Config) -> Judge:
    """What `rl.rewards` make of an answer.

    Raises:
        UserError: there is no such reward, or not one weight for each.
    """
    names, weights = config.rl.rewards, config.rl.reward_weights
    if not names or len(set(names)) < len(names):
        found = f"{', '.join(names) or 'nothing'}"
        raise UserError("rl.rewards", found, "each reward once, one at least", f"choose from {', '.join(REWARDS)}")
    if weights is not None and len(weights) != len(names):
        found = f"{len(weights)} weights"
        raise UserError("rl.reward_weights", found, f"{len(names)}, one for each of rl.rewards", "give as many")
    weighted = zip(names, weights or (1.0,) * len(names), strict=True)
    parts = {name: (weight, reward_of(name)) for name, weight in weighted}
    measured = Measured(signal_spec(config.data, config.seed, compat=config.compat))
    return Judge(parts, config.data.explicit_thinking, measured)


@dataclass(frozen=True)
class Judge:
    """(record, answer, truth) -> the parts of an answer's reward.

    Args:
        parts: weight and function of each, by name.
        opened: a think tag that a record's answer begins with stands in the prompt (`data.explicit_thinking`).
        measured: what is measured of a record's ECG.
    """

    parts: Mapping[str, tuple[float, Reward]]
    opened: bool
    measured: Callable[[Record], Evidence | None]

    def __call__(self, record: Record | None, answer: str, truth: str) -> dict[str, float]:
        opened = self.opened and (record is None or last_answer(record.text)[1].startswith(THINK_PREFIX))
        judged = Answered(answer, truth, record, opened, lambda: record and self.measured(record))
        return {name: weight * number(name, reward(judged)) for name, (weight, reward) in self.parts.items()}
