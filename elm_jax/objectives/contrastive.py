"""Objectives that hold an ECG against its text: of all pairs of a step, those that belong together are told.

Each row of a batch is a pair: one ECG, and the ids of its text in `tokens`. All other rows of the step, of whatever
device, are its negatives; a row without weight is none.

Dimension letters: B pairs of a step, C leads, L samples, T tokens, D width of what is compared.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.data.samples import REPORT, Samples
from elm_jax.errors import UserError
from elm_jax.models.elm import ELM
from elm_jax.models.hints import hint
from elm_jax.objectives.objective import Objective, Sums, check_encoder

HIDDEN = -1e30  # a logit that counts for nothing


def unit(x: jax.Array) -> jax.Array:
    """(B, D) in any dtype -> float32 of length one."""
    x = x.astype(jnp.float32)
    # An empty row may be nothing but zeros, where the root's own derivative is no number.
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def cosines(x: jax.Array, y: jax.Array) -> jax.Array:
    """(B, B) of all pairs of x and y, both (B, D), of the whole step: rows of every device against those of all."""
    return jnp.matmul(unit(x), hint(unit(y), None, None).T, precision="highest")


def info_nce(x: jax.Array, y: jax.Array, there: jax.Array, scale: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Of each pair, -log of the part that its own partner has: (B,) among all y for its x, (B,) among all x for its y.

    Pairs that are not `there` (B,) bool are nobody's partners, and cost 0. `scale` multiplies the cosines.
    """
    logits = cosines(x, y) * scale
    own = jnp.diagonal(logits)
    of_x = jax.nn.logsumexp(jnp.where(there[None, :], logits, HIDDEN), axis=1) - own
    of_y = jax.nn.logsumexp(jnp.where(there[:, None], logits, HIDDEN), axis=0) - own
    return jnp.where(there, of_x, 0.0), jnp.where(there, of_y, 0.0)


def merl(config: Config) -> Objective:
    """ECG and report find each other, and two views of an ECG's features do (MERL's CMA and UMA; arXiv 2403.06659)."""
    tokens, scale = _checked(config, "merl"), 1 / config.ssl.temperature

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        encoder: Any = model.encoder
        signals, ids, there = _pairs(batch, tokens)
        learns = "encoder" in trained
        features = encoder.narrow_map(signals, there.astype(jnp.float32), learns)
        pooled, text = encoder.att_pool(features), encoder.texts(ids)
        views = encoder.views(features, key if learns else None)
        cma, uma = (jnp.stack(info_nce(x, y, there, scale)).sum() for x, y in ((pooled, text), views))
        return {"loss": cma + uma, "cma": cma, "uma": uma, "matched": _matched(pooled, text, there).sum()}

    names = ("loss", "cma", "uma", "matched")
    return _objective("merl", loss, names, "key")


def clip(config: Config) -> Objective:
    """The images of ECGs and their reports find each other, by a scale that is learnt (Radford et al. 2021)."""
    tokens = _checked(config, "clip")

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        encoder: Any = model.encoder
        signals, ids, there = _pairs(batch, tokens)
        ecg, text = encoder.ecgs(signals), encoder.texts(ids)
        rows, columns = info_nce(text, ecg, there, _scale(encoder))
        return {"loss": (rows + columns).sum() / 2, "matched": _matched(ecg, text, there).sum()}

    return _objective(str(config.encoder.name), loss, ("loss", "matched"))


def siglip(config: Config) -> Objective:
    """Of each ECG with each report it is told whether they belong together (Zhai et al. 2023, arXiv 2303.15343)."""
    tokens = _checked(config, "siglip_ecg", "siglip2")

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        encoder: Any = model.encoder
        signals, ids, there = _pairs(batch, tokens)
        ecg, text = encoder.ecgs(signals), encoder.texts(ids)
        errors = pairwise_errors(text, ecg, there, _scale(encoder), encoder.bias[...].astype(jnp.float32))
        return {"loss": errors.sum(), "matched": _matched(ecg, text, there).sum()}

    return _objective(str(config.encoder.name), loss, ("loss", "matched"))


