"""Adapter folders as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`, in and out.

PEFT keeps lora_A as (rank, in) and lora_B as (out, rank), of every layer apart; ours are a (L, in, rank) and
b (L, rank, out). Every field of the configuration is accounted for: one that is not known, or that asks for what
`elm_jax.models.lora` does not compute, is an error.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from elm_jax.errors import UserError, nearest
from elm_jax.folders import read_json
from elm_jax.keys import LoraConfig
from elm_jax.models.decoder import Decoder, DecoderConfig
from elm_jax.models.lora import LoraSpec, add_lora, is_lora, target_modules, their_module
from elm_jax.models.names import Rule, export
from elm_jax.weights.load import parameters
from elm_jax.weights.published import Published, match
from elm_jax.weights.safetensors import Safetensors, save_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the base model's own names

_READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
# Fields that say nothing about what the adapter computes. `fan_in_fan_out` is the layout of the base kernels.
_IRRELEVANT = frozenset(
    {
        *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"),
        *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    }
)
_OFF = (None, False, {}, [])
# Field by field, the values for which the adapter is what we compute (first: what is written).
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Others ("pissa", "olora", "loftq", ...) have changed the base model too.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    **dict.fromkeys(
        (
            *("modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication", "exclude_modules"),
            *("megatron_config", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
            *("arrow_config", "corda_config", "eva_config", "kasa_config", "lora_ga_config", "monteclora_config"),
            *("velora_config", "use_bdlora"),
        ),
        _OFF,
    ),
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "loftq_config"), ({}, None)),
}
_WRITTEN = (
    *("peft_type", "task_type", "bias", "init_lora_weights", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "use_dora", "rank_pattern", "alpha_pattern"),
)


def spec_of(lora: LoraConfig) -> LoraSpec | None:
    """The adapter that `llm.lora` asks for, None for none; that of `adapter`, where it names a folder.

    Rank, alpha and targets are then the folder's; the dropout is the run's own.

    Raises:
        UserError: a folder that cannot be used, or of another rank than `llm.lora.rank`.
    """
    if lora.adapter is None:
        return LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.targets) if lora.rank else None
    spec = _read_spec(Path(lora.adapter) / CONFIG)
    if lora.rank not in (0, spec.rank):
        found, expected = str(lora.rank), f"{spec.rank}, that of {lora.adapter}"
        raise UserError("llm.lora.rank", found, expected, f"set --config.llm.lora.rank={spec.rank}")
    return replace(spec, dropout=lora.dropout)


def load_adapter(folder: str | Path, config: DecoderConfig) -> tuple[LoraSpec, Published]:
    """The adapter in a PEFT folder: its spec, and its arrays ("layers.attention.q.lora.a") in their own dtype.

    Raises:
        UserError: a field of its configuration that we do not know or do not compute, or tensors that do not fit
            the model; by name.
    """
    told, file = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    spec, fix = _read_spec(told), "use the adapter of this model, with its own adapter_config.json"
    rules, tensors = _rules(config, spec.targets, str(told)), Safetensors(file)
    names = {name: name for name in tensors}
    return spec, match(str(file), spec.targets, fix, rules, _shapes(config, spec), tensors, names)


def save_adapter(
    folder: str | Path,
    arrays: Mapping[str, np.ndarray],
    spec: LoraSpec,
    config: DecoderConfig,
    base: str | None = None,
) -> None:
    """Write a PEFT folder of the arrays of an adapter, named as `load_adapter` returns them; others are left out.

    `base` is the name or folder of the base model, for who opens the adapter with PEFT.
    """
    folder = Path(folder)
    modules = target_modules(config, spec.targets)
    names = sorted({_short(rule, config) for rule in modules.values()})
    alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
    written = {
        **{name: _ONLY[name][0] for name in _WRITTEN},
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "target_modules": names,
        "use_rslora": False,
        "fan_in_fan_out": not all(rule.transpose for rule in modules.values()),
        "inference_mode": True,
    }
    tensors = dict(export(_rules(config, spec.targets, str(folder)), arrays))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})


def merged_kernel(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """The kernel (I, O) of a layer without LoRA that computes the same, in its dtype: kernel + a @ b · scale.

    Rounded as PEFT does: the change is made and added in float32, and the sum rounded to the kernel's dtype.
    """
    change = (a.astype(np.float32) @ b.astype(np.float32)) * np.float32(scale)
    return (kernel.astype(np.float32) + change).astype(kernel.dtype)


def merged(arrays: Iterable[tuple[str, np.ndarray]], scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays, those of LoRA first, as those of the model without it."""
    adapter: dict[str, np.ndarray] = {}
    for name, array in arrays:
        module = name.removesuffix(".kernel")
        if is_lora(name):
            adapter[name] = array
        elif f"{module}.lora.a" in adapter:
            layers = zip(array, adapter[f"{module}.lora.a"], adapter[f"{module}.lora.b"], strict=True)
            result = np.empty_like(array)
            for layer, parts in enumerate(layers):
                result[layer] = merged_kernel(*parts, scale)
            del array, layers  # it may be large, and what comes next too
            yield name, result
            del result
        else:
            yield name, array
            del array


