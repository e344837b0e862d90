"""Encoders by name: built for training, or loaded with published weights and ready to call.

An encoder maps (B, C, L) signals to (B, N, D) float32 embeddings; `width` is D and `tokens` is N. Its arrays
have two names, ours (`layer1.0.conv1.kernel`) and the published one (`resnet.layer1.0.conv1.weight`); each
encoder's module holds the one table between them, read here in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax import compat as behaviours
from elm_jax.errors import UserError, nearest
from elm_jax.models.encoders import merl
from elm_jax.models.functional import Leaf, structure_of
from elm_jax.weights.rules import Rule, export
from elm_jax.weights.safetensors import Safetensors


class Encoder(Protocol):
    """What the rest of the program knows of an encoder; all are nnx.Modules."""

    width: int
    tokens: int

    def __call__(self, signals: Any, weights: jax.Array | None = None, train: bool = False) -> jax.Array: ...


@dataclass(frozen=True)
class Kind:
    """An entry of the registry: how to read the config, build the module and name the weights."""

    config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., Encoder]
    weight_rule: Callable[[str], Rule]
    published_name: Callable[[str], str | None]


ENCODERS: dict[str, Kind] = {
    "merl": Kind(merl.MerlConfig.from_fields, merl.Merl, merl.weight_rule, merl.published_name),
}
PLANNED = ("st_mem", "mtae", "mlae", "clip", "siglip2", "siglip_ecg", "vit")


def build_encoder(
    name: str,
    config: Mapping[str, Any],
    tokens: int,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> Encoder:
    """A freshly initialised encoder, computed in `dtype`; works under jit and eval_shape.

    `config` has the fields of the encoder's own config. UserError for an unknown name, field or value.
    """
    kind = _kind(name)
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

    checkpoint: a .pt (needs the torch extra) or .safetensors file with published names, or a dict of name to
        array; None initialises at random with seed 0.
    config: the fields of the encoder's own config, such as resnet_type.
    Raises UserError for an unknown name or field, and for weights missing, unknown or of another shape.
    """
    behaviours.check(compat)

    def build() -> Encoder:
        return build_encoder(name, config, tokens, nnx.Rngs(0))

    structure = structure_of(build)
    if checkpoint is None:
        return LoadedEncoder(structure.bind(jax.jit(lambda: structure.arrays(build()))()))
    tensors, where = read_checkpoint(checkpoint)
    arrays = from_published(name, structure.leaves, tensors, where)
    return LoadedEncoder(structure.bind(jax.device_put(arrays)))


class LoadedEncoder:
    """An encoder with its weights, in evaluation mode, compiled per input shape; `module` is the bare one."""

    def __init__(self, module: Encoder) -> None:
        self.module, self.width, self.tokens = module, module.width, module.tokens
        graphdef, self._state = nnx.split(module)
        self._encode = jax.jit(lambda state, signals: nnx.merge(graphdef, state)(signals))

    def __call__(self, signals: Any) -> jax.Array:
        """(B, C, L) -> (B, N, D) float32."""
        return self._encode(self._state, jnp.asarray(signals))


def from_published(
    name: str, leaves: Mapping[str, Leaf], tensors: Mapping[str, Any], where: str = "encoder.checkpoint"
) -> dict[str, np.ndarray]:
    """Published tensors as arrays under our names, in the shapes and dtypes of `leaves`.

    Raises UserError, naming `where` and the tensors, unless every leaf is there in its shape and nothing is
    left over but what the encoder's table says belongs to other parts.
    """
    kind = _kind(name)
    rules = [kind.weight_rule(ours) for ours in leaves]
    given = {known: key for key in tensors if (known := kind.published_name(key)) is not None}
    fix = "check encoder.config and that the file is of this encoder"
    if missing := [rule.theirs for rule in rules if rule.theirs not in given]:
        raise UserError(where, f"no weights {_some(missing)}", f"the {len(rules)} weights of {name}", fix)
    if extra := sorted(set(given) - {rule.theirs for rule in rules}):
        raise UserError(where, f"unknown weights {_some(extra)}", f"only the weights of {name}", fix)
    arrays = {}
    for rule in rules:
        leaf, tensor = leaves[rule.ours], np.asarray(tensors[given[rule.theirs]])
        expected = rule.their_shape(leaf.shape)
        if tensor.shape != expected or not jnp.issubdtype(tensor.dtype, jnp.floating):
            found = f"{rule.theirs} {tensor.dtype}{list(tensor.shape)}"
            raise UserError(where, found, f"floating {list(expected)}", fix)
        arrays[rule.ours] = rule.arrange([tensor]).astype(leaf.dtype)
    return arrays


def to_published(name: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays under our names as published tensors: the inverse of `from_published`."""
    return dict(export([_kind(name).weight_rule(ours) for ours in arrays], arrays))


def read_checkpoint(checkpoint: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Tensors by name and what to call their source in errors; UserError for a file that cannot be read."""
    if isinstance(checkpoint, Mapping):
        return checkpoint.get("model_state_dict", checkpoint), "encoder.checkpoint"
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError("encoder.checkpoint", str(path), "an existing file", "correct the path")
    if path.suffix == ".safetensors":
        return Safetensors(path), str(path)
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path), str(path)
    fix = "convert it to .safetensors"
    raise UserError("encoder.checkpoint", str(path), "a file ending in .pt, .pth or .safetensors", fix)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        fix = "install it with `pip install elm-jax[torch]`, or convert the file to .safetensors"
        raise UserError(str(path), "no PyTorch", "PyTorch, to read a .pt file", fix) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        fix = "save its state dict with torch.save"
        raise UserError(str(path), f"{type(error).__name__}", "a file of tensors only", fix) from error
    tensors = content.get("model_state_dict", content) if isinstance(content, Mapping) else {}
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        fix = "save its state dict with torch.save"
        raise UserError(str(path), "no tensors by name", "a state dict, or one under model_state_dict", fix)
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def _kind(name: str) -> Kind:
    if name not in ENCODERS:
        found = f"{name!r}, which is not built yet" if name in PLANNED else repr(name)
        fix = nearest(str(name), ENCODERS) or "choose one of them"
        raise UserError("encoder.name", found, f"one of {', '.join(ENCODERS)}", fix)
    return ENCODERS[name]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
