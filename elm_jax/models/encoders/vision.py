"""CLIP's and ViT's image encoders: one embedding of an image.

Flow: (B, H, W, 3) image -> (B, P, D) patches -> (B, 1 + P, D) with a class token -> transformer -> (B, 1, E).
Dimension letters: B images, H and W pixels, p patch size, P patches of an image, D width, E width of the embedding.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.ecg.images import CLIP, VIT, Processing
from elm_jax.errors import UserError
from elm_jax.models.encoders.transformer import Transformer
from elm_jax.models.encoders.vision_config import ClipConfig, ImageConfig, VitConfig
from elm_jax.models.hints import weight
from elm_jax.models.layers import Held, LayerNorm, Linear, plus, repeated
from elm_jax.models.names import Rule, bare_name

WHERE = "encoder input"


class PatchEmbedding(nnx.Module):
    """Each patch of an image times one kernel: (B, H, W, 3) -> (B, P, D), row by row."""

    def __init__(self, size: int, width: int, bias: bool, rngs: nnx.Rngs, param_dtype: Any) -> None:
        kernel = normal(rngs, (size, size, 3, width), (3 * size * size) ** -0.5, param_dtype)
        # Columns before rows: the reverse of the published (D, 3, rows, columns).
        self.kernel = nnx.Param(kernel, axes=(None, None, None, "signal"))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype), axes=("signal",)) if bias else None

    def __call__(self, images: jax.Array) -> jax.Array:
        kernel = weight(self.kernel, images.dtype)
        size, batch = kernel.shape[0], images.shape[0]
        rows, columns = (pixels // size for pixels in images.shape[1:3])
        whole = images[:, : rows * size, : columns * size]  # some models have a margin that fills no patch
        cut = whole.reshape(batch, rows, size, columns, size, 3)
        x = jnp.einsum("bhrwck,crkd->bhwd", cut, kernel).reshape(batch, -1, kernel.shape[-1])
        return x if self.bias is None else plus(x, self.bias)


class Clip(nnx.Module):
    """CLIP's vision tower: the class token, projected and of length one. `width` is E (512 as published)."""

    def __init__(
        self, config: ClipConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        one_token("clip", tokens)
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.projection_dim, jnp.dtype(dtype)
        width, norm = config.hidden_size, partial(LayerNorm, config.hidden_size, config.layer_norm_eps, param_dtype)
        self.patches = PatchEmbedding(config.patch_size, width, False, rngs, param_dtype)
        self.cls = nnx.Param(normal(rngs, (width,), 0.02, param_dtype), axes=(None,))
        positions = normal(rngs, (config.patches + 1, width), 0.02, param_dtype)
        self.positions = nnx.Param(positions, axes=(None, "signal"))
        self.pre_norm = norm()
        self.transformer = Transformer(config.transformer(), rngs, param_dtype)
        self.post_norm = norm()
        self.projection = Linear(width, self.width, ("signal", None), rngs, param_dtype=param_dtype)

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Images -> (B, 1, E) float32, computed in `dtype`; `weights` and `train` change nothing.

        signals: uint8 (B, H, W, 3), or already normalised floats (B, H, W, 3) or (B, 3, H, W), or these as
            `pixel_values` of a dict. Raises UserError for images of another size.
        """
        (images,) = named_inputs(signals, ("pixel_values",), {}).values()
        x = self.transformer(self.embed(read_images(images, CLIP, self.config).astype(self.dtype)))
        return unit(self.projection(self.post_norm(x[:, :1])))

    def embed(self, images: jax.Array) -> jax.Array:
        """Normalised images (B, H, W, 3) -> (B, 1 + P, D), what the transformer reads."""
        x = self.patches(images)
        cls = repeated(self.cls, (x.shape[0], 1, x.shape[2]), x.dtype)
        return self.pre_norm(plus(jnp.concatenate([cls, x], axis=1), self.positions))


class Vit(nnx.Module):
    """ViT: the mean over all tokens of what enters the transformer and what leaves each of its blocks.

    `width` is D. With `mask_ratio` (0.75 by the compat name `vit_random_mask`) patches are replaced at random by
    the mask token, as the reference does at all times. It draws them anew for every call; here they are drawn
    from the image itself, so that an image has one embedding, in whatever batch it comes. A mask that the caller
    gives is taken instead.
    Without a `mask_ratio` the mask token is only held: nothing would train it.
    """

    def __init__(
        self, config: VitConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        one_token("vit", tokens)
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.hidden_size, jnp.dtype(dtype)
        self.patches = PatchEmbedding(config.patch_size, self.width, True, rngs, param_dtype)
        self.cls = nnx.Param(normal(rngs, (1, 1, self.width), 0.02, param_dtype), axes=(None, None, "signal"))
        token = jnp.zeros((1, 1, self.width), param_dtype if config.mask_ratio > 0 else jnp.float32)
        self.mask_token = (nnx.Param if config.mask_ratio > 0 else Held)(token, axes=(None, None, "signal"))
        positions = normal(rngs, (1, config.patches + 1, self.width), 0.02, param_dtype)
        self.positions = nnx.Param(positions, axes=(None, None, "signal"))
        self.transformer = Transformer(config.transformer(config.qkv_bias), rngs, param_dtype)

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Images -> (B, 1, D) float32, computed in `dtype`; `weights` and `train` change nothing.

        signals: as for `Clip`; a dict may also hold `bool_masked_pos` (B, P), True at the patches to mask.
        Raises UserError for images or masks of another size.
        """
        inputs = named_inputs(signals, ("pixel_values",), {}, ("bool_masked_pos",))
        images = read_images(inputs["pixel_values"], VIT, self.config)
        mask = inputs.get("bool_masked_pos")
        if mask is None and self.config.mask_ratio > 0:
            mask = mask_of(images, self.config.patches, self.config.mask_ratio)
        x = self.embed(images.astype(self.dtype), mask)
        states = (x.astype(jnp.float32) + self.transformer.sum_of_outputs(x)) / (self.config.num_hidden_layers + 1)
        return jnp.mean(states, axis=1, keepdims=True)

    def embed(self, images: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalised images (B, H, W, 3) -> (B, 1 + P, D), what the transformer reads; mask (B, P)."""
        x = self.patches(images)
        if mask is not None:
            if mask.shape != x.shape[:2]:
                fix = "give one value for each patch"
                raise UserError(f"{WHERE} bool_masked_pos", f"shape {mask.shape}", str(x.shape[:2]), fix)
            x = jnp.where(mask.astype(bool)[:, :, None], repeated(self.mask_token, x.shape, x.dtype), x)
        cls = repeated(self.cls, (x.shape[0], 1, x.shape[2]), x.dtype)
        return plus(jnp.concatenate([cls, x], axis=1), self.positions)


def mask_of(images: jax.Array, patches: int, ratio: float) -> jax.Array:
    """(B, `patches`) bool, each True with probability `ratio`: a function of each image's values alone."""
    bits = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32).reshape(images.shape[0], -1)
    odd = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1  # so that the places of the values count, too
    seeds = jnp.sum(bits * odd, axis=1, dtype=jnp.uint32)

    def draw(seed: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(0), seed), (patches,)) < ratio

    return jax.vmap(draw)(seeds)


