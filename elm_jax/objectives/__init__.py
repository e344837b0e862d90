"""What is learnt: from a record to samples, from a batch to a loss. An objective is a row of OBJECTIVES."""

from __future__ import annotations

from collections.abc import Callable, Collection

import jax

from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.data.samples import Experience, Sample, Samples
from elm_jax.models.elm import ELM
from elm_jax.objectives import contrastive, policy, preference, self_supervised
from elm_jax.objectives.cross_entropy import log_probs, summed_cross_entropy, sums_of_samples
from elm_jax.objectives.objective import Objective, Redrawn, Sums
from elm_jax.registry import Registry

__all__ = [
    "OBJECTIVES",
    "SFT",
    "Experience",
    "Objective",
    "Redrawn",
    "Sample",
    "Samples",
    "Sums",
    "log_probs",
    "objective_of",
    "register_objective",
    "sums_of_samples",
]

Row = Objective | Callable[[Config], Objective]  # the second, where keys of the config decide


def _cross_entropy(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
    return {"loss": summed_cross_entropy(model.llm, model.hidden(batch, trained, key), batch)}


def _supervised_tokens(batch: Batch) -> Sums:
    return {"loss": batch.target_weights.sum()}


SFT = Objective(_cross_entropy, _supervised_tokens)
OBJECTIVES: Registry[Row] = Registry(
    "config.objective",
    {
        "pretrain": Objective(_cross_entropy, _supervised_tokens, Samples(phase="pretrain")),
        "sft": SFT,
        "dpo": preference.dpo,
        "sapo": policy.sapo,
        "grpo": policy.grpo,
        "dapo": policy.dapo,
        "st_mem": self_supervised.st_mem,
        "mtae": self_supervised.mtae,
        "mlae": self_supervised.mlae,
        "mae_vit": self_supervised.mae_vit,
        "nepa": self_supervised.nepa,
        "merl": contrastive.merl,
        "next_token": self_supervised.next_token,
        "signal2vec": self_supervised.signal2vec,
        "clip": contrastive.clip,
        "siglip": contrastive.siglip,
        "coca": contrastive.coca,
        "vit": self_supervised.vit,
        "dit": self_supervised.dit,
    },
)


def objective_of(config: Config) -> Objective:
    """The objective of a run.

    Raises:
        UserError: there is none of this name, or its own keys contradict each other.
    """
    row = OBJECTIVES.find(config.objective)
    return row if isinstance(row, Objective) else row(config)


def register_objective(name: str, objective: Row) -> None:
    """Make `objective`, or what makes one of a config, a value of the key `objective`.

    Raises:
        UserError: the name is no identifier, or the package's own.
    """
    OBJECTIVES.register(name, objective)
