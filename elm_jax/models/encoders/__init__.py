"""Encoders by name, built for training; `weights.encoders` reads and writes them under their published names.

An encoder maps (B, C, L) signals to (B, N, D) float32 embeddings; `width` is D and `tokens` is N. Its arrays
have two names, ours (`layer1.0.conv1.kernel`) and the published one (`resnet.layer1.0.conv1.weight`); each
encoder's module holds the one table between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.errors import UserError, nearest
from elm_jax.models.encoders import mae, merl, siglip, vision
from elm_jax.models.encoders import vision_config as sizes
from elm_jax.models.names import Rule, bare_name


class Encoder(Protocol):
    """What the rest of the program knows of an encoder; all are nnx.Modules."""

    width: int
    tokens: int

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array: ...


@dataclass(frozen=True)
class Kind:
    """An entry of the registry: how to read the config, build the module and name the weights.

    alias: (a prefix, another); checkpoints hold the weights of the second under the first as well.
    absent: from the names in a checkpoint, the published names that it may lack: these are drawn anew.
    compat: the reference's behaviours (`elm_jax.compat`), and the config fields that bring them about.
    file_config: from a Hugging Face `config.json` to fields of `config`; None: its checkpoints have none.
    """

    config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., Encoder]
    weight_rule: Callable[[str], Rule]
    published_name: Callable[[str], str | None]
    alias: tuple[str, str] | None = None
    absent: Callable[[Collection[str]], Collection[str]] = lambda names: ()
    compat: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def aliases(self, names: Iterable[str]) -> dict[str, str]:
        """The second name -> the first, of those published names that have two."""
        if self.alias is None:
            return {}
        second, first = self.alias
        return {second + name.removeprefix(first): name for name in names if name.startswith(first)}


ENCODERS: dict[str, Kind] = {
    "merl": Kind(merl.MerlConfig.from_fields, merl.Merl, merl.weight_rule, merl.published_name),
    "st_mem": Kind(
        partial(mae.MaeConfig.from_fields, "st_mem"), mae.StMem, mae.weight_rule, mae.st_mem_published_name,
        compat={"st_mem_train_positions": {"train_positions": True}},
    ),  # fmt: skip
    **{
        name: Kind(
            partial(mae.MaeConfig.from_fields, name), mae.MaskedAutoencoder, mae.weight_rule, bare_name,
            mae.ALIAS,
        )  # fmt: skip
        for name in ("mtae", "mlae")
    },
    "clip": Kind(sizes.ClipConfig.from_fields, vision.Clip, vision.clip_rule, vision.clip_name, file_config=dict),
    "vit": Kind(
        sizes.VitConfig.from_fields, vision.Vit, vision.vit_rule, vision.vit_name, absent=vision.vit_absent,
        compat={"vit_random_mask": {"mask_ratio": 0.75}}, file_config=dict,
    ),  # fmt: skip
    "siglip2": Kind(
        sizes.Siglip2Config.from_fields, siglip.Siglip2, siglip.siglip2_rule, siglip.siglip2_name, file_config=dict
    ),
    "siglip_ecg": Kind(
        sizes.SiglipEcgConfig.from_fields, siglip.SiglipEcg, siglip.siglip_ecg_rule, siglip.siglip_ecg_name,
        absent=siglip.siglip_ecg_absent, file_config=sizes.tower_of_file,
    ),  # fmt: skip
}


def build_encoder(
    name: str,
    config: Mapping[str, Any],
    tokens: int,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    compat: Iterable[str] = (),
) -> Encoder:
    """A freshly initialised encoder, computed in `dtype`; works under jit and eval_shape.

    `config` has the fields of the encoder's own config. UserError for an unknown name, field or value.
    """
    kind = kind_of(name)
    for behaviour, changed in kind.compat.items():
        if behaviours.enabled(behaviour, compat):
            config = {**config, **changed}
    if tokens < 1:
        raise UserError("encoder.tokens", str(tokens), "at least 1", "set it to the signal tokens per ECG")
    return kind.module(kind.config(config), tokens, rngs=rngs, dtype=dtype, param_dtype=param_dtype)


def kind_of(name: str) -> Kind:
    """The registry's entry of `encoder.name`. Raises UserError for an unknown one."""
    if name not in ENCODERS:
        plain = str(name).rpartition("/")[2].replace("-", "_").casefold()
        family = max((known for known in ENCODERS if plain.startswith(f"{known}_")), key=len, default="")
        fix = nearest(str(name), ENCODERS) or "choose one of them"
        if family:
            fix = f"set encoder.name={family}, and encoder.checkpoint to its weights: a file, a folder or a hub's id"
        raise UserError("encoder.name", repr(name), f"one of {', '.join(ENCODERS)}", fix)
    return ENCODERS[name]
