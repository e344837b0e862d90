"""The configuration of an imported run: what the checkpoint says, what the user says, and what is usual."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from elm_jax import compat as behaviours
from elm_jax.assemble import Assembly, assemble
from elm_jax.cli import ConfigFlags, read_config_file
from elm_jax.config import Config
from elm_jax.elms import ELMS
from elm_jax.errors import UserError
from elm_jax.exchange import llava
from elm_jax.exchange.facts import Fact, Facts, embedding_of, facts_of, patches_of
from elm_jax.exchange.foreign import Foreign
from elm_jax.folders import read_json
from elm_jax.keys import LoraConfig
from elm_jax.models.encoders import ENCODERS
from elm_jax.weights.load import read_llm_config
from elm_jax.weights.peft import CONFIG as ADAPTER_CONFIG
from elm_jax.weights.peft import spec_of

# What a checkpoint of each kind may leave open, and the user then should know to be taken as usual.
_OPEN = {
    "elm": ("encoder.tokens", "data.segment_len", "llm.lora.alpha", "data.system_prompt"),
    "encoder": ("elm", "encoder.tokens", "data.segment_len", "objective"),
    "adapter": ("elm", "encoder.name", "objective"),
}


@dataclass(frozen=True)
class Imported:
    """The parts of the run, and where its keys come from.

    facts: keys that the checkpoint decides. assumed: keys that it leaves open and nobody said.
    rows: of the checkpoint's vocabulary tables; None where it has none.
    """

    assembly: Assembly
    facts: Facts
    assumed: dict[str, Any]
    rows: int | None


def configure(source: Foreign, flags: ConfigFlags, out: str) -> Imported:
    """The configuration and the parts of the run that is to be imported into the folder `out`.

    A flag counts for more than the checkpoint, and the checkpoint for more than the config file; a flag that the
    checkpoint contradicts ends in tensors that do not fit.

    Raises:
        UserError: the checkpoint is of no known model, a key that it leaves open is needed, or the vocabulary is
            another one.
    """
    tree, name = ({}, "import") if flags.path is None else read_config_file(flags.path)
    facts = _adapter(source, flags) if source.kind == "adapter" else facts_of(source, _several(flags, tree))
    _check_llm(source, flags, facts)
    facts = _patches(source, flags, tree, name, facts)
    facts |= _consequences(flags, tree, facts)
    if source.llava is not None:
        told = llava.places(_resolved(flags, tree, name, facts, out))
        facts |= {key: Fact(value, by) for key, (value, by) in told.items()}
    config = _resolved(flags, tree, name, facts, out)
    if source.llava is not None:
        rows, assembly = int(source.info[embedding_of(source)].shape[0]), assemble(config)
    elif source.kind == "elm":
        rows = int(source.info[embedding_of(source)].shape[0])
        said = _is_said(flags, "objective") or _is_said(flags, "phase")
        assembly, facts["objective"] = _objective(source, config, rows, said)
    else:
        rows, assembly = None, assemble(config)
    said = flags.path is not None
    left = [] if said else [k for k in _OPEN[source.kind] if k not in facts and not _is_said(flags, k)]
    return Imported(assembly, facts, {key: _value(assembly.config, key) for key in left if _counts(config, key)}, rows)


def _adapter(source: Foreign, flags: ConfigFlags) -> Facts:
    """Of an adapter folder: what LoRA it is, and the model that it names, where nobody names another."""
    spec, base = spec_of(LoraConfig(adapter=str(source.path))), None
    assert spec is not None
    if flags.path is None:
        base = read_json(source.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    facts = {"llm.lora.rank": spec.rank, "llm.lora.alpha": spec.alpha, "llm.lora.targets": spec.targets}
    named = {"llm.name": base} if base else {}
    return {key: Fact(value, ADAPTER_CONFIG) for key, value in {**facts, **named}.items()}


def _check_llm(source: Foreign, flags: ConfigFlags, facts: Facts) -> None:
    """Raise UserError where nothing says which language model it is: its tokenizer is not in a checkpoint."""
    if flags.path is None and "llm.name" not in facts and not _is_said(flags, "llm.name"):
        width = ""
        if source.kind == "elm":
            rows, size = source.info[embedding_of(source)].shape
            width = f" (of width {size}, with {rows} tokens)"
        raise UserError(
            "llm.name", "nothing", f"the language model{width}, whose config.json and tokenizer are not in the file",
            "set --config.llm.name to its folder, short name or Hugging Face id",
        )  # fmt: skip


def _patches(source: Foreign, flags: ConfigFlags, tree: dict[str, Any], name: str, facts: Facts) -> Facts:
    """`facts`, with one patch told from many by the length of an ECG."""
    if facts.get("elm", Fact(None, "")).value != "patch_elf":
        return facts
    asked = flags.values.get("elm")
    config = _resolved(flags, tree, name, facts, "x")
    leads = len(config.data.leads)
    if asked in ("base_elf", "fuyu") and not _is_said(flags, "data.segment_len"):  # one patch: its length is an ECG's
        patch = facts["elm"].tensor
        length = Fact(source.info[patch].shape[1] // leads, patch)
        return {**facts, "elm": Fact("base_elf", patch), "data.segment_len": length}
    return {**facts, **patches_of(source, leads, config.data.segment_len)}


def _consequences(flags: ConfigFlags, tree: dict[str, Any], facts: Facts) -> Facts:
    """What follows from the facts, by the reference's ways."""
    more, elm = {}, facts.get("elm")
    if elm is not None and any(view.writes == "tokens" for view in ELMS[elm.value].values()):
        more["update"] = Fact(("llm",), elm.tensor)
        order, asked = "signal_token_order", tuple(tree.get("compat") or ())
        if not _is_said(flags, "compat") and not behaviours.enabled(order, asked):
            more["compat"] = Fact((*asked, order), elm.tensor)
    encoder = facts.get("encoder.name")
    if encoder is not None and _reads_images(encoder.value) and not _is_said(flags, "data.representation"):
        more["data.representation"] = Fact("rgb", encoder.tensor)
    return more


