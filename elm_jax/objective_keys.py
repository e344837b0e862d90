"""Keys of the configuration that single objectives read: sections `rl`, `dpo` and `ssl`."""

from dataclasses import dataclass

from elm_jax.schema import key


@dataclass(frozen=True)
class RlConfig:
    """Of the policy objectives sapo, grpo and dapo. None is the objective's own choice."""

    rewards: tuple[str, ...] = key(
        ("format", "tags", "answer"), "what an answer is judged by, summed: names, numeric(TOLERANCE), your own"
    )
    reward_weights: tuple[float, ...] | None = key(None, "of each of rl.rewards; None is 1 each")
    answers: int = key(4, "answers to each prompt", limit="at least 2")
    max_new_tokens: int = key(384, "longest of these answers, in tokens", limit="at least 1")
    temperature: float = key(0.8, "of drawing them, and of their probabilities", limit="above 0")
    top_p: float = key(0.95, "nucleus of drawing them", limit="above 0 and at most 1")
    batch_size: int = key(32, "answers drawn at once", limit="at least 1")
    updates: int = key(2, "steps that learn from the same answers", limit="at least 1")
    advantage: str | None = key(
        None, "rewards less their group's mean, by: population or sample deviation, nothing, or that of the batch",
        choices=("population", "sample", "unscaled", "batch"),
    )
    mean: str | None = key(
        None, "over what losses are averaged: tokens, samples, their sums, these by the longest answer",
        choices=("token", "sample", "sum", "length"),
    )
    tau_pos: float = key(1.0, "of sapo: how fast it lets go of good answers", limit="above 0")
    tau_neg: float = key(1.05, "of sapo: of bad ones", limit="above 0")
    low: float = key(0.2, "of grpo, dapo: ratios below 1 - low are clipped", limit="above 0")
    high: float | None = key(None, "of grpo, dapo: ratios above 1 + high are clipped", limit="above 0")
    cap: float | None = key(None, "of grpo, dapo: the largest ratio of a bad answer", limit="above 0")
    sequence: bool = key(False, "of grpo, dapo: one ratio for an answer (GSPO)")
    kl: float = key(0.0, "weight of the divergence from the model as it was in the beginning", limit="at least 0")
    resample: int | None = key(
        None, "how often a prompt whose answers are all alike is replaced by another", limit="at least 0"
    )
    overlong: int = key(0, "tokens before rl.max_new_tokens in which a reward falls by up to 1", limit="at least 0")
    skip_truncated: bool | None = key(None, "learn nothing from answers without an end")
    show_every: int = key(50, "steps between tables of answers in W/rollouts", limit="at least 1")


@dataclass(frozen=True)
class SslConfig:
    """Of the self-supervised objectives of encoders. None is the objective's own choice."""

    mask_ratio: float = key(0.75, "part of the patches that is hidden", limit="above 0 and at most 1")
    norm_patches: bool | None = key(None, "patches are rebuilt less their mean, by their deviation")


@dataclass(frozen=True)
class DpoConfig:
    """Of the preference objective dpo."""

    loss: str = key(
        "sigmoid", "how a pair is judged", choices=("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "simpo")
    )
    beta: float = key(0.1, "how sharply", limit="above 0")
    label_smoothing: float = key(
        0.0, "part of the pairs that may be the wrong way round", limit="at least 0 and below 1"
    )
    gamma: float = key(0.5, "the margin that simpo asks for", limit="at least 0")
    reference: bool = key(True, "compare with the model as it was in the beginning (simpo never does)")
