"""CLIP, SigLIP 2 and SigLIP-ECG as they are pretrained: the encoder, a text tower, and how sharply both are compared.

Dimension letters: B pairs, C leads, L samples, T tokens, W width of what is compared.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.encoders.siglip import OTHER_PARTS, PREFIX, PoolingHead, Siglip2, SiglipEcg, with_head
from elm_jax.models.encoders.text_tower import CLIP_TEXT, NO_WEIGHTS, SIGLIP_TEXT, Paired, TextConfig, TextTower
from elm_jax.models.encoders.vision import Clip, clip_rule, published, table
from elm_jax.models.encoders.vision_config import ClipConfig, Siglip2Config, SiglipEcgConfig
from elm_jax.models.names import Rule

SIGLIP_SCALE, SIGLIP_BIAS = math.log(10), -10.0  # before training, as Zhai et al. 2023 (arXiv 2303.15343) have them
CLIP_SCALE = math.log(1 / 0.07)  # as Radford et al. 2021 have it


class _Compared(nnx.Module):
    """What is beside an encoder: the tower, the logarithm of the scale, and SigLIP's bias."""

    text: TextTower

    def pair(self, sizes: TextConfig, width: int, how: dict[str, Any], scale: float, bias: float | None) -> None:
        """Add these to an encoder whose embeddings have `width`. UserError where the tower's have another."""
        self.text = TextTower(sizes, **how)
        if self.text.width != width:
            found = f"a tower of width {self.text.width} beside an encoder of {width}"
            raise UserError("ssl.text", found, "the same width", "take the tower of encoder.checkpoint, or its size")
        shape = () if bias is None else (1,)
        self.log_scale = nnx.Param(jnp.full(shape, scale, how["param_dtype"]), axes=(None,) * len(shape))
        if bias is not None:
            self.bias = nnx.Param(jnp.full(shape, bias, how["param_dtype"]), axes=(None,))

    def ecgs(self, signals: Any) -> jax.Array:
        """What the encoder takes -> (B, W)."""
        return self(signals)[:, 0]  # type: ignore[operator]

    def texts(self, ids: jax.Array) -> jax.Array:
        """(B, T) ids -> (B, W) float32."""
        return self.text(ids)


class PairedClip(Clip, _Compared):
    """CLIP of images and texts."""

    def __init__(self, sizes: tuple[ClipConfig, TextConfig], tokens: int = 1, **how: Any) -> None:
        super().__init__(sizes[0], tokens, **how)
        self.pair(sizes[1], self.width, how, CLIP_SCALE, None)


class PairedSiglip2(Siglip2, _Compared):
    """SigLIP 2 of images and texts."""

    def __init__(self, sizes: tuple[Siglip2Config, TextConfig], tokens: int = 1, **how: Any) -> None:
        super().__init__(sizes[0], tokens, **how)
        self.pair(sizes[1], self.width, how, SIGLIP_SCALE, SIGLIP_BIAS)


class PairedSiglipEcg(SiglipEcg, _Compared):
    """SigLIP 2 of ECGs and texts, with the pooling head that an ELM has no use for."""

    def __init__(self, sizes: tuple[SiglipEcgConfig, TextConfig], tokens: int = 1, **how: Any) -> None:
        super().__init__(sizes[0], tokens, **how)
        self.head = PoolingHead(sizes[0].transformer(), how["rngs"], how["param_dtype"])
        self.pair(sizes[1], self.width, how, SIGLIP_SCALE, SIGLIP_BIAS)

    def ecgs(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> (B, W)."""
        x = self.encode(signals)
        return self.head(x, jnp.ones(x.shape[:2], bool))[:, 0]


CLIP_PAIR, SIGLIP_PAIR, SIGLIP_ECG_PAIR = Paired(CLIP_TEXT), Paired(SIGLIP_TEXT), Paired(SIGLIP_TEXT, PREFIX)
_SCALES = {"log_scale": "logit_scale", "bias": "logit_bias"}
_siglip2, _siglip_ecg = table(with_head("vision_model")), table(with_head(f"{PREFIX}vision_model"))


@CLIP_PAIR.with_rule
def paired_clip_rule(name: str) -> Rule:
    """The rule of our array `name`, as the other two."""
    return Rule(_SCALES[name], name) if name in _SCALES else clip_rule(name)


@SIGLIP_PAIR.with_rule
def paired_siglip2_rule(name: str) -> Rule:
    return Rule(_SCALES[name], name) if name in _SCALES else _siglip2(name)


@SIGLIP_ECG_PAIR.with_rule
def paired_siglip_ecg_rule(name: str) -> Rule:
    return Rule(PREFIX + _SCALES[name], name) if name in _SCALES else _siglip_ecg(name)


def paired_name(name: str) -> str | None:
    """`published` for both models of images: only tables of numbers are left out."""
    return None if name.endswith(NO_WEIGHTS) else published(name, "", (), ())


def paired_siglip_ecg_name(name: str) -> str | None:
    """`published` for SigLIP-ECG with its text tower: no patches and positions of images."""
    of_images = name.startswith("vision_model.embeddings.")
    starts = ("vision_model.", *OTHER_PARTS)
    return None if of_images or name.endswith(NO_WEIGHTS) else published(name, PREFIX, starts, ())
