"""SigLIP's vision tower, SigLIP 2's of variable resolution (NaFlex), and the same transformer over patches of an ECG.

Flow: patches (B, P, F) -> (B, P, D) with positions -> transformer -> SigLIP 1, 2: attention pooling, (B, 1, D);
SigLIP-ECG: adaptive average pooling, (B, N, D).
Dimension letters: B images or signals, P patches (of an image: slots, of which the first `rows x columns` are
used), F values of a patch, D width, N signal tokens, C leads, L samples, G rows or columns of the position table.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.ecg.images import SIGLIP, SIGLIP2
from elm_jax.errors import UserError
from elm_jax.models.attention import attend
from elm_jax.models.encoders.transformer import Mlp, Transformer, TransformerConfig
from elm_jax.models.encoders.vision import (
    USUAL_LINEARS,
    USUAL_NORMS,
    WHERE,
    PatchEmbedding,
    blocks,
    linear,
    named_inputs,
    norm,
    normal,
    normalised,
    one_token,
    published,
    read_images,
    table,
    unit,
)
from elm_jax.models.encoders.vision_config import Siglip2Config, SiglipConfig, SiglipEcgConfig
from elm_jax.models.hints import weight
from elm_jax.models.layers import LayerNorm, Linear, plus, repeated
from elm_jax.models.names import Rule
from elm_jax.models.pooling import adaptive_average_pool


class PoolingHead(nnx.Module):
    """One learned query that attends to all tokens, then an MLP: (B, P, D) -> (B, 1, D)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        width, self.heads = config.width, config.heads
        self.probe = nnx.Param(normal(rngs, (1, 1, width), 0.02, param_dtype), axes=(None, None, "signal"))
        linear = partial(Linear, rngs=rngs, bias=True, param_dtype=param_dtype)
        self.qkv = linear(width, 3 * width, ("signal", "heads"))
        self.o = linear(width, width, ("heads", "signal"))
        self.norm = LayerNorm(width, config.norm_eps, param_dtype)
        self.mlp = Mlp(config, rngs, param_dtype)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """`valid` (B, P) bool says which tokens are seen."""
        probe = repeated(self.probe, (x.shape[0], 1, x.shape[2]), x.dtype)
        width, kernel = x.shape[2], weight(self.qkv.kernel, x.dtype)
        assert self.qkv.bias is not None
        q = plus(probe @ kernel[:, :width], self.qkv.bias, slice(width))
        k, v = jnp.split(plus(x @ kernel[:, width:], self.qkv.bias, slice(width, None)), 2, axis=-1)
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1) for part in (q, k, v))
        out = attend(q, k, v, valid[:, None, None, :], q.shape[-1] ** -0.5, "xla")
        x = self.o(out.reshape(probe.shape))
        return x + self.mlp(self.norm(x))


