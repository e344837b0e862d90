"""An exported folder, opened again: `elm.json` says what its files are the weights of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elm_jax.assemble import Assembly, assemble
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config, to_dict
from elm_jax.errors import UserError
from elm_jax.exchange.reference import Kinds, published_rules
from elm_jax.folders import ECG_BYTE, FACTS, read_json
from elm_jax.models.views import check_views
from elm_jax.run.weights import TrainedWeights, Weights
from elm_jax.weights.published import match
from elm_jax.weights.safetensors import Safetensors

LLM, ADAPTER = "llm", "adapter"  # folders in it
# Of the run's config, what a model is that answers; paths are none of it.
_TOP = ("seed", "objective", "elm", "update", "compat", "connector")
_DATA = ("representation", "segment_len", "sampling_rate", "leads", "normalize", "norm_eps", "image_layout",
         "image_rhythm", "missing", "left_out", "min_ecg_tokens", "explicit_thinking", "max_len")  # fmt: skip
_LLM = ("compute_dtype", "param_dtype")
_EVAL = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
_ENCODER = ("name", "tokens", "config")


def config_of_export(weights: TrainedWeights) -> dict[str, Any]:
    """The keys of the run's config that `open_exported` needs."""
    assembly, config = weights.assembly, weights.assembly.config
    said, first = to_dict(config), next(iter(config.views))
    encoders = {
        view: {"name": (own := config.encoder_of(view)).name, "tokens": own.tokens, "config": sizes_of(assembly, view)}
        for view in config.views if view == first or view in config.slots
    }  # fmt: skip
    return {
        **{name: said[name] for name in _TOP}, "objective": assembly.text.phase,
        "data": {name: said["data"][name] for name in _DATA},
        "llm": {**{name: said["llm"][name] for name in _LLM}, "chat": assembly.text.family},
        "encoder": encoders.pop(first), "encoders": encoders,
        "eval": {name: said["eval"][name] for name in _EVAL},
    }  # fmt: skip


def sizes_of(assembly: Assembly, view: str) -> dict[str, Any]:
    """The fields of a view's encoder's own config that a file can say."""
    own = assembly.encoders.get(view, {})
    return {name: x for name, x in own.items() if name != "text" and not isinstance(x, (tuple, set))}


def open_exported(folder: str | Path, flags: ConfigFlags) -> Weights:
    """The weights of the exported model in a folder, with its config, which `flags` may change as those of a run.

    Raises:
        UserError: no export of a model there, an older one that does not say its config, or files of another.
    """
    folder = Path(folder).expanduser()
    facts = read_json(folder / FACTS)
    tree = facts.get("config")
    if not isinstance(tree, Mapping):
        found = "no config" if "llm" in facts else "an encoder alone"
        fix = "export the run again with this version" if "llm" in facts else "open it with elm_jax.load_encoder"
        raise UserError(folder / FACTS, found, "the config of a model, as export writes it", fix)
    assembly = assemble(_config(tree, folder, flags))
    spoken = facts.get("system_prompt")
    if not isinstance(spoken, str | None):
        raise UserError(folder / FACTS, f"system_prompt {spoken!r}", "a text or null", "export the run again")
    if "data.system_prompt" not in flags.values:  # what it says is the prompt itself, and no file
        assembly = replace(assembly, text=replace(assembly.text, system_prompt=spoken))
    kinds, step = Kinds.of(assembly), facts.get("step")
    saved: dict[str, Any] = {}
    for part in kinds.connectors:
        leaves = {name: leaf.shape for name, leaf in assembly.structure.leaves.items() if kinds.part_of(name) == part}
        tensors = Safetensors(folder / f"{part}.safetensors")
        rules, named = published_rules(leaves, kinds), {name: name for name in tensors}
        fix = "export the run again"
        found = match(str(folder / f"{part}.safetensors"), part, fix, rules.values(), leaves, tensors, named)
        saved |= dict.fromkeys(leaves, found)
    return Weights(assembly, saved, step if type(step) is int else 0)


def _config(tree: Mapping[str, Any], folder: Path, flags: ConfigFlags) -> Config:
    """What the file says and `flags` change, with the folder's own files in the place of any path. Of the file nothing
    is read but what `config_of_export` writes."""

    def said(name: str, part: Any, keys: Collection[str]) -> dict[str, Any]:
        if not isinstance(part, Mapping):
            raise UserError(folder / FACTS, f"config{name} {part!r:.60}", "keys and values", "export the run again")
        return {key: value for key, value in part.items() if key in keys}

    def section(name: str, keys: Collection[str]) -> dict[str, Any]:
        return said(f".{name}", tree.get(name, {}), keys)

    further = section("encoders", tree.get("encoders", ()))
    adapter, symbols = folder / ADAPTER, folder / ECG_BYTE
    lora = {"adapter": str(adapter) if adapter.is_dir() else None}
    config = flags.over({
        **said("", tree, _TOP), "workdir": str(folder), "eval": section("eval", _EVAL),
        "data": {**section("data", _DATA), "ecg_tokenizer": str(symbols) if symbols.is_file() else None},
        "llm": {**section("llm", (*_LLM, "chat")), "name": str(folder / LLM), "lora": lora},
        "encoder": section("encoder", _ENCODER),
        "encoders": {view: said(f".encoders.{view}", own, _ENCODER) for view, own in further.items()},
    })  # fmt: skip
    check_views(config)
    encoders = {
        view: replace(config.encoder_of(view), checkpoint=str(folder / f"{config.part('encoder', view)}.safetensors"))
        for view, each in config.views.items() if each.encoder
    }  # fmt: skip
    first, *others = config.views
    further = {view: asdict(encoders.get(view, config.encoder_of(view))) for view in others if view in config.slots}
    return replace(config, encoder=encoders.get(first, config.encoder), encoders=further)
