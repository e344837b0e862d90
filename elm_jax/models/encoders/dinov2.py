"""DINOv2's image encoder (Oquab et al. 2023, arXiv 2304.07193): a ViT whose blocks scale what they add.

Flow: (B, H, W, 3) image -> (B, P, D) patches -> (B, 1 + P, D) with a class token -> transformer -> norm -> the class
token (B, 1, D). Dimension letters as in `vision`; G rows and columns of the position table.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.ecg.images import DINOV2
from elm_jax.models.encoders.transformer import Transformer
from elm_jax.models.encoders.vision import (
    VIT_LINEARS,
    PatchEmbedding,
    blocks,
    linear,
    named_inputs,
    norm,
    normal,
    one_token,
    published,
    read_images,
    table,
)
from elm_jax.models.encoders.vision_config import Dinov2Config
from elm_jax.models.hints import weight
from elm_jax.models.layers import Held, LayerNorm, repeated
from elm_jax.models.names import Rule

_CUBIC = -0.75  # the free coefficient of the cubic convolution, as PyTorch has it


class Dinov2(nnx.Module):
    """DINOv2: the class token after the last norm. `width` is D (768 as published).

    The mask token, which only its pretraining uses, is held and never trained.
    """

    def __init__(
        self, config: Dinov2Config, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        one_token("dinov2", tokens)
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.hidden_size, jnp.dtype(dtype)
        self.patches = PatchEmbedding(config.patch_size, self.width, True, rngs, param_dtype)
        self.cls = nnx.Param(normal(rngs, (1, 1, self.width), 0.02, param_dtype), axes=(None, None, "signal"))
        self.mask_token = Held(jnp.zeros((1, self.width), jnp.float32), axes=(None, "signal"))
        positions = normal(rngs, (1, config.patches + 1, self.width), 0.02, param_dtype)
        self.positions = nnx.Param(positions, axes=(None, None, "signal"))
        self.transformer = Transformer(config.transformer(), rngs, param_dtype)
        self.norm = LayerNorm(self.width, config.layer_norm_eps, param_dtype)

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Images -> (B, 1, D) float32, computed in `dtype`; `weights` and `train` change nothing.

        signals: as for `vision.Clip`. Raises UserError for images of another size.
        """
        (images,) = named_inputs(signals, ("pixel_values",), {}).values()
        x = self.patches(read_images(images, DINOV2, self.config).astype(self.dtype))
        cls = repeated(self.cls, (x.shape[0], 1, x.shape[2]), x.dtype)
        x = jnp.concatenate([cls, x], axis=1) + self.places().astype(x.dtype)
        return self.norm(self.transformer(x)[:, :1]).astype(jnp.float32)

    def places(self) -> jax.Array:
        """(1, 1 + P, D) float32: the table of positions, resized to the patches of an image."""
        table, config = weight(self.positions, jnp.float32), self.config
        old, new = config.image_size // config.patch_size, config.resolution // config.patch_size
        if old == new:
            return table
        share, grid = bicubic_weights(new, old), table[0, 1:].reshape(old, old, -1)
        resized = jnp.einsum("ig,jh,ghd->ijd", share, share, grid, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([table[:, :1], resized.reshape(1, new * new, -1)], axis=1)


def bicubic_weights(new: int, old: int) -> np.ndarray:
    """(`new`, `old`) float32: how much of each of `old` values each of `new` has, by cubic convolution.

    As PyTorch's bicubic interpolation without align_corners and antialias: beyond the edges the outermost are repeated.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first, weights = np.floor(centre).astype(int), np.zeros((new, old))
    for tap in range(-1, 3):
        far = np.abs(centre - first - tap)
        near = ((_CUBIC + 2) * far - (_CUBIC + 3)) * far**2 + 1
        share = np.where(far <= 1, near, ((_CUBIC * far - 5 * _CUBIC) * far + 8 * _CUBIC) * far - 4 * _CUBIC)
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), share)
    return weights.astype(np.float32)


# -- names of the weights -------------------------------------------------------------------------------------------

_LAYER = "encoder.layer.{layer}"
_MLPS = ("mlp.fc1", "mlp.fc2", "mlp.weights_in", "mlp.weights_out")  # plain, and gated as the giant's
_RULES = [
    Rule("embeddings.cls_token", "cls"),
    Rule("embeddings.mask_token", "mask_token"),
    *linear("embeddings.patch_embeddings.projection", "patches"),
    Rule("embeddings.position_embeddings", "positions"),
    *blocks(_LAYER, {**VIT_LINEARS, **{name: name for name in _MLPS}}, ("norm1", "norm2")),
    *(Rule(f"{_LAYER}.layer_scale{i}.lambda1", f"transformer.blocks.scale{i}") for i in (1, 2)),
    *norm("layernorm", "norm"),
]
dinov2_rule = table(_RULES)


def dinov2_name(name: str) -> str | None:
    """`published` for DINOv2: without the name of the model around it, and no classifier."""
    found = published(name, "", (), ("classifier.",))
    return None if found is None else found.removeprefix("dinov2.")


def absent(names: Collection[str]) -> Collection[str]:
    """A file may have no mask token; a fresh one is zeros, as in Hugging Face."""
    return ("embeddings.mask_token",)
