"""What a row of the table of objectives says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from elm_jax.config import Config
from elm_jax.data.batch import Array, Batch
from elm_jax.data.samples import Samples
from elm_jax.errors import UserError
from elm_jax.models.elm import ELM

Sums = dict[str, jax.Array]  # scalars by name; "loss" is what is learnt from, the others are logged


class Redrawn(NamedTuple):
    """ECGs as a model rebuilds, makes or continues them, beside the true ones.

    truth, made: (R, C, L) signals, or (R, T) ids; hidden: which of their values the model was not shown; there: (R,)
    which are ECGs at all; features: (R, D) of the true and of the made ones, where ECGs were made of nothing.
    """

    truth: Array
    made: Array
    hidden: Array
    there: Array
    features: tuple[Array, Array] | None = None


Redraw = Callable[[ELM, Batch, jax.Array], Redrawn]  # what is drawn at random comes from the third


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
        pretrains: the encoder, where this is its own pretraining: the model is that encoder with all that it trains.
        better: the number of which more is better, by which validations are judged; "": by the loss, less of it.
        temperature: what logits are divided by where log probabilities are taken.
        redraws: of an encoder alone, by name, what an evaluation has it rebuild, make or continue.
        drawn: which of them is drawn at validations.
    """

    loss: Callable[[ELM, Batch, jax.Array | None, Collection[str]], Sums]
    counts: Callable[[Batch], Sums]
    samples: Samples = Samples()
    needs: frozenset[str] = frozenset({"llm"})
    temperature: float = 1.0
    pretrains: str = ""
    better: str = ""
    redraws: Mapping[str, Redraw] = field(default_factory=dict)
    drawn: str = ""


def check_encoder(config: Config, *names: str) -> None:
    """Raise UserError unless there is one encoder, and it is one that the objective pretrains."""
    if config.encoder.name not in names:
        expected = f"{' or '.join(names)} with objective={config.objective}"
        raise UserError("encoder.name", str(config.encoder.name), expected, f"set --config.encoder.name={names[0]}")
    if len(config.views) > 1:
        fix = "choose an elm of one view, and no retrieval.index"
        raise UserError("elm", config.elm, f"a single encoder with objective={config.objective}", fix)
