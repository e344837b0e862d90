"""Encoders of ECG-Neural-Networks that are post-norm transformers: MAE-ViT over whole leads, NEPA over samples.

B signals, C leads, L samples, D width, N signal tokens; k leads that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.encoders.mae import XAVIER, token
from elm_jax.models.encoders.mae_pretraining import MASKED, Order, Rebuilt
from elm_jax.models.encoders.transformer import Transformer, TransformerConfig
from elm_jax.models.layers import LayerNorm, Linear, plus
from elm_jax.models.names import Rule
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.schema import key, sizes_of

Layers = Callable[..., Linear]


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of the blocks; those of the published programs are the default."""

    d_model: int = key(512, "D", limit="at least 1")
    n_heads: int = key(8, "heads", limit="at least 1", divides="d_model")
    dim_ff: int = key(2048, "width inside an MLP", limit="at least 1")
    num_layers: int = key(6, "blocks of the encoder", limit="at least 1")

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> Self:
        """Read `encoder.config`. UserError for an unknown field or value."""
        return cls(**sizes_of(cls, "encoder.config", config))

    def blocks(self, depth: int, causal: bool = False) -> TransformerConfig:
        return TransformerConfig(
            self.d_model, depth, self.n_heads, self.dim_ff, fused_qkv=True, init=XAVIER, post_norm=True, causal=causal
        )


class OfBlocks(nnx.Module):
    """An encoder of such blocks; `make` builds its parts from (config, rngs, param_dtype, how a layer is made)."""

    make: ClassVar[Callable[..., None]]

    def __init__(
        self, config: Any, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ) -> None:
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.d_model, jnp.dtype(dtype)
        linear = partial(Linear, rngs=rngs, bias=True, init=XAVIER, param_dtype=param_dtype)
        self.make(config, rngs, param_dtype, linear)


@dataclass(frozen=True)
class SequenceConfig(BlockConfig):
    """Sizes of an encoder of signals."""

    num_leads: int = key(12, "C", limit="at least 1")
    seq_len: int = key(2500, "L", limit="at least 1")
    num_decoder_layers: int = key(4, "blocks of MAE-ViT's decoder", limit="at least 1")

    def join(self, patches: jax.Array) -> jax.Array:
        """MAE-ViT's patches (B, C, L) are leads as they are."""
        return patches

    def check(self, signals: jax.Array) -> None:
        """Raise UserError unless the signals have this config's C and L."""
        if signals.ndim != 3 or signals.shape[1:] != (self.num_leads, self.seq_len):
            expected = f"(batch, {self.num_leads} leads, {self.seq_len} samples)"
            raise UserError("encoder input", f"shape {signals.shape}", expected, "set num_leads and seq_len so")


