"""Preference objectives: of two answers the chosen one is made likelier than the rejected one.

Sources: DPO, arXiv 2305.18290; its smoothed and robust forms, arXiv 2403.00409; IPO, arXiv 2310.12036; SimPO, arXiv
2405.14734; SLiC's hinge, arXiv 2305.10425; what holds the chosen answer likely beside any of them, arXiv 2404.19733.

Dimension letters: B rows, M supervised slots, R pairs that a row may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.data.samples import Sample, Samples
from elm_jax.data.sources import Record
from elm_jax.errors import UserError
from elm_jax.models.elm import ELM
from elm_jax.objectives.cross_entropy import log_probs, sums_of_samples
from elm_jax.objectives.objective import Objective, Sums
from elm_jax.text.turns import to_turns

Margin = Callable[["Preference", jax.Array], jax.Array]


@dataclass(frozen=True)
class Preference:
    """The loss of a pair.

    x is β times how much more the chosen answer has gained than the rejected one: in log probability, summed over the
    answer's tokens, against the reference model.

    Args:
        loss: "sigmoid" (DPO), "robust", "hinge", "ipo", "sigmoid_norm" (means over tokens instead of sums), "simpo"
            (means, without a reference, `gamma` below).
        beta: β. smoothing: the part of the pairs whose preference may be the wrong way round.
        gamma: the margin that "simpo" asks for.
        reference: whether the model is compared with what it was in the beginning ("simpo" never is).
        rpo_alpha: weight of the chosen answer's own loss, -log p by token, which is added (iterative RPO; Pang et al.).
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    gamma: float = 0.5
    reference: bool = True
    rpo_alpha: float = 0.0

    @property
    def compares(self) -> bool:
        """Whether a reference model is needed."""
        return self.reference and self.loss != "simpo"

    def pairs(self, new: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """(B, R) by name: each pair's loss, margin, accuracy and the gains of both answers; 0 where there is no pair.

        Args:
            new: (B, M) log probabilities of the targets, float32.
            batch: of each record two samples, the chosen one first; with `compares` its extras have "reference".
        """
        mask = batch.target_weights
        gains = jnp.where(mask > 0, new - (batch.extras["reference"] if self.compares else 0.0), 0.0)
        gained, tokens = (sums_of_samples(x, batch) for x in (gains * mask, mask))
        if self.loss in ("ipo", "sigmoid_norm", "simpo"):
            gained = gained / jnp.maximum(tokens, 1.0)
        chosen, rejected = _two(gained)
        there = pairs_there(batch)
        found = _LOSSES[self.loss](self, chosen - rejected)
        if self.rpo_alpha:
            likely, length = (_two(sums_of_samples(x, batch))[0] for x in (new * mask, mask))
            found = found - self.rpo_alpha * likely / jnp.maximum(length, 1.0)
        return {
            name: jnp.where(there, x, 0.0)
            for name, x in {
                "loss": found, "margin": self.beta * (chosen - rejected), "accuracy": chosen > rejected,
                "chosen": self.beta * chosen, "rejected": self.beta * rejected,
            }.items()
        }  # fmt: skip


def pairs_there(batch: Batch) -> jax.Array:
    """(B, R): whether there is a pair, both answers of which are learnt."""
    chosen, rejected = _two(sums_of_samples(batch.target_weights, batch))
    return (chosen > 0) & (rejected > 0)


def _two(of_samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    even = of_samples[:, : of_samples.shape[1] // 2 * 2]
    return even[:, ::2], even[:, 1::2]


def _sigmoid(p: Preference, gap: jax.Array) -> jax.Array:
    x = p.beta * gap
    return -(1.0 - p.smoothing) * jax.nn.log_sigmoid(x) - p.smoothing * jax.nn.log_sigmoid(-x)


def _robust(p: Preference, gap: jax.Array) -> jax.Array:
    x, e = p.beta * gap, p.smoothing
    return (-(1.0 - e) * jax.nn.log_sigmoid(x) + e * jax.nn.log_sigmoid(-x)) / (1.0 - 2.0 * e)


_LOSSES: dict[str, Margin] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "robust": _robust,
    "hinge": lambda p, gap: jax.nn.relu(1.0 - p.beta * gap),
    "ipo": lambda p, gap: (gap - 1.0 / (2.0 * p.beta)) ** 2,
    "simpo": lambda p, gap: -jax.nn.log_sigmoid(p.beta * gap - p.gamma),
}


def dpo(config: Config) -> Objective:
    """Of each record's two answers the chosen one is preferred.

    Raises:
        UserError: dpo.label_smoothing with a loss that has no place for it.
    """
    keys = config.dpo
    if keys.label_smoothing and keys.loss not in ("sigmoid", "sigmoid_norm", "robust"):
        fix = "leave --config.dpo.label_smoothing out"
        raise UserError("dpo.label_smoothing", f"{keys.label_smoothing:g} with dpo.loss={keys.loss}", "0", fix)
    if keys.label_smoothing >= 0.5:
        raise UserError("dpo.label_smoothing", f"{keys.label_smoothing:g}", "below 0.5", "exchange the answers instead")
    rules = Preference(keys.loss, keys.beta, keys.label_smoothing, keys.gamma, keys.reference, keys.rpo_alpha)

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        # Statistics stand still: the model and its reference see the same ECG alike.
        found = rules.pairs(log_probs(model.llm, model.hidden(batch, (), key), batch), batch)
        return {name: values.sum() for name, values in found.items()}

    def counts(batch: Batch) -> Sums:
        return dict.fromkeys(("loss", "margin", "accuracy", "chosen", "rejected"), pairs_there(batch).sum())

    needs = frozenset({"llm", *(("reference",) if rules.compares else ())})
    return Objective(loss, counts, Samples(chosen_and_rejected), needs)


def chosen_and_rejected(record: Record) -> list[Sample]:
    """The record's conversation, and the same with its rejected answer in place of the last one.

    Raises:
        UserError: it has none, or it is the chosen one; an answer is empty.
    """
    if record.rejected is None:
        expected = "a column rejected beside text, or the columns prompt, chosen and rejected"
        raise UserError("rejected", "no rejected answer", expected, "mend the record, or train with objective=sft")
    turns = to_turns(record.text)
    if turns[-1].role != "assistant":
        raise UserError("text", f"a last turn of the {turns[-1].role}", "the chosen answer last", "mend the record")
    *_, worse = to_turns(record.rejected)
    for key, answer in (("text", turns[-1]), ("rejected", worse)):
        if not answer.text.strip():
            raise UserError(key, "an empty answer", "two answers with words", "mend the record, or leave it out")
    if turns[-1].text == worse.text:
        raise UserError("rejected", "the chosen answer again", "another one", "mend the record, or leave it out")
    return [Sample(turns, last=True), Sample([*turns[:-1], worse], last=True)]
