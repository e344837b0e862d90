"""ECG-CoCa: a transformer over patches of an ECG in mV, and its pretraining against reports, which it also writes.

Sources: CoCa, arXiv 2205.01917; ECG-Chat, arXiv 2408.08849, as GEM has it.
Flow: (B, C, L) -> class token and (B, n, D) patches -> transformer -> (B, N, D).
Dimension letters: B signals, C leads, L samples, p samples of a patch, n patches, D width, E width of what is compared,
T tokens, V ids that may be written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.attention import attend
from elm_jax.models.encoders.text_tower import BERT, NO_WEIGHTS, Paired, TextConfig, TextTower
from elm_jax.models.encoders.transformer import Mlp, Transformer, TransformerConfig
from elm_jax.models.encoders.vision import normal
from elm_jax.models.hints import weight
from elm_jax.models.layers import Held, LayerNorm, Linear, hold, plus, repeated
from elm_jax.models.names import Rule, bare_name
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.schema import key, sizes_of

EPS = 1e-5
_size = partial(key, limit="from 1 to 100000")


@dataclass(frozen=True)
class EcgCocaConfig:
    """Sizes; the published ones are the default, but for seq_len, which is the data's."""

    num_leads: int = _size(12, "C")
    seq_len: int = key(5000, "L", limit="from 1 to 10000000")
    patch_size: int = _size(50, "p", divides="seq_len")
    width: int = _size(768, "D")
    layers: int = _size(12, "blocks")
    heads: int = _size(12, "heads", divides="width")
    embed_dim: int = _size(512, "E")
    decoder_layers: int = _size(12, "of the decoder that writes reports: pairs of blocks")
    decoder_heads: int = _size(8, "its heads", divides="width")
    caption_vocab: int | None = key(None, "V; None is the tower's vocabulary", limit="at least 1")
    sees_answers: bool = key(False, "whether a token is written by what has seen it")

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> EcgCocaConfig:
        """Read `encoder.config`. UserError for an unknown field or value, and for sizes that do not fit."""
        return cls(**sizes_of(cls, "encoder.config", config))

    @property
    def patches(self) -> int:
        """n."""
        return self.seq_len // self.patch_size

    def blocks(self, layers: int, heads: int, causal: bool = False) -> TransformerConfig:
        return TransformerConfig(self.width, layers, heads, 4 * self.width, norm_eps=EPS, fused_qkv=True, causal=causal)


class EcgCoca(nnx.Module):
    """The tower as GEM reads it: the last block's output, class token first. What is behind it is held."""

    def __init__(
        self, config: EcgCocaConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32, pretrain: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.width, jnp.dtype(dtype)
        width, scale = config.width, config.width**-0.5
        fan_in = config.num_leads * config.patch_size
        kernel = normal(rngs, (config.patch_size, config.num_leads, width), fan_in**-0.5, param_dtype)
        self.patches = nnx.Param(kernel, axes=(None, None, "signal"))
        self.cls = nnx.Param(normal(rngs, (width,), scale, param_dtype), axes=(None,))
        self.positions = nnx.Param(normal(rngs, (config.patches + 1, width), scale, param_dtype), axes=(None, "signal"))
        self.pre_norm = LayerNorm(width, EPS, param_dtype)
        self.transformer = Transformer(config.blocks(config.layers, config.heads), rngs, param_dtype)
        unused = param_dtype if pretrain else jnp.float32
        self.post_norm = LayerNorm(width, EPS, unused)
        projection = normal(rngs, (width, config.embed_dim), scale, unused)
        self.projection = (nnx.Param if pretrain else Held)(projection, axes=("signal", None))
        if not pretrain:
            hold(self.post_norm)

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) signals in mV -> (B, N, D) float32: N bins of the class token and the patches. weights, train:
        without effect. Raises UserError as `encode`."""
        return adaptive_average_pool(self.encode(signals), self.tokens)

    def encode(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> (B, 1 + n, D) in `dtype`. UserError for signals of another shape than the config's."""
        config = self.config
        if signals.ndim != 3 or signals.shape[1:] != (config.num_leads, config.seq_len):
            expected = f"(batch, {config.num_leads} leads, {config.seq_len} samples)"
            fix = "give such signals, or set encoder.config.num_leads and seq_len so"
            raise UserError("encoder input", f"shape {signals.shape}", expected, fix)
        cut = signals.astype(self.dtype).reshape(-1, config.num_leads, config.patches, config.patch_size)
        x = jnp.einsum("bcnp,pcd->bnd", cut, weight(self.patches, self.dtype))
        cls = repeated(self.cls, (len(x), 1, self.width), x.dtype)
        return self.transformer(self.pre_norm(plus(jnp.concatenate([cls, x], 1), self.positions)))