class Siglip(nnx.Module):
    """SigLIP's vision tower: the pooled image, of length one. `width` is D (768 as published)."""

    def __init__(
        self, config: SiglipConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        one_token("siglip", tokens)
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.hidden_size, jnp.dtype(dtype)
        self.patches = PatchEmbedding(config.patch_size, self.width, True, rngs, param_dtype)
        positions = normal(rngs, (config.patches, self.width), self.width**-0.5, param_dtype)
        self.positions = nnx.Param(positions, axes=(None, "signal"))
        self.transformer = Transformer(config.transformer(), rngs, param_dtype)
        self.post_norm = LayerNorm(self.width, config.layer_norm_eps, param_dtype)
        self.head = PoolingHead(config.transformer(), rngs, param_dtype)

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Images -> (B, 1, D) float32, computed in `dtype`; `weights` and `train` change nothing.

        signals: as for `vision.Clip`. Raises UserError for images of another size.
        """
        (images,) = named_inputs(signals, ("pixel_values",), {}).values()
        x = self.patches(read_images(images, SIGLIP, self.config).astype(self.dtype))
        x = self.post_norm(self.transformer(plus(x, self.positions)))
        return unit(self.head(x, jnp.ones(x.shape[:2], bool)))


class Siglip2(nnx.Module):
    """SigLIP 2's vision tower: the pooled image, of length one. `width` is D (1152 as published)."""

    def __init__(
        self, config: Siglip2Config, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        one_token("siglip2", tokens)
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.hidden_size, jnp.dtype(dtype)
        size = 3 * config.patch_size**2
        self.patches = Linear(size, self.width, (None, "signal"), rngs, bias=True, param_dtype=param_dtype)
        positions = normal(rngs, (config.num_patches, self.width), self.width**-0.5, param_dtype)
        self.positions = nnx.Param(positions, axes=(None, "signal"))
        self.transformer = Transformer(config.transformer(), rngs, param_dtype)
        self.post_norm = LayerNorm(self.width, config.layer_norm_eps, param_dtype)
        self.head = PoolingHead(config.transformer(), rngs, param_dtype)

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Patches -> (B, 1, D) float32, computed in `dtype`; `weights` and `train` change nothing.

        signals: a dict of `patches` (B, P, F), uint8 or already normalised floats, row by row and a pixel's
            colours together; `mask` (B, P), True at patches that exist; `shape` (B, 2) int, their rows and
            columns. The names of Hugging Face's processor (pixel_values, pixel_attention_mask,
            spatial_shapes) do, too. An image without any patch gives something finite.
        Raises UserError for other names, and for patches of another size.
        """
        inputs = named_inputs(signals, ("patches", "mask", "shape"), PROCESSOR_NAMES)
        patches, valid, shape = (inputs[name] for name in ("patches", "mask", "shape"))
        size = self.config.patch_size
        if patches.ndim != 3 or patches.shape[2] != 3 * size * size:
            fix = f"cut the images into patches of {size} x {size} pixels"
            raise UserError(f"{WHERE} patches", f"shape {patches.shape}", f"(batch, patches, {3 * size**2})", fix)
        colours = normalised(patches.reshape(*patches.shape[:2], -1, 3), SIGLIP2)
        x = self.embed(colours.reshape(patches.shape).astype(self.dtype), shape)
        return unit(self.head(self.encode(x, valid), valid.astype(bool)))

    def embed(self, patches: jax.Array, shape: jax.Array) -> jax.Array:
        """Normalised patches (B, P, F), their rows and columns (B, 2) -> (B, P, D), what the transformer reads."""
        weights = resize_weights(shape, patches.shape[1], self.config.grid)
        # Positions are geometry: in float32 whatever the network computes in.
        highest = jax.lax.Precision.HIGHEST
        places = jnp.einsum("bpg,gd->bpd", weights, weight(self.positions, jnp.float32), precision=highest)
        return self.patches(patches) + places.astype(patches.dtype)

    def encode(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """What `embed` gives -> the last hidden states (B, P, D)."""
        return self.post_norm(self.transformer(x, valid))


class SiglipEcg(nnx.Module):
    """SigLIP 2's transformer over patches of an ECG; `tokens` is N and `width` D (768 as published)."""

    def __init__(
        self, config: SiglipEcgConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.hidden_size, jnp.dtype(dtype)
        size = config.num_leads * config.patch_size
        self.patches = Linear(size, self.width, (None, "signal"), rngs, bias=True, param_dtype=param_dtype)
        positions = normal(rngs, (config.patches, self.width), self.width**-0.5, param_dtype)
        self.positions = nnx.Param(positions, axes=(None, "signal"))
        self.transformer = Transformer(config.transformer(), rngs, param_dtype)
        self.post_norm = LayerNorm(self.width, config.layer_norm_eps, param_dtype)

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) signals -> (B, N, D) float32, computed in `dtype`; `weights` and `train` change nothing.

        Raises UserError as `encode`.
        """
        return adaptive_average_pool(self.encode(signals), self.tokens)

    def encode(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> the last hidden states (B, P, D) in `dtype`.

        Raises UserError for signals of other leads or another length than the config's.
        """
        leads, samples, size = self.config.num_leads, self.config.seq_len, self.config.patch_size
        if signals.ndim != 3 or signals.shape[1:] != (leads, samples):
            fix = "give such signals, or set encoder.config.num_leads and seq_len and train it so"
            raise UserError(WHERE, f"shape {signals.shape}", f"(batch, {leads} leads, {samples} samples)", fix)
        if self.config.min_max:
            signals = min_max(signals)
        cut = signals.astype(self.dtype).reshape(-1, leads, samples // size, size)
        patches = cut.transpose(0, 2, 1, 3).reshape(-1, samples // size, leads * size)  # lead after lead
        return self.post_norm(self.transformer(plus(self.patches(patches), self.positions)))


def min_max(signals: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x - min) / (max - min + eps) over all leads of each ECG: (B, C, L) float32."""
    x = signals.astype(jnp.float32)
    low, high = (bound(x, axis=(1, 2), keepdims=True) for bound in (jnp.min, jnp.max))
    return (x - low) / (high - low + eps)


def resize_weights(shape: jax.Array, patches: int, grid: int) -> jax.Array:
    """How much of each entry of a (G, G) position table each patch has: (B, `patches`, G * G) float32.

    shape: (B, 2) int, rows and columns of each image. The table is resized to them by bilinear interpolation,
    with a wider filter where it shrinks (as torch with antialias and without align_corners). Slots beyond
    rows x columns have the first position.
    """
    rows, columns = (jnp.maximum(shape[:, i : i + 1].astype(jnp.int32), 1) for i in (0, 1))  # (B, 1)
    slot = jnp.arange(patches)[None]
    slot = jnp.where(slot < rows * columns, slot, 0)
    of_row, of_column = _axis_weights(slot // columns, rows, grid), _axis_weights(slot % columns, columns, grid)
    return (of_row[..., :, None] * of_column[..., None, :]).reshape(*slot.shape, grid * grid)


def _axis_weights(place: jax.Array, size: jax.Array, grid: int) -> jax.Array:
    """Places (B, P) of `size` (B, 1) -> the weights (B, P, G) of a row of `grid` values."""
    step = grid / size.astype(jnp.float32)  # table entries to a place
    centre = (place + 0.5) * step
    distance = jnp.abs(jnp.arange(grid) + 0.5 - centre[..., None])
    weights = jnp.maximum(0, 1 - distance / jnp.maximum(step, 1)[..., None])
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


# -- names of the weights -------------------------------------------------------------------------------------------

PROCESSOR_NAMES = {"pixel_values": "patches", "pixel_attention_mask": "mask", "spatial_shapes": "shape"}
PREFIX = "vision_encoder."  # of a SigLIP-ECG
NEWER = (("encoder.model.", "encoder.model.", f"{PREFIX}vision_model."),)  # its trainer's names since August 2026
OF_TOWER = ("embeddings.", "encoder.", "post_layernorm.", "head.")  # what the bare tower's names begin with
OTHER_PARTS = ("text_model.", "logit_scale", "logit_bias")


def tower(theirs: str) -> list[Rule]:
    """The parts that images and signals share, below `theirs`."""
    return [
        *linear(f"{theirs}.embeddings.patch_embedding", "patches"),
        Rule(f"{theirs}.embeddings.position_embedding.weight", "positions"),
        *blocks(f"{theirs}.encoder.layers.{{layer}}", USUAL_LINEARS, USUAL_NORMS),
        *norm(f"{theirs}.post_layernorm", "post_norm"),
    ]


def with_head(theirs: str) -> list[Rule]:
    """The tower and its pooling head."""
    return [
        *tower(theirs),
        Rule(f"{theirs}.head.probe", "head.probe"),
        Rule(f"{theirs}.head.attention.in_proj_weight", "head.qkv.kernel", True),
        Rule(f"{theirs}.head.attention.in_proj_bias", "head.qkv.bias"),
        *linear(f"{theirs}.head.attention.out_proj", "head.o"),
        *norm(f"{theirs}.head.layernorm", "head.norm"),
        *linear(f"{theirs}.head.mlp.fc1", "head.mlp.fc1"),
        *linear(f"{theirs}.head.mlp.fc2", "head.mlp.fc2"),
    ]


siglip2_rule = table(with_head("vision_model"))
siglip_ecg_rule = table(tower(f"{PREFIX}vision_model"))


def siglip2_name(name: str) -> str | None:
    """`published` for SigLIP 1 and 2: no text tower, and no scale or bias of the loss."""
    return published(name, "vision_model.", OF_TOWER, OTHER_PARTS)


def siglip_ecg_name(name: str) -> str | None:
    """`published` for SigLIP-ECG: no text tower, no scale or bias of the loss, no pooling head."""
    other = tuple(f"{PREFIX}{part}" for part in (*OTHER_PARTS, "vision_model.head."))
    of_images = name.startswith("vision_model.embeddings.")
    return None if of_images else published(name, PREFIX, ("vision_model.", *OTHER_PARTS), other)


def orah_name(name: str) -> str | None:
    """`siglip_ecg_name` for Orah: no connector and no language model."""
    return None if name.startswith(("projector.", "language_model.")) else siglip_ecg_name(name)


def siglip_ecg_absent(names: Collection[str]) -> Collection[str]:
    """SigLIP 2 itself, whose blocks SigLIP-ECG starts from, has patches and positions of images."""
    if any(PREFIX in name for name in names):
        return ()
    return [siglip_ecg_rule(ours).theirs for ours in ("patches.kernel", "patches.bias", "positions")]