def _rules(config: DecoderConfig, targets: str, where: str) -> list[Rule]:
    """Which tensor of the adapter is which array."""
    return [
        replace(
            rule, theirs=f"{PREFIX}{their_module(rule)}.lora_{side.upper()}.weight", ours=f"{path}.lora.{side}",
            transpose=True,
        )
        for path, rule in target_modules(config, targets, where).items()
        for side in "ab"
    ]


def _shapes(config: DecoderConfig, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """The adapter's arrays and their shapes."""

    def build() -> Decoder:
        decoder = Decoder(config, nnx.Rngs(0))
        add_lora(decoder, spec, nnx.Rngs(0))
        return decoder

    return {n: v.shape for n, v in parameters(nnx.state(nnx.eval_shape(build))).items() if is_lora(n)}


def _short(rule: Rule, config: DecoderConfig) -> str:
    """The least end of a module's name that means no other one of the family."""
    parts = their_module(rule).split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next(end for end in ends if len(target_modules(config, end)) == 1)


def _read_spec(path: Path) -> LoraSpec:
    fields = read_json(path, "use a folder that PEFT has saved")
    known = {*_READ, *_IRRELEVANT, *_ONLY}
    for name, value in fields.items():
        if name not in known:
            fix = nearest(name, known) or "delete it if you know that the adapter computes the same without it"
            raise UserError(str(path), f"unknown field {name}", "the fields of PEFT's LoraConfig", fix)
        if name in _ONLY and value not in _ONLY[name]:
            expected = " or ".join(str(allowed) for allowed in _ONLY[name])
            raise UserError(str(path), f"{name} = {value}", expected, "this variant is not supported")
    return _spec_of(path, fields)


def _spec_of(path: Path, fields: Mapping[str, Any]) -> LoraSpec:
    """The spec that these fields mean; alpha / √rank ("rslora") becomes an alpha / rank of the same value."""
    rank, alpha, dropout = (fields.get(name) for name in ("r", "lora_alpha", "lora_dropout"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(str(path), f"r = {rank!r}", "a whole number above 0", "correct it")
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise UserError(str(path), f"{name} = {value!r}", "a number of at least 0", "correct it")
    targets = fields.get("target_modules")
    if targets == "all-linear":
        targets = ["all"]
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise UserError(
            str(path), f"target_modules = {targets!r}", "a list of module names", "list the names of the modules"
        )
    scaled = float(alpha or 0) * (math.sqrt(rank) if fields.get("use_rslora") else 1.0)
    return LoraSpec(rank, scaled, float(dropout or 0), ",".join(sorted(targets)))
