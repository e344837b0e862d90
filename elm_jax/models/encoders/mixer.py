"""MLP-Mixer of images (arXiv 2105.01601), as ECG-Neural-Networks has it: one embedding of an image.

Flow: (B, H, W, 3) image -> (B, P, D) patches -> layers that mix patches, then channels -> the mean, (B, 1, D).
B images, P patches of an image, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.ecg.images import VIT
from elm_jax.models.encoders.vision import PatchEmbedding, linear, named_inputs, norm, one_token, read_images, table
from elm_jax.models.layers import LayerNorm, Linear
from elm_jax.models.names import bare_name
from elm_jax.models.remat import rematerialised
from elm_jax.schema import key, sizes_of


@dataclass(frozen=True)
class MixerConfig:
    """Sizes; those of the published program are the default."""

    image_size: int = key(256, "pixels of an image's edge", limit="from 1 to 100000")
    patch_size: int = key(16, "pixels of a patch's edge", limit="from 1 to 100000", divides="image_size")
    num_features: int = key(128, "D", limit="from 1 to 100000")
    num_layers: int = key(8, "layers", limit="at least 1")
    expansion_factor: int = key(2, "width inside an MLP, by that outside", limit="at least 1")

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> MixerConfig:
        """Read `encoder.config`. UserError for an unknown field or value."""
        return cls(**sizes_of(cls, "encoder.config", config))

    @property
    def edge(self) -> int:
        """Pixels of an image that is read."""
        return self.image_size

    @property
    def patches(self) -> int:
        """P."""
        return (self.image_size // self.patch_size) ** 2


class Mixing(nnx.Module):
    """fc2(gelu(fc1(x))) over the last axis."""

    def __init__(self, width: int, factor: int, rngs: nnx.Rngs, param_dtype: Any) -> None:
        self.fc1 = Linear(width, factor * width, (None, None), rngs, bias=True, param_dtype=param_dtype)
        self.fc2 = Linear(factor * width, width, (None, None), rngs, bias=True, param_dtype=param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class MixerLayer(nnx.Module):
    """x + what mixes its patches, then x + what mixes its channels, each behind a norm."""

    def __init__(self, config: MixerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        mixing = partial(Mixing, factor=config.expansion_factor, rngs=rngs, param_dtype=param_dtype)
        self.norm1, self.norm2 = (LayerNorm(config.num_features, 1e-5, param_dtype) for _ in range(2))
        self.tokens, self.channels = mixing(config.patches), mixing(config.num_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channels(self.norm2(x))


class MlpMixer(nnx.Module):
    """`width` is D. Nothing follows the last layer but the mean."""

    def __init__(
        self, config: MixerConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        one_token("mlp_mixer", tokens)
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.num_features, jnp.dtype(dtype)
        self.patches = PatchEmbedding(config.patch_size, self.width, True, rngs, param_dtype)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(layer_rngs: nnx.Rngs) -> MixerLayer:
            return MixerLayer(config, layer_rngs, param_dtype)

        self.layers = stacked(rngs)

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Images, as for `vision.Clip`, -> (B, 1, D) float32. weights, train: without effect."""
        (images,) = named_inputs(signals, ("pixel_values",), {}).values()
        return self.mixed(read_images(images, VIT, cast(Any, self.config))).astype(jnp.float32).mean(1, keepdims=True)

    def mixed(self, images: jax.Array) -> jax.Array:
        """Normalised images (B, H, W, 3) -> (B, P, D)."""
        graph, layers = nnx.split(self.layers)
        run = rematerialised(lambda layer, x: nnx.merge(graph, layer)(x), "full")
        x = self.patches(images.astype(self.dtype))
        return jax.lax.scan(lambda x, layer: (run(layer, x), None), x, layers)[0]


def _mixer(theirs: str, ours: str, number: int) -> list[Any]:
    before = f"mixers.{{layer}}.{theirs}_mixer"
    inside = [rule for fc in ("fc1", "fc2") for rule in linear(f"{before}.mlp.{fc}", f"layers.{ours}.{fc}")]
    return [*norm(f"{before}.norm", f"layers.norm{number}"), *inside]


mixer_rule = table([
    *linear("patcher", "patches"), *_mixer("token", "tokens", 1), *_mixer("channel", "channels", 2),
])  # fmt: skip


def mixer_name(name: str) -> str | None:
    """A checkpoint's name without the classifier's."""
    return None if bare_name(name).startswith("classifier.") else bare_name(name)
