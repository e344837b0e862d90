"""Masked image modelling: what ViT's pretraining trains beside the encoder. Source: SimMIM, Xie et al. 2022, as
Hugging Face's ViTForMaskedImageModeling has it.

Dimension letters: B images, P patches of an image, p pixels across a patch, D width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.ecg.images import VIT
from elm_jax.models.encoders.mae_pretraining import MASKED, Order, Rebuilt
from elm_jax.models.encoders.vision import OF_VIT, Vit, linear, norm, normal, published, read_images, table, vit_rules
from elm_jax.models.encoders.vision_config import VitConfig
from elm_jax.models.hints import weight
from elm_jax.models.layers import LayerNorm, plus


class Painter(nnx.Module):
    """(B, P, D) -> (B, P, 3 p²): the colours of each patch, first all of red, by a convolution of one pixel."""

    def __init__(self, width: int, values: int, rngs: nnx.Rngs, param_dtype: Any) -> None:
        kernel = normal(rngs, (1, 1, width, values), 0.02, param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None, None, "signal", None))
        self.bias = nnx.Param(jnp.zeros((values,), param_dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return plus(x @ weight(self.kernel, x.dtype)[0, 0], self.bias)


class MaskedVit(Vit):
    """ViT with its mask token, its last norm, and the decoder that paints hidden patches."""

    def __init__(
        self, config: VitConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        super().__init__(config, tokens, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.mask_token = nnx.Param(jnp.zeros((1, 1, self.width), param_dtype), axes=(None, None, "signal"))
        self.norm = LayerNorm(self.width, config.layer_norm_eps, param_dtype)
        self.decoder = Painter(self.width, 3 * config.patch_size**2, rngs, param_dtype)

    def noise(self, key: jax.Array, count: int) -> jax.Array:
        """(B, P)."""
        return jax.random.uniform(key, (count, self.config.patches))

    def rebuild(self, images: jax.Array, noise: jax.Array, masked: float = MASKED) -> Rebuilt:
        """Images as the encoder takes them, and noise (B, P), by which patches are hidden."""
        return self.paint(images, Order.of(noise, masked).hidden)

    def paint(self, images: jax.Array, hidden: jax.Array) -> Rebuilt:
        """Images, and which patches (B, P) are hidden; a patch's values are its colours, first all of red."""
        images = read_images(images, VIT, self.config)
        latent = self.norm(self.transformer(self.embed(images.astype(self.dtype), hidden)))
        size, across = self.config.patch_size, self.config.image_size // self.config.patch_size
        cut = images.reshape(len(images), across, size, across, size, 3).transpose(0, 1, 3, 5, 2, 4)
        return Rebuilt(self.decoder(latent[:, 1:]), cut.reshape(*hidden.shape, -1), hidden, latent)


masked_vit_rule = table([*vit_rules, *norm("vit.layernorm", "norm"), *linear("decoder.0", "decoder")])


_DRAWN = ("mask_token", "norm.scale", "norm.bias", "decoder.kernel", "decoder.bias")


def masked_vit_absent(names: Collection[str]) -> Collection[str]:
    """Published files have no mask token and no decoder, those of an ELM no last norm."""
    return tuple(masked_vit_rule(ours).theirs for ours in _DRAWN)


def masked_vit_name(name: str) -> str | None:
    """`published` for ViT with its decoder."""
    return published(name, "vit.", OF_VIT, ("vit.pooler.", "classifier."))