class CrossBlock(nnx.Module):
    """x + attention(norm1(x), norm_kv(memory)), then x + mlp(norm2(x))."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype: Any) -> None:
        width, norm = config.width, partial(LayerNorm, config.width, config.norm_eps, param_dtype)
        linear = partial(Linear, rngs=rngs, bias=True, param_dtype=param_dtype)
        self.norm1, self.norm_kv, self.norm2, self.heads = norm(), norm(), norm(), config.heads
        self.qkv, self.o = linear(width, 3 * width, ("signal", "heads")), linear(width, width, ("heads", "signal"))
        self.mlp = Mlp(config, rngs, param_dtype)

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        width, kernel = x.shape[-1], weight(self.qkv.kernel, x.dtype)
        assert self.qkv.bias is not None
        q = plus(self.norm1(x) @ kernel[:, :width], self.qkv.bias, slice(width))
        k, v = jnp.split(plus(self.norm_kv(memory) @ kernel[:, width:], self.qkv.bias, slice(width, None)), 2, axis=-1)
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1) for part in (q, k, v))
        out = attend(q, k, v, jnp.ones((1, 1, 1, 1), bool), q.shape[-1] ** -0.5, "xla")
        x = x + self.o(out.reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class PairedEcgCoca(EcgCoca):
    """The tower with the text tower, the scale of their comparison, and the decoder that writes reports."""

    def __init__(self, sizes: tuple[EcgCocaConfig, TextConfig], tokens: int = 1, **how: Any) -> None:
        config, text = sizes
        super().__init__(config, tokens, **how, pretrain=True)
        rngs, param_dtype, width = how["rngs"], how["param_dtype"], config.width
        if text.hidden_size != width:
            found = f"a tower of width {text.hidden_size} beside an encoder of {width}"
            raise UserError("ssl.text", found, "the same width", "set encoder.config.width so")
        words = config.caption_vocab or text.vocab_size
        if words < text.vocab_size:
            expected = f"{text.vocab_size} at least, one for each token of the text tower"
            raise UserError("encoder.config.caption_vocab", str(words), expected, "raise it, or leave it out")
        self.text = TextTower(text, pool="mean", **how)
        self.text_projection = Linear(width, config.embed_dim, ("signal", None), rngs, param_dtype=param_dtype)
        self.log_scale = nnx.Param(jnp.full((), math.log(1 / 0.07), param_dtype), axes=())
        own = config.blocks(config.decoder_layers, config.decoder_heads, causal=True)
        self.own = Transformer(own, rngs, param_dtype)

        @nnx.split_rngs(splits=config.decoder_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(block_rngs: nnx.Rngs) -> CrossBlock:
            return CrossBlock(own, block_rngs, param_dtype)

        self.cross = stacked(rngs)
        self.last_norm = LayerNorm(width, EPS, param_dtype)
        vocabulary = normal(rngs, (width, words), width**-0.5, param_dtype)
        self.words = nnx.Param(vocabulary, axes=("signal", None))

    def both(self, signals: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, C, L) -> what is compared (B, E), and what reports are written from (B, n, D)."""
        x = self.post_norm(self.encode(signals))
        return x[:, 0] @ weight(self.projection, x.dtype), x[:, 1:]

    def ecgs(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> (B, E)."""
        return self.both(signals)[0]

    def texts(self, ids: jax.Array) -> jax.Array:
        """(B, T) ids -> (B, E)."""
        return self.text_projection(self.text(ids).astype(self.dtype))

    def captions(self, ids: jax.Array, memory: jax.Array) -> jax.Array:
        """(B, T) ids, (B, n, D) -> what each but the last is followed by: logits (B, T - 1, V) float32.

        What a place is told of the text is the embedding of its own token. With `sees_answers` it is the tower's last
        hidden state, as published, which has seen the token that is to be written.
        """
        x = self.text.hidden(ids) if self.config.sees_answers else self.text.embed(ids)
        x = x[:, :-1].astype(self.dtype)
        (own, mine), (cross, theirs) = nnx.split(self.own.blocks), nnx.split(self.cross)
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))

        @partial(jax.checkpoint, prevent_cse=False)
        def step(x: jax.Array, states: Any) -> tuple[jax.Array, None]:
            return nnx.merge(cross, states[1])(nnx.merge(own, states[0])(x, mask), memory), None

        x = self.last_norm(jax.lax.scan(step, x, (mine, theirs))[0])
        return (x @ weight(self.words, x.dtype)).astype(jnp.float32)


PREFIX = "ecg."
PAIRED = Paired(BERT, "text.transformer.", frozen=-1, pool="mean")
GEM = (("model.ecg_tower.ecg_tower.", "model.ecg_tower.ecg_tower.", PREFIX), ("class_embedding", "", PREFIX))
_OF_PRETRAINING = ("text.", "text_decoder.", "logit_scale")
_ARRAYS = {
    "patches": "ecg.conv1.weight", "cls": "ecg.class_embedding", "positions": "ecg.positional_embedding",
    "projection": "ecg.proj", "log_scale": "logit_scale", "words": "text_decoder.text_projection",
}  # fmt: skip
_MODULES = {
    "pre_norm": "ecg.ln_pre", "post_norm": "ecg.ln_post", "transformer.blocks": "ecg.transformer.resblocks.{layer}",
    "text_projection": "text.proj", "own.blocks": "text_decoder.resblocks.{layer}",
    "cross": "text_decoder.cross_attn.{layer}", "last_norm": "text_decoder.ln_final",
}  # fmt: skip
_INSIDE = {
    "norm1": "ln_1.", "norm2": "ln_2.", "norm_kv": "ln_1_kv.", "attention.qkv": "attn.in_proj_", "qkv": "attn.in_proj_",
    "attention.o": "attn.out_proj.", "o": "attn.out_proj.", "mlp.fc1": "mlp.c_fc.", "mlp.fc2": "mlp.c_proj.",
}  # fmt: skip
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@PAIRED.with_rule
def weight_rule(name: str) -> Rule:
    """The rule of our array `name`, such as transformer.blocks.mlp.fc1.kernel or text.norm.scale."""
    if name in _ARRAYS:
        return Rule(_ARRAYS[name], name, name == "patches")
    module, _, leaf = name.rpartition(".")
    stack = next((s for s in ("transformer.blocks", "own.blocks", "cross") if module.startswith(f"{s}.")), "")
    theirs = f"{_MODULES[stack]}.{_INSIDE[module.removeprefix(f'{stack}.')]}" if stack else f"{_MODULES[module]}."
    return Rule(f"{theirs}{_LEAVES[leaf]}", name, leaf == "kernel")


def published_name(name: str) -> str | None:
    """A checkpoint's key without wrapper prefixes; None for what only the pretraining uses."""
    name = bare_name(name)
    return None if name.startswith((*_OF_PRETRAINING, "model.", "lm_head.")) else name  # the last two: of a LLaVA's


def paired_name(name: str) -> str | None:
    """A checkpoint's key without wrapper prefixes; None for tables of numbers."""
    name = bare_name(name)
    return None if name.endswith(NO_WEIGHTS) else name
