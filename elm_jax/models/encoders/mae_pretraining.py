"""ST-MEM, MTAE and MLAE as they are pretrained: most patches are hidden, and rebuilt from the others.

Letters as in `mae`: B signals, C leads, n patches (of a lead for ST-MEM), P values of a patch, D and E widths; k
patches that are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.models.encoders.mae import (
    DECODER_NORM_EPS,
    XAVIER,
    MaeConfig,
    MaskedAutoencoder,
    StMem,
    position_embedding,
    token,
)
from elm_jax.models.encoders.transformer import Transformer
from elm_jax.models.hints import weight
from elm_jax.models.layers import LayerNorm, Linear, plus, repeated

MASKED = 0.75  # of the patches
PATCH_EPS = 1e-6  # added to the variance of a patch


class Rebuilt(NamedTuple):
    """What became of signals: the decoder's patches and the true ones (..., n, P), which of them were hidden (..., n),
    and the latents of the patches that were seen, after the encoder's norm."""

    patches: jax.Array
    truth: jax.Array
    hidden: jax.Array
    latent: jax.Array


class Order(NamedTuple):
    """Patches in the order of their noise: (..., k) those seen, and (..., n) where each patch stands in that order."""

    seen: jax.Array
    place: jax.Array

    @classmethod
    def of(cls, noise: jax.Array, masked: float = MASKED) -> Order:
        """noise (..., n): the patches of the least are seen, n (1 - masked) of them rounded down."""
        order = jnp.argsort(noise, -1)
        return cls(order[..., : int(noise.shape[-1] * (1 - masked))], jnp.argsort(order, -1))

    @property
    def hidden(self) -> jax.Array:
        """(..., n) float32."""
        return (self.place >= self.seen.shape[-1]).astype(jnp.float32)

    def take(self, patches: jax.Array) -> jax.Array:
        """(..., n, D) -> (..., k, D)."""
        return jnp.take_along_axis(patches, self.seen[..., None], axis=-2)

    def put_back(self, seen: jax.Array, mask: nnx.Variable) -> jax.Array:
        """(..., k, E), and a token that stands for what is hidden, -> (..., n, E)."""
        missing = self.place.shape[-1] - seen.shape[-2]
        masks = repeated(mask, (*seen.shape[:-2], missing, seen.shape[-1]), seen.dtype)
        return jnp.take_along_axis(jnp.concatenate([seen, masks], -2), self.place[..., None], axis=-2)


class MaskedTime(MaskedAutoencoder):
    """MTAE and MLAE with all that their pretraining trains."""

    def __init__(self, config: MaeConfig, tokens: int = 1, **how: Any) -> None:
        super().__init__(config, tokens, **how, pretrain=True)

    def noise(self, key: jax.Array, count: int) -> jax.Array:
        """(B, n)."""
        return jax.random.uniform(key, (count, self.config.patches[0]))

    def rebuild(self, signals: jax.Array, noise: jax.Array, masked: float = MASKED) -> Rebuilt:
        """(B, C, L) signals and noise (B, n), by which patches are hidden."""
        truth, order = self.config.cut(signals), Order.of(noise, masked)
        place = weight(self.position, jnp.float32)
        seen = order.take((self.patch(truth) + place[:, 1:]).astype(self.patch.dtype))
        cls = repeated(self.cls, (len(signals), 1, seen.shape[-1]), seen.dtype) + place[:, :1].astype(seen.dtype)
        latent = self.norm(self.transformer(jnp.concatenate([cls, seen], 1)))
        narrow = self.to_decoder(latent)
        whole = jnp.concatenate([narrow[:, :1], order.put_back(narrow[:, 1:], self.mask)], 1)
        rebuilt = self.head(self.decoder_norm(self.decoder(plus(whole, self.decoder_position))))
        return Rebuilt(rebuilt[:, 1:], truth, order.hidden, latent)