def _resolved(flags: ConfigFlags, tree: dict[str, Any], name: str, facts: Facts, out: str) -> Config:
    """The checked configuration: `tree`, the facts over it, the flags over both."""
    tree = copy.deepcopy(tree)
    for key, value in (_implied(facts) | {k: f.value for k, f in facts.items()} | {"workdir": out}).items():
        *sections, leaf = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return flags.over(tree, name)


def _implied(facts: Facts) -> dict[str, Any]:
    """What a config file may say otherwise, and a checkpoint of a model decides by what it does not have."""
    implied: dict[str, Any] = {"init_from": None, "llm.lora.adapter": None}
    encoder = facts["encoder.name"].value if "encoder.name" in facts else None
    if encoder is None or ENCODERS[encoder].file_config is None:  # the others' sizes are in a file beside theirs
        implied["encoder.checkpoint"] = None
    if "elm" not in facts:  # of an encoder or an adapter alone
        return implied if encoder is not None else {key: implied[key] for key in ("init_from", "llm.lora.adapter")}
    pictured = {} if encoder is not None and _reads_images(encoder) else {"data.representation": "signal"}
    return {
        **implied, **pictured, "encoder.name": None, "encoder.config": {}, "connector.hidden": None,
        "llm.lora.rank": 0,
    }  # fmt: skip


def _several(flags: ConfigFlags, tree: dict[str, Any]) -> bool:
    """Whether the user names an elm of several views."""
    return len(ELMS.get(str(flags.values.get("elm", tree.get("elm"))), ())) > 1


def _reads_images(encoder: str) -> bool:
    return ENCODERS[encoder].processing is not None


def _objective(source: Foreign, config: Config, rows: int, said: bool) -> tuple[Assembly, Fact]:
    """The parts of a model with `rows` tokens, and its objective: the reference gives a pretrained one fewer tokens."""
    table = embedding_of(source)
    counts = []
    for objective in (config.objective,) if said else ("sft", "pretrain"):
        assembly = assemble(replace(config, objective=objective))
        tokens = len(assembly.tokenizer)
        counts.append(f"{tokens} ({objective})")
        if rows in (tokens, _unextended(assembly)) and rows >= tokens:
            return assembly, Fact(objective, table)
    raise UserError(
        str(source.path), f"{table} of {rows} tokens", f"as many as the tokenizer has: {' or '.join(counts)}",
        f"set --config.llm.name to the model that it was made from (not {config.llm.name})"
        + (", --config.data.ecg_tokenizer to its ECG-Byte" if config.view.writes == "tokens" else ""),
    )  # fmt: skip


def _unextended(assembly: Assembly) -> int:
    """Rows of the published table: a model whose table was not cut to its tokenizer keeps them."""
    folder = assembly.llm_folder
    return assembly.llm.vocab_size if folder is None else read_llm_config(folder).vocab_size


def _is_said(flags: ConfigFlags, key: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in flags.values)


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _counts(config: Config, key: str) -> bool:
    """Whether a key means anything for this model."""
    needed = {
        "encoder.tokens": config.view.tokens is None,
        "llm.lora.alpha": config.llm.lora.rank > 0,
        "encoder.name": config.view.encoder,
    }
    return needed.get(key, True)