def one_token(name: str, tokens: int) -> None:
    """UserError unless `tokens` is 1."""
    if tokens != 1:
        expected = f"1: {name} makes one embedding of an image"
        raise UserError("encoder.tokens", str(tokens), expected, "set --config.encoder.tokens=1")


def named_inputs(
    signals: Any, required: tuple[str, ...], aliases: Mapping[str, str], optional: tuple[str, ...] = ()
) -> dict[str, jax.Array]:
    """What an encoder is given, by name: a dict, or the array that `required` alone names.

    `aliases` are other names of the inputs. Raises UserError for an unknown or a missing name.
    """
    given = dict(signals) if isinstance(signals, Mapping) else {required[0]: signals}
    inputs = {aliases.get(name, name): value for name, value in given.items()}
    if not set(required) <= set(inputs) <= {*required, *optional}:
        fix = "give these arrays, such as the image processor makes"
        raise UserError(WHERE, f"{', '.join(given)}", " and ".join([*required, *optional]), fix)
    return inputs


def read_images(images: jax.Array, processing: Processing, config: ImageConfig) -> jax.Array:
    """Images of either layout and dtype -> (B, H, W, 3) float32 as the model was trained on; UserError for others."""
    size = config.edge
    if images.ndim == 4 and images.shape[1:] == (3, size, size):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        expected = f"(batch, {size}, {size}, 3)"
        fix = f"give images of {size} x {size} pixels: data.representation=rgb or stacked_signal"
        raise UserError(WHERE, f"shape {images.shape}", expected, fix)
    return normalised(images, processing)


