"""The ECG encoders trained as masked autoencoders: ST-MEM (Na et al. 2024, arXiv 2402.09450), MTAE and MLAE.

Flow: (B, C, L) signals -> patches -> a transformer -> (B, N, D). They differ in what a patch is: p samples of
one lead (ST-MEM), p samples of all leads (MTAE, masked in time), all samples of p leads (MLAE, masked by lead).
Nothing is masked here. The embedding of ST-MEM is the encoder's output, that of the others the decoder's last
latents. All parameters of a checkpoint are held, so that it comes out as it went in; where no embedding depends
on one of them (the mask token, the decoder's last norm and head), it is held and never trained.
Dimension letters: B signals, C leads, L samples, p samples (MLAE: leads) of a patch, n patches (of a lead for ST-MEM),
P values of a patch, D and E widths of encoder and decoder, N signal tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.encoders.transformer import Transformer, TransformerConfig
from elm_jax.models.hints import weight
from elm_jax.models.layers import Held, LayerNorm, Linear, held, hold, plus, repeated
from elm_jax.models.names import Rule, bare_name
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.schema import key, sizes_of

HEAD_DIM = 64  # whatever the width
NORM_EPS, DECODER_NORM_EPS = 1e-5, 1e-6
TOKEN_STD = 0.02  # of initial special tokens and lead embeddings
XAVIER = jax.nn.initializers.glorot_uniform()  # within sqrt(6 / (I + O)); Glorot and Bengio (2010)

# Fields of the published configs that say how to pretrain, or repeat another; N is the argument `tokens`.
IGNORED_FIELDS = frozenset(("norm_pix_loss", "d_model", "num_encoder_tokens"))


def calculate_patch_size(length: int) -> int:
    """Samples of a patch for signals of `length`: the divisor that gives closest to 32 patches, from 16 to 64.

    Where none gives 16 to 64, the divisor closest to sqrt(length / 32). The smaller one of two that tie.
    """
    small = [p for p in range(1, math.isqrt(length) + 1) if length % p == 0]
    divisors = sorted({*small, *(length // p for p in small)})
    fitting = [p for p in divisors if 16 <= length // p <= 64]
    if fitting:
        return min(fitting, key=lambda p: abs(length // p - 32))
    return min(divisors, key=lambda p: abs(p - int((length / 32) ** 0.5)))


def sincos_positions(length: int, width: int) -> np.ndarray:
    """(length, width) float32 position embedding: the sines of position / 10000^(2i/width), then the cosines."""
    frequencies = 10000.0 ** (-2 * np.arange(width // 2) / width)
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def by_lead_and_time(signals: Any, p: int) -> Any:
    """(B, C, L) -> (B, C, n, p)."""
    return signals.reshape(*signals.shape[:2], -1, p)


def by_time(signals: Any, p: int) -> Any:
    """(B, C, L) -> (B, n, p C), all leads of a sample side by side."""
    batch, leads, _ = signals.shape
    return signals.reshape(batch, leads, -1, p).transpose(0, 2, 3, 1).reshape(batch, -1, p * leads)


def by_lead(signals: Any, p: int) -> Any:
    """(B, C, L) -> (B, n, p L), one lead after the other."""
    batch, leads, samples = signals.shape
    return signals.reshape(batch, leads // p, p * samples)


def in_order(patches: Any, leads: int) -> Any:
    """The inverse of `by_lead_and_time` and `by_lead`."""
    return patches.reshape(len(patches), leads, -1)


def from_time(patches: Any, leads: int) -> Any:
    """The inverse of `by_time`."""
    return patches.reshape(*patches.shape[:2], -1, leads).transpose(0, 3, 1, 2).reshape(len(patches), leads, -1)


@dataclass(frozen=True)
class Patching:
    """What a patch is. cut: signals (B, C, L) and p -> patches (..., n, P); join: patches and C -> signals; whole: the
    field that p divides; size: p for a given L."""

    cut: Callable[[Any, int], Any]
    join: Callable[[Any, int], Any] = in_order
    whole: str = "seq_len"
    size: Callable[[int], int] = calculate_patch_size


PATCHINGS = {
    "st_mem": Patching(by_lead_and_time),
    "mtae": Patching(by_time, from_time),
    "mlae": Patching(by_lead, in_order, "num_leads", lambda length: 1),
}


@dataclass(frozen=True)
class MaeConfig:
    """Sizes of the encoder `name`.

    train_positions: the position embeddings are parameters, as the reference has them in ST-MEM.
    """

    name: str
    seq_len: int = key(2500, "L", limit="from 1 to 10000000")
    patch_size: int = key(0, "p; 0: chosen for the seq_len", limit="from 1 to 10000000", accepts=int | None)
    num_leads: int = key(12, "C", limit="from 1 to 100000")
    embed_dim: int = key(768, "D", limit="from 1 to 100000")
    depth: int = key(12, "blocks of the encoder", limit="from 1 to 100000")
    num_heads: int = key(12, "heads of the encoder", limit="from 1 to 100000")
    decoder_embed_dim: int = key(256, "E", limit="from 1 to 100000")
    decoder_depth: int = key(4, "blocks of the decoder", limit="from 1 to 100000")
    decoder_num_heads: int = key(4, "heads of the decoder", limit="from 1 to 100000")
    mlp_ratio: float = key(4.0, "width inside an MLP, by that outside", limit="above 0")
    qkv_bias: bool = key(True, "whether queries, keys and values have a bias")
    train_positions: bool = key(False, "whether position embeddings are trained")

    @classmethod
    def from_fields(cls, name: str, config: Mapping[str, Any]) -> "MaeConfig":
        """Read `encoder.config` for st_mem, mtae or mlae; without a patch_size it is chosen for the seq_len
        (for mlae 1: a lead).

        UserError for an unknown field or value. IGNORED_FIELDS are let pass.
        """
        sizes = sizes_of(cls, "encoder.config", config, IGNORED_FIELDS)
        given = {name: value for name, value in sizes.items() if value is not None}
        length = given.setdefault("seq_len", cls.seq_len)
        chosen = PATCHINGS[name].size(length)
        p = given.setdefault("patch_size", chosen)
        whole = PATCHINGS[name].whole
        size = given.get(whole, cls.num_leads)
        if size % p:
            expected = f"a divisor of {whole}, {size}"
            raise UserError("encoder.config.patch_size", str(p), expected, f"leave it out, or set it to {chosen}")
        for width in ("embed_dim", "decoder_embed_dim"):
            if given.get(width, 0) % 2:
                expected = "an even number, for sines and cosines"
                raise UserError(f"encoder.config.{width}", str(given[width]), expected, "add or take one")
        return cls(name, **given)

    def cut(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> patches (..., n, P). UserError unless the signals have this config's C and L."""
        if signals.ndim != 3 or signals.shape[1:] != (self.num_leads, self.seq_len):
            expected = f"(batch, {self.num_leads} leads, {self.seq_len} samples)"
            fix = "give such signals, or set encoder.config.num_leads and seq_len as your checkpoint has them"
            raise UserError("encoder input", f"shape {signals.shape}", expected, fix)
        return PATCHINGS[self.name].cut(signals, self.patch_size)

    def join(self, patches: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        return PATCHINGS[self.name].join(patches, self.num_leads)

    @property
    def patches(self) -> tuple[int, int]:
        """n and P."""
        nothing = np.broadcast_to(np.float32(0), (1, self.num_leads, self.seq_len))
        return PATCHINGS[self.name].cut(nothing, self.patch_size).shape[-2:]

    @property
    def encoder(self) -> TransformerConfig:
        """Of the encoder's blocks."""
        return self._blocks(self.embed_dim, self.depth, self.num_heads)

    @property
    def decoder(self) -> TransformerConfig:
        """Of the decoder's blocks."""
        return self._blocks(self.decoder_embed_dim, self.decoder_depth, self.decoder_num_heads)

    def _blocks(self, width: int, depth: int, heads: int) -> TransformerConfig:
        alone = heads == 1 and width == HEAD_DIM  # a single head as wide as its input is not projected
        return TransformerConfig(
            width, depth, heads, int(self.mlp_ratio * width), HEAD_DIM, norm_eps=NORM_EPS, fused_qkv=True,
            qkv_bias=self.qkv_bias, out=not alone, init=XAVIER,
        )  # fmt: skip


class PatchEmbedding(nnx.Module):
    """(..., P) -> (..., D): LayerNorm, in float32 whatever `dtype` is, then Linear and LayerNorm."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        self.norm = LayerNorm(size, NORM_EPS, param_dtype)
        self.linear = Linear(size, width, (None, "embed"), rngs, bias=True, init=XAVIER, param_dtype=param_dtype)
        self.out_norm = LayerNorm(width, NORM_EPS, param_dtype)
        self.dtype = dtype

    def __call__(self, patches: jax.Array) -> jax.Array:
        return self.out_norm(self.linear(self.norm(patches.astype(jnp.float32)).astype(self.dtype)))


class StMem(nnx.Module):
    """ST-MEM: every patch of every lead is a token, and a SEP token stands at both ends of each lead."""

    def __init__(
        self,
        config: MaeConfig,
        tokens: int = 1,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.config, self.tokens, self.width = config, tokens, config.embed_dim
        (patches, size), width = config.patches, config.embed_dim
        self.patch = PatchEmbedding(size, width, rngs, jnp.dtype(dtype), param_dtype)
        self.position = position_embedding(config, 1, patches, 1, width)
        self.sep = token(rngs, param_dtype, width)
        self.lead = token(rngs, param_dtype, config.num_leads, width)
        self.transformer = Transformer(config.encoder, rngs, param_dtype)
        self.norm = LayerNorm(width, NORM_EPS, param_dtype)

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) signals -> (B, N, D) float32, computed in `dtype`; N bins of the patches, lead after lead.

        weights, train: without effect, as nothing here depends on the batch.
        Raises UserError for signals of another shape than the config's.
        """
        latent = self.encode(signals)
        return adaptive_average_pool(latent.reshape(latent.shape[0], -1, self.width), self.tokens)

    def encode(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> (B, C, n, D) in `dtype`, after the last norm, without SEP tokens."""
        x = self.patch(self.config.cut(signals))
        batch, leads, patches, width = x.shape
        sep = repeated(self.sep, (batch, leads, 1, width), x.dtype)
        place = weight(self.position, jnp.float32) + weight(self.lead, jnp.float32)[:, None]  # (C, n + 2, D)
        x = (jnp.concatenate([sep, x, sep], 2) + place).astype(x.dtype)
        x = self.transformer(x.reshape(batch, -1, width)).reshape(batch, leads, patches + 2, width)
        return self.norm(x[:, :, 1:-1])


class MaskedAutoencoder(nnx.Module):
    """MTAE and MLAE: a CLS token and the patches, through encoder and decoder.

    pretrain: whether what only the reconstruction depends on is trained, too.
    """

    def __init__(
        self,
        config: MaeConfig,
        tokens: int = 1,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        pretrain: bool = False,
    ) -> None:
        self.config, self.tokens, self.width = config, tokens, config.decoder_embed_dim
        (patches, size), inner = config.patches, config.embed_dim
        self.patch = PatchEmbedding(size, inner, rngs, jnp.dtype(dtype), param_dtype)
        self.position = position_embedding(config, 1, patches, 0, inner)
        self.cls = token(rngs, param_dtype, inner)
        self.transformer = Transformer(config.encoder, rngs, param_dtype)
        self.norm = LayerNorm(inner, NORM_EPS, param_dtype)
        unused_dtype = param_dtype if pretrain else jnp.float32  # as `Held` has it
        linear = partial(Linear, rngs=rngs, bias=True, init=XAVIER)
        self.to_decoder = linear(inner, self.width, ("embed", None), param_dtype=param_dtype)
        self.mask = token(rngs, unused_dtype, 1, 1, self.width)
        self.decoder_position = position_embedding(config, 1, patches, 0, self.width)
        self.decoder = Transformer(config.decoder, rngs, param_dtype)
        self.decoder_norm = LayerNorm(self.width, DECODER_NORM_EPS, unused_dtype)
        # The reference's MLAE ends in one lead, however many a patch has: without use, but its checkpoints have it so.
        # One that is pretrained here ends in all leads of a patch.
        out = config.seq_len if config.name == "mlae" and not pretrain else size
        self.head = linear(self.width, out, ("embed", None), param_dtype=unused_dtype)
        if not pretrain:
            self.mask = held(self.mask)
            hold(self.decoder_norm)
            hold(self.head)

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) signals -> (B, N, E) float32, computed in `dtype`; N bins of CLS and patches.

        weights, train: without effect, as nothing here depends on the batch.
        Raises UserError for signals of another shape than the config's.
        """
        return adaptive_average_pool(self.decode(self.encode(signals)), self.tokens)

    def encode(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> (B, 1 + n, D) in `dtype`: CLS and the patches, after the encoder's last norm."""
        x = self.patch(self.config.cut(signals))
        cls = repeated(self.cls, (x.shape[0], 1, x.shape[2]), x.dtype)
        return self.norm(self.transformer(plus(jnp.concatenate([cls, x], 1), self.position)))

    def decode(self, latent: jax.Array) -> jax.Array:
        """(B, 1 + n, D) -> (B, 1 + n, E): the output of the decoder's blocks, before its norm."""
        return self.decoder(plus(self.to_decoder(latent), self.decoder_position))


def token(rngs: nnx.Rngs, param_dtype: Any, *shape: int) -> nnx.Param:
    values = TOKEN_STD * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(values.astype(param_dtype), axes=(None,) * len(shape))


def position_embedding(config: MaeConfig, before: int, patches: int, after: int, width: int) -> nnx.Variable:
    """(1, before + patches + after, width) float32; the special tokens before and after have zeros."""
    values = jnp.pad(sincos_positions(patches, width), ((before, after), (0, 0)))[None]
    kind = nnx.Param if config.train_positions else Held
    return kind(values, axes=(None, None, None))


# Our module or array -> the published one; `{layer}` stands for the first of the stacked ones.
NAMES = {
    "patch.norm": "encoder.to_patch_embedding.1",
    "patch.linear": "encoder.to_patch_embedding.2",
    "patch.out_norm": "encoder.to_patch_embedding.3",
    "position": "encoder.pos_embedding",
    "sep": "encoder.sep_embedding",
    "cls": "encoder.cls_embedding",
    "lead": "encoder.lead_embeddings.{layer}",
    "transformer.blocks": "encoder.block{layer}",
    "norm": "encoder.norm",
    "to_decoder": "to_decoder_embedding",
    "mask": "mask_embedding",
    "decoder_position": "decoder_pos_embed",
    "decoder.blocks": "decoder_blocks.{layer}",
    "decoder_norm": "decoder_norm",
    "head": "decoder_head",
}
BLOCK_NAMES = {
    "norm1": "attn.norm",
    "attention.qkv": "attn.fn.to_qkv",
    "attention.o": "attn.fn.to_out.0",
    "norm2": "ff.norm",
    "mlp.fc1": "ff.fn.net.0",
    "mlp.fc2": "ff.fn.net.3",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# Checkpoints of MTAE and MLAE hold the patch embedding under two names.
ALIAS = ("to_patch_embedding.", "encoder.to_patch_embedding.")
HEAD = ("decoder_head.weight", "decoder_head.bias")
# Parts of a pretrained ST-MEM that no embedding depends on, and that its published encoders leave out.
ST_MEM_PRETRAINING = ("mask_embedding", "to_patch_embedding.", "to_decoder_embedding.", "decoder_")
ST_MEM_HEAD = "encoder.head."  # the classifier of a fine-tuned one


def weight_rule(name: str) -> Rule:
    """The rule of our array `name`, such as transformer.blocks.mlp.fc1.kernel."""
    if name in NAMES:
        return Rule(NAMES[name], name)
    module, _, leaf = name.rpartition(".")
    stack, inside, module_of_block = module.partition(".blocks.")
    theirs = f"{NAMES[f'{stack}.blocks']}.{BLOCK_NAMES[module_of_block]}" if inside else NAMES[module]
    return Rule(f"{theirs}.{LEAVES[leaf]}", name, transpose=leaf == "kernel")


def st_mem_published_name(name: str) -> str | None:
    """A checkpoint's key without wrapper prefixes; None for what only the pretraining of ST-MEM uses."""
    name = bare_name(name)
    return None if name.startswith((*ST_MEM_PRETRAINING, ST_MEM_HEAD)) else name
