"""A one-dimensional ResNet-18 for any of the twelve leads, and any length, in one batch: ECG-LM's encoder (Yang et al.
2025, Health Data Science 5:0221, of which no code is published: how leads and lengths vary is our choice).

It is MERL's network with a table of leads before it. The first convolution's kernel of each lead, with an embedding,
names that lead; the leads that are there are averaged, so that three of them are on the scale of twelve. Beyond its own
end a signal is what it would be alone: every normalisation leaves zeros there, as a convolution pads with, statistics
are of the samples that are there, and the pooling is over these. So a signal's embedding is that of the signal alone,
with whatever it is batched; and with all leads and no embedding it is MERL's, whose checkpoints it takes.
Dimension letters: B signals, C places of leads, L samples, N signal tokens, D and W widths of the end and the stem.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.ecg.names import LEADS
from elm_jax.errors import UserError
from elm_jax.models.encoders import merl
from elm_jax.models.encoders.vision import WHERE, named_inputs
from elm_jax.models.hints import weight
from elm_jax.models.names import Rule
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.schema import key, sizes_of

INPUTS = ("signal", "leads", "samples")
EMBEDDING = "lead_embedding"


@dataclass(frozen=True)
class AnyLeadsConfig(merl.MerlConfig):
    """Sizes of the encoder; it knows all twelve leads, whichever the data have, and signals of any length."""

    resnet_type: str = key("resnet18", "the layout of its blocks", choices=merl.LAYOUTS)

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> "AnyLeadsConfig":
        """Read `encoder.config`; UserError for an unknown field or value. What says the data's size is let pass."""
        own = {name: value for name, value in config.items() if name != "num_leads"}
        return cls(**sizes_of(cls, "encoder.config", own, merl.IGNORED_FIELDS))


class AnyLeads(merl.Merl):
    """The encoder; `tokens` is N and `width` D (512 at config.width 64)."""

    def __init__(
        self, config: AnyLeadsConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        super().__init__(config, tokens, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.lead_embedding = nnx.Param(jnp.zeros((len(LEADS), config.width), param_dtype), axes=(None, "conv_out"))

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Signals -> (B, N, D) float32, computed in `dtype`; N bins of each signal's own samples.

        signals: a dict of `signal` (B, C, L); `leads` (B, C) int, of each row its place among the twelve, from 1 on, or
            0 where there is none; `samples` (B,) int, how many of L are there. What lies in rows of no lead and beyond
            the samples counts nothing. Or an array (B, 12, L) of whole signals.
        weights, train: as for MERL.
        Raises UserError for other names or shapes.
        """
        whole = {} if isinstance(signals, Mapping) else _all_there(signals)
        signal, leads, samples = (named_inputs(whole or signals, INPUTS, {})[name] for name in INPUTS)
        if signal.ndim != 3 or leads.shape != signal.shape[:2] or samples.shape != signal.shape[:1]:
            found = f"shapes {signal.shape}, {leads.shape} and {samples.shape}"
            raise UserError(WHERE, found, "(batch, leads, samples), (batch, leads) and (batch,)", "give such arrays")
        there = jnp.arange(signal.shape[2]) < samples[:, None]  # (B, L)
        places = leads[:, None] == jnp.arange(1, len(LEADS) + 1)[:, None]  # (B, 12, C)
        present = places.any(2)
        x = jnp.take_along_axis(signal, places.argmax(2)[:, :, None], axis=1)
        x = jnp.where(present[:, :, None] & there[:, None], x, 0.0).astype(self.dtype)
        parts = present / jnp.maximum(present.sum(1, keepdims=True), 1)  # of the mean over leads
        embedding = parts @ weight(self.lead_embedding, jnp.float32)
        x = self.conv1(x.transpose(0, 2, 1)) * (len(LEADS) * parts.max(1)).astype(self.dtype)[:, None, None]
        times = there * (1.0 if weights is None else weights.astype(jnp.float32)[:, None])
        x = self.trunk(x + embedding.astype(self.dtype)[:, None], merl.strided(times, self.conv1.stride), train)
        stride = self.conv1.stride * 2 ** (self.stages - 1)
        return adaptive_average_pool(x, self.tokens, -(-samples // stride))

    @staticmethod
    def check_values(signals: Any) -> None:
        """Raise UserError for numbers that stand for no lead, or for one twice; for what no compiled call can see."""
        if not isinstance(signals, Mapping) or "leads" not in signals:
            return
        for row, leads in enumerate(jnp.asarray(signals["leads"]).tolist()):
            named = [lead for lead in leads if lead]
            if not all(0 < lead <= len(LEADS) for lead in named) or len(set(named)) < len(named):
                expected = f"each of 1 to {len(LEADS)} once at most, for {', '.join(LEADS)}, and 0 for none"
                raise UserError(f"{WHERE} leads, signal {row}", str(leads), expected, "correct them")


def _all_there(signals: jax.Array) -> dict[str, jax.Array]:
    """Whole signals (B, 12, L) by the names of INPUTS; UserError for others."""
    if signals.ndim != 3 or signals.shape[1] != len(LEADS):
        fix = f"give {', '.join(INPUTS)} for signals of fewer leads"
        raise UserError(WHERE, f"shape {signals.shape}", f"(batch, {len(LEADS)} leads, samples)", fix)
    batch, _, length = signals.shape
    leads = jnp.broadcast_to(jnp.arange(1, len(LEADS) + 1), (batch, len(LEADS)))
    return {"signal": signals, "leads": leads, "samples": jnp.full(batch, length)}


def weight_rule(name: str) -> Rule:
    """The rule of our array `name`: MERL's, and of the table of leads (12, W)."""
    return Rule(EMBEDDING, EMBEDDING) if name == EMBEDDING else merl.weight_rule(name)


def absent(names: Collection[str]) -> Collection[str]:
    """MERL has no table of leads: it begins with zeros, which change nothing."""
    return (EMBEDDING,)
