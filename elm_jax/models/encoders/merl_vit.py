"""MERL's vision transformer over time, whose patches have all leads (Liu et al. 2024, arXiv 2403.06659).

B signals, C leads, L samples, p samples of a patch, n patches, D width, N signal tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.encoders.mae import BLOCK_NAMES, LEAVES, NORM_EPS, XAVIER, token
from elm_jax.models.encoders.transformer import Transformer, TransformerConfig
from elm_jax.models.hints import weight
from elm_jax.models.layers import LayerNorm, plus
from elm_jax.models.names import Rule, bare_name
from elm_jax.models.pooling import adaptive_average_pool
from elm_jax.schema import key, sizes_of


@dataclass(frozen=True)
class MerlVitConfig:
    """Sizes; those of MERL's ViT-Tiny are the default, but for signals of our usual length."""

    num_leads: int = key(12, "C", limit="from 1 to 100000")
    seq_len: int = key(2500, "L", limit="from 1 to 10000000")
    patch_size: int = key(50, "p", limit="from 1 to 10000000", divides="seq_len")
    width: int = key(192, "D", limit="from 1 to 100000")
    depth: int = key(12, "blocks", limit="from 1 to 100000")
    heads: int = key(3, "heads", limit="from 1 to 100000")
    dim_head: int = key(64, "width of a head", limit="from 1 to 100000")
    mlp_dim: int = key(768, "width inside an MLP", limit="from 1 to 100000")
    qkv_bias: bool = key(True, "whether queries, keys and values have a bias")

    @classmethod
    def from_fields(cls, config: Mapping[str, Any]) -> MerlVitConfig:
        """Read `encoder.config`. UserError for an unknown field or value."""
        return cls(**sizes_of(cls, "encoder.config", config, frozenset(("num_classes",))))

    @property
    def blocks(self) -> TransformerConfig:
        return TransformerConfig(
            self.width, self.depth, self.heads, self.mlp_dim, self.dim_head, norm_eps=NORM_EPS, fused_qkv=True,
            qkv_bias=self.qkv_bias, out=self.heads > 1 or self.dim_head != self.width, init=XAVIER,
        )  # fmt: skip


class MerlVit(nnx.Module):
    """Patches, learnt positions, pre-norm blocks; the last norm stands behind the pooling."""

    def __init__(
        self, config: MerlVitConfig, tokens: int = 1, *, rngs: nnx.Rngs, dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.config, self.tokens, self.width, self.dtype = config, tokens, config.width, jnp.dtype(dtype)
        values = config.patch_size * config.num_leads
        kernel = XAVIER(rngs.params(), (values, config.width), jnp.float32).astype(param_dtype)
        # As their convolution has it, turned: its axes are samples, leads, width.
        kernel = kernel.reshape(config.patch_size, config.num_leads, config.width)
        self.patch = nnx.Param(kernel, axes=(None, None, "embed"))
        self.position = token(rngs, param_dtype, 1, config.seq_len // config.patch_size, config.width)
        self.transformer = Transformer(config.blocks, rngs, param_dtype)
        self.norm = LayerNorm(config.width, NORM_EPS, param_dtype)

    def __call__(self, signals: jax.Array, weights: jax.Array | None = None, train: bool = False) -> jax.Array:
        """(B, C, L) signals -> (B, N, D) float32, computed in `dtype`; N bins of the patches.

        weights, train: without effect, as nothing here depends on the batch.
        Raises UserError for signals of another shape than the config's.
        """
        config = self.config
        if signals.ndim != 3 or signals.shape[1:] != (config.num_leads, config.seq_len):
            expected = f"(batch, {config.num_leads} leads, {config.seq_len} samples)"
            raise UserError("encoder input", f"shape {signals.shape}", expected, "set num_leads and seq_len so")
        patches = signals.astype(self.dtype).reshape(*signals.shape[:2], -1, config.patch_size)
        x = jnp.einsum("bcnp,pcd->bnd", patches, weight(self.patch, self.dtype))
        x = self.transformer(plus(x, self.position))
        return self.norm(adaptive_average_pool(x, self.tokens).astype(self.dtype)).astype(jnp.float32)


_NAMES = {"patch": "to_patch_embedding.weight", "position": "pos_embedding"}
_HEAD = "head."  # the classifier of a fine-tuned one


def weight_rule(name: str) -> Rule:
    """The rule of our array `name`, such as transformer.blocks.mlp.fc1.kernel."""
    if name in _NAMES:
        return Rule(_NAMES[name], name, transpose=name == "patch")
    module, _, leaf = name.rpartition(".")
    inside = module.removeprefix("transformer.blocks.")
    theirs = "norm" if module == "norm" else f"block{{layer}}.{BLOCK_NAMES[inside]}"
    return Rule(f"{theirs}.{LEAVES[leaf]}", name, transpose=leaf == "kernel")


def published_name(name: str) -> str | None:
    """A checkpoint's key without wrapper prefixes; None for a classifier."""
    name = bare_name(name)
    return None if name.startswith(_HEAD) else name
