"""What is learnt: from a record to samples, from a batch to a loss. An objective is a row of OBJECTIVES."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import jax

from elm_jax.data.batch import Batch
from elm_jax.data.samples import Experience, Sample, Samples
from elm_jax.models.elm import ELM
from elm_jax.objectives.cross_entropy import log_probs, summed_cross_entropy, sums_of_samples
from elm_jax.registry import Registry

__all__ = [
    "OBJECTIVES",
    "Experience",
    "Objective",
    "Sample",
    "Samples",
    "Sums",
    "log_probs",
    "register_objective",
    "sums_of_samples",
]

Sums = dict[str, jax.Array]  # scalars by name; "loss" is what is learnt from, the others are logged


@dataclass(frozen=True)
class Objective:
    """What a run learns: a value of the key `objective`.

    A step's loss, and each of its other numbers, is a sum over all micro-batches and hosts divided by a count.

    Args:
        loss: (model, batch without micro-batch axis, key, trained) -> sums by name, "loss" among them. `key` is what is
            drawn from, None where nothing is; encoders whose part is among `trained` take the batch's statistics.
        counts: (batch) -> by the same names, what each sum is divided by. It depends on the batch alone.
        samples: what of a record is learnt.
        needs: "llm" (without it there is no tokenizer, no text and no connector, but an encoder alone); "reference":
            the model as it was at the beginning, whose log probabilities of the targets are the batch's extras
            "reference"; "key": `loss` draws at random in validation too.
    """

    loss: Callable[[ELM, Batch, jax.Array | None, Collection[str]], Sums]
    counts: Callable[[Batch], Sums]
    samples: Samples = Samples()
    needs: frozenset[str] = frozenset({"llm"})


def _cross_entropy(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
    return {"loss": summed_cross_entropy(model.llm, model.hidden(batch, trained, key), batch)}


def _supervised_tokens(batch: Batch) -> Sums:
    return {"loss": batch.target_weights.sum()}


OBJECTIVES: Registry[Objective] = Registry(
    "config.objective",
    {
        "pretrain": Objective(_cross_entropy, _supervised_tokens, Samples(phase="pretrain")),
        "sft": Objective(_cross_entropy, _supervised_tokens),
    },
)


def register_objective(name: str, objective: Objective) -> None:
    """Make `objective` a value of the key `objective`.

    Raises:
        UserError: the name is no identifier, or the package's own.
    """
    OBJECTIVES.register(name, objective)