class MaeVit(OfBlocks):
    """Each lead is a patch. What only the pretraining uses is held with it."""

    config: SequenceConfig

    def make(self, config: SequenceConfig, rngs: nnx.Rngs, param_dtype: Any, linear: Layers) -> None:
        self.patch = linear(config.seq_len, self.width, (None, "embed"))
        self.position = token(rngs, param_dtype, config.num_leads, self.width)
        self.encoder = Transformer(config.blocks(config.num_layers), rngs, param_dtype)
        self.norm = LayerNorm(self.width, 1e-5, param_dtype)
        self.mask = token(rngs, param_dtype, 1, 1, self.width)
        self.decoder_position = token(rngs, param_dtype, config.num_leads, self.width)
        self.decoder = Transformer(config.blocks(config.num_decoder_layers), rngs, param_dtype)
        self.decoder_norm = LayerNorm(self.width, 1e-5, param_dtype)
        self.head = linear(self.width, config.seq_len, ("embed", None))

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) -> (B, N, D) float32: N bins of the leads. weights, train: without effect."""
        return adaptive_average_pool(self.norm(self.encoder(self._leads(signals))), self.tokens)

    def _leads(self, signals: jax.Array) -> jax.Array:
        self.config.check(signals)
        return plus(self.patch(signals.astype(self.dtype)), self.position)

    def noise(self, key: jax.Array, count: int) -> jax.Array:
        """(B, C)."""
        return jax.random.uniform(key, (count, self.config.num_leads))

    def rebuild(self, signals: jax.Array, noise: jax.Array, masked: float = MASKED) -> Rebuilt:
        """(B, C, L) signals and noise (B, C), by which leads are hidden; those seen stay in their own order."""
        order = Order.of(noise, masked)
        hidden = order.hidden
        places = jnp.sort(order.seen, -1)
        latent = self.norm(self.encoder(jnp.take_along_axis(self._leads(signals), places[..., None], axis=-2)))
        rows = jnp.arange(len(signals))[:, None]
        masks = jnp.broadcast_to(self.mask[...].astype(latent.dtype), (*hidden.shape, self.width))
        whole = masks.at[rows, places].set(latent)
        rebuilt = self.head(self.decoder_norm(self.decoder(plus(whole, self.decoder_position))))
        return Rebuilt(rebuilt, signals, hidden, latent)


class Nepa(OfBlocks):
    """Each sample of all leads is a token, from which the next one's embedding is predicted."""

    config: SequenceConfig

    def make(self, config: SequenceConfig, rngs: nnx.Rngs, param_dtype: Any, linear: Layers) -> None:
        self.signal = linear(config.num_leads, self.width, (None, "embed"))
        self.position = token(rngs, param_dtype, config.seq_len, self.width)
        self.layers = Transformer(config.blocks(config.num_layers, causal=True), rngs, param_dtype)
        self.head = linear(self.width, self.width, ("embed", None))

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) -> (B, N, D) float32: N bins of time. weights, train: without effect."""
        return adaptive_average_pool(self.layers(self.embed(signals)), self.tokens)

    def embed(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> (B, L, D), before the blocks."""
        self.config.check(signals)
        return plus(self.signal(signals.astype(self.dtype).swapaxes(1, 2)), self.position)

    def predict(self, embedded: jax.Array, padded: jax.Array | None = None) -> jax.Array:
        """(B, L, D) -> (B, L, D): what each place makes of the next; `padded` (B, L) bool places are not seen."""
        return self.head(self.layers(embedded, None if padded is None else ~padded))


def next_embedding_error(encoder: Nepa, signals: jax.Array, padded: jax.Array | None = None) -> jax.Array:
    """(B,) float32: less the cosine of what is predicted of the next sample's embedding and that itself, from which no
    gradient comes, on average over time; with `padded` (B, L) over what is before a place that is not padded."""
    embedded = encoder.embed(signals)
    made = encoder.predict(embedded, padded)[:, :-1].astype(jnp.float32)
    truth = jax.lax.stop_gradient(embedded[:, 1:]).astype(jnp.float32)
    cosine = (made * truth).sum(-1) / jnp.maximum(
        jnp.linalg.norm(made, axis=-1) * jnp.linalg.norm(truth, axis=-1), 1e-8
    )
    counts = jnp.ones(cosine.shape) if padded is None else (~padded[:, 1:]).astype(jnp.float32)
    return -(cosine * counts).sum(-1) / jnp.maximum(counts.sum(-1), 1.0)


MAE_VIT_NAMES = {
    "patch": "patch_proj", "position": "pos_enc.weight", "encoder.blocks": "encoder.{layer}", "norm": "enc_norm",
    "mask": "mask_token", "decoder_position": "dec_pos.weight", "decoder.blocks": "decoder.{layer}",
    "decoder_norm": "dec_norm", "head": "pred_head",
}  # fmt: skip
NEPA_NAMES = {
    "signal": "signal_proj", "position": "pos_emb.weight", "layers.blocks": "layers.{layer}", "head": "pred_head"
}  # fmt: skip
_BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "lin1", "mlp.fc2": "lin2", "attention.o": "{attention}.out_proj",
    "attention.qkv": "{attention}.in_proj",
}  # fmt: skip
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def weight_rule(name: str, names: Mapping[str, str], attention: str) -> Rule:
    """The rule of our array `name`, such as encoder.blocks.mlp.fc1.kernel."""
    if name in names:
        return Rule(names[name], name)
    module, _, leaf = name.rpartition(".")
    stack, inside, part = module.partition(".blocks.")
    if not inside:
        return Rule(f"{names[module]}.{_LEAVES[leaf]}", name, transpose=leaf == "kernel")
    theirs = f"{names[f'{stack}.blocks']}.{_BLOCK[part].replace('{attention}', attention)}"
    joint = "_" if part == "attention.qkv" else "."  # in_proj_weight
    return Rule(f"{theirs}{joint}{_LEAVES[leaf]}", name, transpose=leaf == "kernel")
