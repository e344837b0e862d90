"""Encoders by name: built for training, or loaded with published weights and ready to call.

An encoder maps (B, C, L) signals to (B, N, D) float32 embeddings; `width` is D and `tokens` is N. Its arrays
have two names, ours (`layer1.0.conv1.kernel`) and the published one (`resnet.layer1.0.conv1.weight`); each
encoder's module holds the one table between them, read here in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.data.images import PROCESSING
from elm_jax.errors import UserError, nearest, some
from elm_jax.models.encoders import mae, merl, siglip, vision
from elm_jax.models.encoders import vision_config as sizes
from elm_jax.models.encoders.checkpoint import read_checkpoint, read_config
from elm_jax.models.encoders.releases import published_names
from elm_jax.models.functional import Leaf, initialise, structure_of
from elm_jax.weights.rules import Rule, bare_name, export


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


def load_encoder(
    name: str,
    checkpoint: str | Path | Mapping[str, Any] | None = None,
    tokens: int = 1,
    compat: Iterable[str] = (),
    **config: Any,
) -> LoadedEncoder:
    """An encoder in float32 and evaluation mode, to call on arrays.

    checkpoint: a .pt (needs the torch extra) or .safetensors file with published names, a dict of name to array,
        or, for the vision encoders, a Hugging Face folder or id, whose config.json gives the sizes. None
        initialises at random with seed 0.
    config: the fields of the encoder's own config, such as resnet_type.
    Raises UserError for an unknown name or field, and for weights missing, unknown or of another shape.
    """
    behaviours.check(compat)
    fields = encoder_config(name, checkpoint, config)

    def build() -> Encoder:
        return build_encoder(name, fields, tokens, nnx.Rngs(0), compat=compat)

    structure, arrays = structure_of(build), {}
    if checkpoint is not None:
        arrays = jax.device_put(from_published(name, structure.leaves, *read_checkpoint(checkpoint)))
    if drawn := {ours: None for ours in structure.leaves if ours not in arrays}:
        arrays |= initialise(build, structure, drawn)
    return LoadedEncoder(structure.bind(arrays))


def encoder_config(
    name: str, checkpoint: str | Path | Mapping[str, Any] | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """`config` over what the checkpoint's own `config.json` says, where there is one: what `build_encoder` takes."""
    read = kind_of(name).file_config
    return {**(read(read_config(checkpoint, PROCESSING.get(name))) if read else {}), **config}


class LoadedEncoder:
    """An encoder with its weights, in evaluation mode, compiled per input shape; `module` is the bare one."""

    def __init__(self, module: Encoder) -> None:
        self.module, self.width, self.tokens = module, module.width, module.tokens
        graphdef, self._state = nnx.split(module)
        self._encode = jax.jit(lambda state, signals: nnx.merge(graphdef, state)(signals))

    def __call__(self, signals: Any) -> jax.Array:
        """Signals (B, C, L), or what else the encoder takes: images, or a dict of arrays -> (B, N, D) float32."""
        if isinstance(signals, Mapping):
            return self._encode(self._state, {name: jnp.asarray(value) for name, value in signals.items()})
        return self._encode(self._state, jnp.asarray(signals))


def from_published(
    name: str, leaves: Mapping[str, Leaf], tensors: Mapping[str, Any], where: str = "encoder.checkpoint"
) -> dict[str, np.ndarray]:
    """Published tensors as arrays under our names, in the shapes and dtypes of `leaves`.

    What the checkpoint may lack and does (`Kind.absent`) is left out of the result. Raises UserError, naming
    `where` and the tensors, unless every other leaf is there in its shape and nothing is left over but what the
    encoder's table says belongs to other parts.
    """
    kind = kind_of(name)
    wanted = {ours: kind.weight_rule(ours) for ours in leaves}
    names = {ours: rule.names(leaves[ours].shape[0] if rule.stacked else 1) for ours, rule in wanted.items()}
    expected = [theirs for each in names.values() for theirs in each]
    named = published_names(name, tensors.keys())
    given = {known: key for key, own in named.items() if (known := kind.published_name(own)) is not None}
    aliases = kind.aliases(expected)
    if not aliases.keys().isdisjoint(given):
        expected += aliases  # under both names throughout, or under one
    fix = "check encoder.config and that the file is of this encoder"
    absent = [theirs for theirs in kind.absent(tensors.keys()) if theirs not in given]
    if missing := [theirs for theirs in expected if theirs not in given and theirs not in absent]:
        raise UserError(where, f"no weights {some(missing)}", f"the {len(expected)} weights of {name}", fix)
    if extra := sorted(set(given) - set(expected)):
        raise UserError(where, f"unknown weights {some(extra)}", f"only the weights of {name}", fix)
    arrays = {}
    for ours, rule in wanted.items():
        if rule.theirs in absent:
            continue
        leaf, parts = leaves[ours], [np.asarray(tensors[given[theirs]]) for theirs in names[ours]]
        shape = rule.their_shape(leaf.shape)
        for theirs, tensor in zip(names[ours], parts, strict=True):
            if tensor.shape != shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
                found = f"{theirs} {tensor.dtype}{list(tensor.shape)}"
                raise UserError(where, found, f"floating {list(shape)}", fix)
        arrays[ours] = rule.arrange(parts).astype(leaf.dtype)
    for second, first in aliases.items():
        if second in given and not np.array_equal(tensors[given[second]], tensors[given[first]]):
            raise UserError(where, f"{second} unlike {first}", "the same weights under both names", fix)
    return arrays


def to_published(name: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays under our names as published tensors: the inverse of `from_published`."""
    kind = kind_of(name)
    tensors = dict(export([kind.weight_rule(ours) for ours in arrays], arrays))
    return tensors | {second: tensors[first] for second, first in kind.aliases(tensors).items()}


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