CAPTIONS = 2.0  # weight of writing reports, as published


def coca(config: Config) -> Objective:
    """ECG and report find each other, and the report is written from the ECG (CoCa; arXiv 2205.01917).

    The loss is the mean over the step's pairs, and twice that over the tokens of their reports.
    """
    tokens = _checked(config, "ecg_coca")

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        encoder: Any = model.encoder
        signals, ids, there = _pairs(batch, tokens)
        ecg, memory = encoder.both(signals)
        text = encoder.texts(ids)
        rows, columns = info_nce(ecg, text, there, _scale(encoder))
        logits, words = encoder.captions(ids, memory), encoder.text.seen(ids[:, 1:]) & there[:, None]
        errors = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
        contrastive = (rows + columns).sum() / 2
        caption = jnp.where(words, errors, 0.0).sum() / jnp.maximum(words.sum(), 1)
        whole = contrastive / jnp.maximum(there.sum(), 1) + CAPTIONS * caption
        matched = _matched(ecg, text, there).sum()
        return {"loss": whole, "contrastive": contrastive, "caption": caption, "matched": matched}

    return _objective("ecg_coca", loss, ("contrastive", "matched"), means=("loss", "caption"))


def pairwise_errors(
    x: jax.Array, y: jax.Array, there: jax.Array, scale: jax.typing.ArrayLike, bias: jax.typing.ArrayLike
) -> jax.Array:
    """(B,) of each x the sum over all y of -log of how likely it is held to be what it is: its partner, or not.

    Pairs that are not `there` (B,) bool are left out. `scale` multiplies the cosines, `bias` is added.
    """
    logits = cosines(x, y) * scale + bias
    errors = -jax.nn.log_sigmoid(jnp.where(jnp.eye(len(x), dtype=bool), logits, -logits))
    return jnp.where(there[:, None] & there[None, :], errors, 0.0).sum(1)


def _scale(encoder: Any) -> jax.Array:
    return jnp.exp(encoder.log_scale[...].astype(jnp.float32))


def _objective(
    encoder: str, loss: Any, names: Collection[str], *needs: str, means: Collection[str] = ()
) -> Objective:
    """names: of sums over pairs; means: of what is one of the whole step already."""

    def counts(batch: Batch) -> Sums:
        pairs: jax.Array = (batch.signal_weights[:, 0] > 0).sum()
        return {**dict.fromkeys(names, pairs), **dict.fromkeys(means, jnp.ones(()))}

    return Objective(loss, counts, Samples(phase=REPORT), frozenset({"encoder", *needs}), pretrains=encoder)


def _checked(config: Config, *encoders: str) -> int:
    """How many tokens texts have.

    Raises:
        UserError: the encoder is another, or the negatives would be those of a part of a step.
    """
    check_encoder(config, *encoders)
    if config.optim.accum_steps > 1:
        expected = f"1 with objective={config.objective}, whose negatives are all rows of a step"
        fix = "set it so: more devices, or fewer rows in train.batch_size, save memory"
        raise UserError("optim.accum_steps", str(config.optim.accum_steps), expected, fix)
    return config.data.max_len


def _pairs(batch: Batch, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ECGs (B, C, L), the ids of their texts (B, T), and which pairs are there (B,) bool."""
    (signals,) = batch.signals.values()
    return jax.tree.map(lambda x: x[:, 0], signals), batch.tokens[:, :tokens], batch.signal_weights[:, 0] > 0


def _matched(x: jax.Array, y: jax.Array, there: jax.Array) -> jax.Array:
    """(B,) bool: whether of all y the own one is nearest to each x."""
    near = jnp.where(there[None, :], cosines(x, y), HIDDEN)
    return there & (jnp.argmax(near, axis=1) == jnp.arange(len(near)))
