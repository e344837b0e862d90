"""Objectives of encoders alone: what they learn from recordings, without an LLM.

Dimension letters: B rows, S signal slots, R = B·S signals, C leads, L samples, n patches.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.data.ecg_ids import PADDED
from elm_jax.data.samples import LABEL, REPORT, Samples
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.models.elm import ELM
from elm_jax.models.encoders import kind_of
from elm_jax.models.encoders.dit import INDEPENDENT, dit_errors
from elm_jax.models.encoders.mae import PATCHINGS
from elm_jax.models.encoders.mae_pretraining import rebuilding_error, rebuilt_signals
from elm_jax.models.encoders.next_token import next_id_errors
from elm_jax.models.encoders.sequence import next_embedding_error
from elm_jax.objectives.objective import Objective, Redrawn, Sums, check_encoder
from elm_jax.scoring.generation import twelve_leads

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of time, from which a diffusion model rebuilds ECGs


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

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        (ids, there), encoder = _ids(batch), model.encoder
        return {"loss": jnp.where(there, next_id_errors(encoder, ids), 0.0).sum()}

    def counts(batch: Batch) -> Sums:
        ids, there = _ids(batch)
        return {"loss": ((ids[:, 1:] != PADDED) & there[:, None]).sum()}

    def forecast(model: ELM, batch: Batch, key: jax.Array) -> Redrawn:
        """The second half of each ECG's ids, from the first."""
        (ids, there), encoder = _ids(batch), cast(Any, model.encoder)
        length = (ids != PADDED).sum(1, keepdims=True)
        places = jnp.arange(ids.shape[1])
        hidden = (places >= length // 2) & (places < length)
        made = encoder.forecast(jnp.where(hidden, PADDED, ids), config.eval.temperature, key)
        return Redrawn(ids, jnp.where(places < length, made, PADDED), hidden, there)

    check_encoder(config, "next_token")
    return Objective(
        loss, counts, Samples(phase=None), frozenset({"encoder"}), pretrains="next_token",
        redraws={"forecast": forecast},
    )  # fmt: skip


def signal2vec(config: Config) -> Objective:
    """An id of an ECG's symbols is told from ids at random by those around it; each ECG counts alike."""

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        assert key is not None
        (ids, there), encoder = _ids(batch), cast(Any, model.encoder)
        return {"loss": jnp.where(there, encoder.pair_errors(ids, key, "encoder" in trained), 0.0).sum()}

    check_encoder(config, "signal2vec")
    return Objective(
        loss, _recordings, Samples(phase=None), frozenset({"encoder", "key"}), pretrains="signal2vec"
    )  # fmt: skip


def dit(config: Config) -> Objective:
    """Noise becomes an ECG, by a rectified flow or DDPM: of nothing, a label, a lead, or (dit_text) a report."""
    check_encoder(config, "dit", "dit_text")
    sizes = kind_of(str(config.encoder.name)).config(config.encoder.config)
    if sizes.condition == "text" and config.encoder.name != "dit_text":
        expected = "label, lead or None with encoder.name=dit"
        raise UserError("encoder.config.condition", "text", expected, "set --config.encoder.name=dit_text")
    phase = {"text": REPORT, "label": LABEL}.get(sizes.condition)
    if sizes.loss_type == "ddpm" and config.data.normalize.endswith("zscore"):
        expected = "values from 0 to 1 with loss_type=ddpm, which is bounded by them: minmax, lead_minmax"
        raise UserError("data.normalize", config.data.normalize, expected, "set it so, or learn a rectified_flow")

    def parts(batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
        """The signals, which are there, and the conditions: what is said of a row holds for each of its ECGs."""
        signals, weights = (x.reshape(-1, *x.shape[2:]) for x in (_signals(batch), batch.signal_weights))
        tokens = jnp.repeat(batch.tokens, batch.signal_weights.shape[1], axis=0)
        given = {"text": tokens[:, : config.data.max_len], "label": tokens[:, 0], "lead": signals}
        return signals, weights > 0, given.get(sizes.condition)

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        assert key is not None
        signals, there, given = parts(batch)
        errors = dit_errors(cast(Any, model.encoder), signals, given, key, "encoder" in trained)
        return {"loss": jnp.where(there, errors, 0.0).sum()}

    def redraw(level: float | None, model: ELM, batch: Batch, key: jax.Array) -> Redrawn:
        """Each ECG made of noise, or at a level rebuilt from itself with noise."""
        signals, there, given = parts(batch)
        encoder: Any = model.encoder
        x, guidance = encoder.of(signals).astype(jnp.float32), config.eval.guidance
        condition = None if given is None else encoder.conditions(given)
        noise = jax.random.normal(jax.random.fold_in(key, 0), x.shape)
        if level is None:
            made = encoder.generate(noise, jax.random.fold_in(key, 1), condition, guidance)
            features = encoder.clean_features(x).mean(1), encoder.clean_features(made).mean(1)
        else:
            made, features = encoder.rebuild_from(x, noise, level, condition, guidance), None
        truth, made = x.swapaxes(1, 2), made.swapaxes(1, 2)
        if sizes.condition == "lead":  # of which, with those that are made, all others are sums
            own, places = (jnp.array(each) for each in (list(map(LEADS.index, INDEPENDENT)), sizes.generated))
            truth, made = (twelve_leads(signals.at[:, places].set(each)[:, own], jnp) for each in (truth, made))
        shown = LEADS.index(sizes.condition_lead) if sizes.condition == "lead" else -1
        hidden = jnp.broadcast_to((jnp.arange(truth.shape[1]) != shown)[:, None], truth.shape)
        return Redrawn(truth, made, hidden, there, features)

    redraws = {"made": partial(redraw, None)} | {f"rebuilt_{level:g}": partial(redraw, level) for level in LEVELS}
    return Objective(
        loss, _recordings, Samples(phase=phase, classes=sizes.num_label_classes), frozenset({"encoder", "key"}),
        pretrains=str(config.encoder.name), redraws=redraws, drawn="made",
    )  # fmt: skip


def _recordings(batch: Batch) -> Sums:
    return {"loss": (batch.signal_weights > 0).sum()}


def _masked(config: Config, name: str, normalised: bool, absolute: bool = False) -> Objective:
    """The mean squared, or absolute, error of hidden patches, of each recording alike."""
    check_encoder(config, name)
    keys = config.ssl
    normalised = normalised if keys.norm_patches is None else keys.norm_patches
    if name in PATCHINGS:
        sizes = {"num_leads": len(config.data.leads), "seq_len": config.data.segment_len, **config.encoder.config}
        patches = kind_of(name).config(sizes).patches[0]
        if int(patches * (1 - keys.mask_ratio)) < 1:
            found, most = f"{keys.mask_ratio:g} of {patches} patches, all of them", f"at most {1 - 1 / patches:g}"
            raise UserError("ssl.mask_ratio", found, most, "lower it, or encoder.config.patch_size")

    def loss(model: ELM, batch: Batch, key: jax.Array | None, trained: Collection[str]) -> Sums:
        assert key is not None
        encoder: Any = model.encoder
        signals, weights = (x.reshape(-1, *x.shape[2:]) for x in (_signals(batch), batch.signal_weights))
        rebuilt = encoder.rebuild(signals, encoder.noise(key, len(signals)), keys.mask_ratio)
        errors, counted = rebuilding_error(rebuilt, normalised, absolute=absolute)
        axes = tuple(range(1, errors.ndim))
        of_signals = errors.sum(axes) / jnp.maximum(counted.sum(axes), 1.0)
        return {"loss": jnp.where(weights > 0, of_signals, 0.0).sum()}

    def redraw(model: ELM, batch: Batch, key: jax.Array) -> Redrawn:
        encoder: Any = model.encoder
        signals, weights = (x.reshape(-1, *x.shape[2:]) for x in (_signals(batch), batch.signal_weights))
        rebuilt = encoder.rebuild(signals, encoder.noise(key, len(signals)), keys.mask_ratio)
        return Redrawn(*rebuilt_signals(rebuilt, normalised, encoder.config.join), weights > 0)

    redraws = {} if name == "vit" else {"rebuilt": redraw}  # which has images
    return Objective(
        loss, _recordings, Samples(phase=None), frozenset({"encoder", "key"}), pretrains=name, redraws=redraws,
        drawn=next(iter(redraws), ""),
    )  # fmt: skip


def _ids(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(R, T) ids, and (R,) which ECGs are there."""
    return _signals(batch).reshape(-1, _signals(batch).shape[-1]), batch.signal_weights.reshape(-1) > 0


def _signals(batch: Batch) -> jax.Array:
    (signals,) = batch.signals.values()
    return signals