class MaskedStMem(StMem):
    """ST-MEM with the decoder of its pretraining, which rebuilds each lead for itself."""

    def __init__(
        self, config: MaeConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        super().__init__(config, tokens, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        (patches, size), narrow = config.patches, config.decoder_embed_dim
        linear = partial(Linear, rngs=rngs, bias=True, init=XAVIER, param_dtype=param_dtype)
        self.to_decoder = linear(config.embed_dim, narrow, ("embed", None))
        self.mask = token(rngs, param_dtype, 1, 1, narrow)
        self.decoder_position = position_embedding(config, 1, patches, 1, narrow)
        self.decoder = Transformer(config.decoder, rngs, param_dtype)
        self.decoder_norm = LayerNorm(narrow, DECODER_NORM_EPS, param_dtype)
        self.head = linear(narrow, size, ("embed", None))

    def noise(self, key: jax.Array, count: int) -> jax.Array:
        """(B, C, n)."""
        return jax.random.uniform(key, (count, self.config.num_leads, self.config.patches[0]))

    def rebuild(self, signals: jax.Array, noise: jax.Array, masked: float = MASKED) -> Rebuilt:
        """(B, C, L) signals and noise (B, C, n), by which patches of each lead are hidden."""
        truth, order = self.config.cut(signals), Order.of(noise, masked)
        batch, leads = noise.shape[:2]
        place = weight(self.position, jnp.float32) + weight(self.lead, jnp.float32)[:, None]  # (C, n + 2, D)
        x = self.patch(truth)
        seen = order.take((x + place[:, 1:-1]).astype(x.dtype))
        sep = repeated(self.sep, (batch, leads, 1, self.width), x.dtype)
        first, last = ((sep + place[:, at]).astype(x.dtype) for at in (slice(0, 1), slice(-1, None)))
        seen = jnp.concatenate([first, seen, last], 2)
        latent = self.norm(self.transformer(seen.reshape(batch, -1, self.width)))
        narrow = self.to_decoder(latent.reshape(batch, leads, -1, self.width))
        whole = jnp.concatenate(
            [narrow[:, :, :1], order.put_back(narrow[:, :, 1:-1], self.mask), narrow[:, :, -1:]], 2
        )
        each = plus(whole.reshape(batch * leads, -1, whole.shape[-1]), self.decoder_position)
        rebuilt = self.head(self.decoder_norm(self.decoder(each)))[:, 1:-1]
        return Rebuilt(rebuilt.reshape(batch, leads, *rebuilt.shape[1:]), truth, order.hidden, latent)


def rebuilt_signals(
    rebuilt: Rebuilt, normalised: bool, join: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Signals (B, C, L) float32: the true ones, those with what was hidden as it was rebuilt, and what was hidden.

    normalised: patches were rebuilt less their mean, by their deviation, and get the true ones. join: from patches to
    signals.
    """
    truth, made = rebuilt.truth.astype(jnp.float32), rebuilt.patches.astype(jnp.float32)
    if normalised:
        spread = jnp.sqrt(truth.var(-1, keepdims=True, ddof=1) + PATCH_EPS)
        made = made * spread + truth.mean(-1, keepdims=True)
    hidden = jnp.broadcast_to(rebuilt.hidden[..., None] > 0, truth.shape)
    return join(truth), join(jnp.where(hidden, made, truth)), join(hidden)


def rebuilding_error(
    rebuilt: Rebuilt, normalised: bool, padded: jax.Array | None = None, absolute: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(..., n) float32: the mean squared error of each patch that counts, 0 of the others; and which count.

    Those count that were hidden, and of which nothing is `padded` (..., n).
    normalised: the truth is each patch less its mean, by its (sample) deviation. absolute: the error is not squared.
    """
    counted = rebuilt.hidden if padded is None else rebuilt.hidden * ~padded
    truth = rebuilt.truth.astype(jnp.float32)
    if normalised:
        centred = truth - truth.mean(-1, keepdims=True)
        truth = centred / jnp.sqrt(truth.var(-1, keepdims=True, ddof=1) + PATCH_EPS)
    error = rebuilt.patches.astype(jnp.float32) - truth
    return (jnp.abs(error) if absolute else error**2).mean(-1) * counted, counted