def normalised(pixels: jax.Array, processing: Processing) -> jax.Array:
    """(..., 3) colours from 0 to 255 -> float32 by the mean and deviation of `processing`; floats stay as they are."""
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        return pixels.astype(jnp.float32)
    mean, std = (jnp.asarray(v, jnp.float32) for v in (processing.mean, processing.std))
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def unit(x: jax.Array) -> jax.Array:
    """`x` in float32, of length one along the last axis; zeros, and their gradients, stay finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: Any) -> jax.Array:
    """Initial values."""
    return (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


# -- names of the weights -------------------------------------------------------------------------------------------


def linear(theirs: str, ours: str) -> list[Rule]:
    """The kernel and the bias of a linear layer."""
    return [Rule(f"{theirs}.weight", f"{ours}.kernel", True), Rule(f"{theirs}.bias", f"{ours}.bias")]


def norm(theirs: str, ours: str) -> list[Rule]:
    """The scale and the bias of a LayerNorm."""
    return [Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")]


def blocks(theirs: str, linears: Mapping[str, str], norms: tuple[str, str]) -> list[Rule]:
    """The stacked layers: `linears` maps our modules to theirs below `theirs`, a pattern with {layer}."""
    ours = "transformer.blocks"
    rules = [rule for name, each in linears.items() for rule in linear(f"{theirs}.{each}", f"{ours}.{name}")]
    both = (norm(f"{theirs}.{each}", f"{ours}.norm{i}") for i, each in enumerate(norms, start=1))
    return rules + [rule for each in both for rule in each]


# Of CLIP and SigLIP.
USUAL_LINEARS = {
    **{f"attention.{n}": f"self_attn.{n}_proj" for n in "qkv"},
    "attention.o": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
USUAL_NORMS = ("layer_norm1", "layer_norm2")
VIT_LINEARS = {
    **{f"attention.{n[0]}": f"attention.attention.{n}" for n in ("query", "key", "value")},
    "attention.o": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def table(rules: list[Rule]) -> Callable[[str], Rule]:
    """Our name -> its rule."""
    return {rule.ours: rule for rule in rules}.__getitem__


clip_rule = table([
    Rule("vision_model.embeddings.class_embedding", "cls"),
    Rule("vision_model.embeddings.patch_embedding.weight", "patches.kernel", True),
    Rule("vision_model.embeddings.position_embedding.weight", "positions"),
    *norm("vision_model.pre_layrnorm", "pre_norm"),
    *blocks("vision_model.encoder.layers.{layer}", USUAL_LINEARS, USUAL_NORMS),
    *norm("vision_model.post_layernorm", "post_norm"),
    Rule("visual_projection.weight", "projection.kernel", True),
])  # fmt: skip
vit_rules = [
    Rule("vit.embeddings.cls_token", "cls"),
    Rule("vit.embeddings.mask_token", "mask_token"),
    *linear("vit.embeddings.patch_embeddings.projection", "patches"),
    Rule("vit.embeddings.position_embeddings", "positions"),
    *blocks("vit.encoder.layer.{layer}", VIT_LINEARS, ("layernorm_before", "layernorm_after")),
]
vit_rule = table(vit_rules)


def published(name: str, prefix: str, starts: tuple[str, ...], ignored: tuple[str, ...]) -> str | None:
    """A checkpoint's name as the rules have it, or None for what is not part of the encoder.

    `prefix` is put before a name that begins with one of `starts`: files of the bare tower leave it out.
    """
    name = bare_name(name)
    name = prefix + name if name.startswith(starts) else name
    return None if name.startswith(ignored) else name


def clip_name(name: str) -> str | None:
    """`published` for CLIP: no text tower, no scale of the loss, no table of position numbers."""
    other = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")
    return published(name, "", (), other)


OF_VIT = ("embeddings.", "encoder.", "layernorm.", "pooler.")  # what the bare model's names begin with


def vit_name(name: str) -> str | None:
    """`published` for ViT: no decoder or classifier, and none of what follows the last block."""
    return published(name, "vit.", OF_VIT, ("vit.layernorm.", "vit.pooler.", "decoder.", "classifier."))


def vit_absent(names: Collection[str]) -> Collection[str]:
    """The published file has no mask token; a fresh one is zeros, as in Hugging Face."""
    return ("vit.embeddings.mask_token",)
