"""A tiny random decoder of each family, different enough in every part that a mistake shows."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from elm_jax.models.decoder import Decoder, DecoderConfig
from elm_jax.models.families import scratch_config

WINDOW, VOCABULARY = 4, 64
_SIZES = {"hidden": 32, "layers": 2, "heads": 4, "mlp": 48, "max_len": 64, "tied": False}
_GROUPED = {"kv_heads": 2, "head_dim": 12}

TINY: Mapping[str, Mapping[str, Any]] = {
    "llama": _SIZES | _GROUPED,
    "qwen2": _SIZES | _GROUPED,
    "qwen3": _SIZES | _GROUPED,
    "qwen3_5_text": _SIZES
    | {"layers": 4, "kv_heads": 2, "head_dim": 16, "full_attention_interval": 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 6},
    "qwen3_moe": _SIZES | _GROUPED | {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    "gemma2": _SIZES
    | _GROUPED
    | {"layers": 4, "window": WINDOW, "attention_cap": 2.0, "logit_cap": 5.0, "query_scalar": 9.0},
    "gemma3_text": _SIZES
    | _GROUPED
    | {"window": WINDOW, "sliding_window_pattern": 2, "logit_cap": 5.0, "query_scalar": 9, "rope_theta": 1e3}
    | {"rope_local_base_freq": 10.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": _SIZES | _GROUPED | {"window": WINDOW},
    "phi3": _SIZES
    | {"kv_heads": 2, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 48}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.2, 1.5], "long_factor": [2.0, 9.0]}},
    "gpt2": _SIZES,
    "opt": _SIZES,
    "opt_350m": _SIZES | {"family": "opt", "pre_norm": False, "embedding": 16, "tied": True},
}


def tiny_config(family: str, **changes: Any) -> DecoderConfig:
    return scratch_config({"family": family, **TINY[family], **changes}, VOCABULARY)


@functools.cache
def tiny_llm(family: str) -> Decoder:
    """With random norms and biases too. Untied: tied and untrained, it would only repeat its last token."""
    graph, state = nnx.split(Decoder(tiny_config(family), nnx.Rngs(3)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    moved = [leaf + change for leaf, change in zip(leaves, noise, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))
