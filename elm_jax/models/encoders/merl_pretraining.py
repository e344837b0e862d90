"""MERL as it is pretrained: its ResNet, what pools and projects its features, and a text tower (arXiv 2403.06659).

B signals, C leads, L samples, T positions of the feature map, D width of the map, P width of what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.attention import attend
from elm_jax.models.encoders.merl import IGNORED_FIELDS, IGNORED_SUFFIXES, LAYOUTS, LEAVES, Conv, Merl, MerlConfig
from elm_jax.models.encoders.merl import weight_rule as resnet_rule
from elm_jax.models.encoders.text_tower import BERT, NO_WEIGHTS, Paired, TextConfig, TextTower
from elm_jax.models.encoders.vision import normal
from elm_jax.models.hints import weight
from elm_jax.models.layers import Linear, plus, repeated
from elm_jax.models.names import Rule, bare_name
from elm_jax.schema import key, sizes_of

HEADS = 4


@dataclass(frozen=True)
class PretrainedMerlConfig(MerlConfig):
    """Sizes; the published program's are the default."""

    seq_len: int = key(2500, "L", limit="from 1 to 10000000")
    proj_hidden: int = key(256, "width inside the text's projection", limit="from 1 to 100000")
    proj_out: int = key(256, "P", limit="from 1 to 100000")
    dropout: float = key(0.1, "of the two views of an ECG's features", limit="at least 0 and below 1")

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> PretrainedMerlConfig:
        """Read `encoder.config`. UserError for an unknown field or value."""
        found = cls(**sizes_of(cls, "encoder.config", config, IGNORED_FIELDS - set(cls.__dataclass_fields__)))
        if found.proj_out % HEADS:
            raise UserError("encoder.config.proj_out", str(found.proj_out), f"a multiple of {HEADS}", "correct it")
        return found

    @property
    def positions(self) -> int:
        """T: the stem halves the length, and so does each stage but the first."""
        return -(-self.seq_len // 2 ** len(LAYOUTS[self.resnet_type][1]))


class AttentionPool(nnx.Module):
    """A learned query that attends to itself and all positions: (B, T, P) -> (B, P)."""

    def __init__(self, positions: int, width: int, rngs: nnx.Rngs, param_dtype: Any) -> None:
        linear = partial(Linear, rngs=rngs, bias=True, param_dtype=param_dtype)
        self.position = nnx.Param(normal(rngs, (1, positions + 1, width), 1 / width, param_dtype), axes=(None,) * 3)
        self.cls = nnx.Param(normal(rngs, (1, 1, width), 1 / width, param_dtype), axes=(None,) * 3)
        self.qkv = linear(width, 3 * width, ("signal", "heads"))
        self.o = linear(width, width, ("heads", "signal"))
        self.out = linear(width, width, ("signal", None))

    def __call__(self, x: jax.Array) -> jax.Array:
        position = weight(self.position, jnp.float32)
        cls = (repeated(self.cls, (len(x), 1, x.shape[2]), jnp.float32) + position[:, :1]).astype(x.dtype)
        # So its own position is added twice, as the published weights have learnt it.
        x = plus(jnp.concatenate([cls, x], 1), self.position)
        q, k, v = (part.reshape(*part.shape[:2], HEADS, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        out = attend(q[:, :1], k, v, jnp.ones((1, 1, 1, 1), bool), q.shape[-1] ** -0.5, "xla")
        return self.out(self.o(out.reshape(len(x), 1, -1)))[:, 0]


class PretrainedMerl(Merl):
    """MERL with all that its pretraining trains, and the text tower."""

    def __init__(
        self, sizes: tuple[PretrainedMerlConfig, TextConfig], tokens: int = 1, *, rngs: nnx.Rngs,
        dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        config, text = sizes
        super().__init__(config, tokens, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config, width = config, config.proj_out
        linear = partial(Linear, rngs=rngs, param_dtype=param_dtype)
        self.downconv = Conv(self.width, width, 1, rngs=rngs, param_dtype=param_dtype)
        self.downconv_bias = nnx.Param(jnp.zeros(width, param_dtype), axes=(None,))
        self.att_pool = AttentionPool(config.positions, width, rngs, param_dtype)
        self.view1, self.view2 = linear(width, width, ("signal", None)), linear(width, width, ("signal", None))
        self.text = TextTower(text, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.text_in = linear(self.text.width, config.proj_hidden, ("signal", None), bias=True)
        self.text_out = linear(config.proj_hidden, width, ("signal", None), bias=True)

    def narrow_map(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) -> (B, T, P). UserError for signals of another length than the config's."""
        if signals.shape[-1] != self.config.seq_len:
            fix = "set encoder.config.seq_len so, or leave it out"
            raise UserError("encoder input", f"{signals.shape[-1]} samples", str(self.config.seq_len), fix)
        return plus(self.downconv(self.feature_map(signals, weights, train)), self.downconv_bias)

    def views(self, features: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Two views (B, P) of the mean of features (B, T, P), each with a dropout of its own where there is a `key`."""
        mean = features.mean(1)
        found = self.view1(mean), self.view2(mean)
        if key is None or not self.config.dropout:
            return found
        keep = 1.0 - self.config.dropout
        masks = jax.random.bernoulli(key, keep, (2, *mean.shape))
        return jnp.where(masks[0], found[0] / keep, 0), jnp.where(masks[1], found[1] / keep, 0)

    def ecgs(self, signals: jax.Array) -> jax.Array:
        """(B, C, L) -> (B, P), what is held against `texts`, by running statistics."""
        return self.att_pool(self.narrow_map(signals))

    def texts(self, ids: jax.Array) -> jax.Array:
        """(B, T) ids -> (B, P)."""
        pooled = self.text(ids).astype(self.dtype)
        return self.text_out(jax.nn.gelu(self.text_in(pooled), approximate=False))


PAIRED = Paired(BERT, "lm.", frozen=-1)
_NAMES = {
    "downconv.kernel": "downconv.weight", "downconv_bias": "downconv.bias",
    "att_pool.position": "att_pool_head.positional_embedding", "att_pool.cls": "att_pool_head.cls_token",
    "att_pool.qkv.kernel": "att_pool_head.mhsa.in_proj_weight", "att_pool.qkv.bias": "att_pool_head.mhsa.in_proj_bias",
    **{
        f"{ours}.{leaf}": f"{theirs}.{LEAVES[leaf]}"
        for ours, theirs in {
            "att_pool.o": "att_pool_head.mhsa.out_proj", "att_pool.out": "att_pool_head.c_proj", "view1": "linear1",
            "view2": "linear2", "text_in": "proj_t.0", "text_out": "proj_t.2",
        }.items() for leaf in ("kernel", "bias")
    },
}  # fmt: skip


@PAIRED.with_rule
def weight_rule(name: str) -> Rule:
    """The rule of our array `name`, such as layer1.0.conv1.kernel, view1.kernel or text.norm.scale."""
    return Rule(_NAMES[name], name, name.endswith("kernel")) if name in _NAMES else resnet_rule(name)


def published_name(name: str) -> str | None:
    """A checkpoint's key without wrapper prefixes; None for what counts batches or texts' places."""
    name = bare_name(name)
    of_no_use = name.endswith((*IGNORED_SUFFIXES, *NO_WEIGHTS)) or name.startswith("resnet.linear.")
    return None if of_no_use else name
