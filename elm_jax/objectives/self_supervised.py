"""Objectives of encoders alone: what they learn from recordings, without an LLM.

Dimension letters: B rows, S signal slots, R = B·S signals, C leads, L samples, n patches.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.data.ecg_ids import PADDED
from elm_jax.data.samples import LABEL, REPORT, Samples
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import kind_of
from elm_jax.models.encoders.dit import dit_errors
from elm_jax.models.encoders.mae_pretraining import rebuilding_error
from elm_jax.models.encoders.next_token import next_id_errors
from elm_jax.models.encoders.sequence import next_embedding_error
from elm_jax.objectives.objective import Objective, Sums, check_encoder


def st_mem(config: Config) -> Objective:
    """Patches of single leads are hidden, and rebuilt from all others (Na et al. 2024, arXiv 2402.09450)."""
    return _masked(config, "st_mem", normalised=True)


def mtae(config: Config) -> Objective:
    """Stretches of time are hidden in all leads."""
    return _masked(config, "mtae", normalised=True)


def mlae(config: Config) -> Objective:
    """Whole leads are hidden."""
    return _masked(config, "mlae", normalised=False)


def mae_vit(config: Config) -> Objective:
    """Whole leads are hidden, and rebuilt as they are."""
    return _masked(config, "mae_vit", normalised=False)


def vit(config: Config) -> Objective:
    """Patches of an image are hidden, and painted as they are: the error is absolute (Xie et al. 2022)."""
    return _masked(config, "vit", normalised=False, absolute=True)


def nepa(config: Config) -> Objective:
    """The embedding of each sample is predicted from those before it."""

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        signals, weights = (x.reshape(-1, *x.shape[2:]) for x in (_signals(batch), batch.signal_weights))
        encoder: Any = model.encoder
        return {"loss": jnp.where(weights > 0, next_embedding_error(encoder, signals), 0.0).sum()}

    check_encoder(config, "nepa")
    return Objective(loss, _recordings, Samples(phase=None), frozenset({"encoder"}), pretrains="nepa")


def next_token(config: Config) -> Objective:
    """The next id of an ECG's symbols is predicted from those before it; each id counts alike."""

    def flat(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return _signals(batch).reshape(-1, _signals(batch).shape[-1]), batch.signal_weights.reshape(-1) > 0

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        (ids, there), encoder = flat(batch), model.encoder
        return {"loss": jnp.where(there, next_id_errors(encoder, ids), 0.0).sum()}

    def counts(batch: Batch) -> Sums:
        ids, there = flat(batch)
        return {"loss": ((ids[:, 1:] != PADDED) & there[:, None]).sum()}

    check_encoder(config, "next_token")
    return Objective(loss, counts, Samples(phase=None), frozenset({"encoder"}), pretrains="next_token")


def dit(config: Config) -> Objective:
    """Noise becomes an ECG, by a rectified flow or DDPM: of nothing, a label, a lead, or (dit_text) a report."""
    check_encoder(config, "dit", "dit_text")
    sizes = kind_of(str(config.encoder.name)).config(config.encoder.config)
    phase = {"text": REPORT, "label": LABEL}.get(sizes.condition)

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        assert key is not None
        encoder: Any = model.encoder
        signals, weights = (x.reshape(-1, *x.shape[2:]) for x in (_signals(batch), batch.signal_weights))
        # What is said of a row holds for each of its ECGs.
        tokens = jnp.repeat(batch.tokens, batch.signal_weights.shape[1], axis=0)
        given = {"text": tokens[:, : config.data.max_len], "label": tokens[:, 0], "lead": signals}.get(sizes.condition)
        errors = dit_errors(encoder, signals, given, key, "encoder" in trained)
        return {"loss": jnp.where(weights > 0, errors, 0.0).sum()}

    samples = Samples(phase=phase, classes=sizes.num_label_classes)
    return Objective(loss, _recordings, samples, frozenset({"encoder", "key"}), pretrains=str(config.encoder.name))


def _recordings(batch: Batch) -> Sums:
    return {"loss": (batch.signal_weights > 0).sum()}


def _masked(config: Config, name: str, normalised: bool, absolute: bool = False) -> Objective:
    """The mean squared, or absolute, error of hidden patches, of each recording alike."""
    check_encoder(config, name)
    keys = config.ssl
    normalised = normalised if keys.norm_patches is None else keys.norm_patches

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        assert key is not None
        encoder: Any = model.encoder
        signals, weights = (x.reshape(-1, *x.shape[2:]) for x in (_signals(batch), batch.signal_weights))
        rebuilt = encoder.rebuild(signals, encoder.noise(key, len(signals)), keys.mask_ratio)
        errors, counted = rebuilding_error(rebuilt, normalised, absolute=absolute)
        axes = tuple(range(1, errors.ndim))
        of_signals = errors.sum(axes) / jnp.maximum(counted.sum(axes), 1.0)
        return {"loss": jnp.where(weights > 0, of_signals, 0.0).sum()}

    return Objective(loss, _recordings, Samples(phase=None), frozenset({"encoder", "key"}), pretrains=name)


def _signals(batch: Batch) -> jax.Array:
    (signals,) = batch.signals.values()
    return signals
