"""What the names and shapes of a checkpoint say about the model, as keys of the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes

from elm_jax.elms import ELMS
from elm_jax.errors import UserError
from elm_jax.exchange.foreign import Foreign
from elm_jax.exchange.llava import told_by
from elm_jax.folders import read_json
from elm_jax.models.connectors import PREFIXES, RULES
from elm_jax.models.encoders import ENCODERS
from elm_jax.models.encoders.checkpoints import Tensors, Told
from elm_jax.weights.files import HF_FOLDER

_LORA_A = re.compile(r".*\.layers?\.\d+\.|.*\.h\.\d+\.")


@dataclass(frozen=True)
class Fact:
    """The value of a key, and the tensor that says so."""

    value: Any
    tensor: str


Facts = dict[str, Fact]


def facts_of(source: Foreign, several: bool = False) -> Facts:
    """Every key that a checkpoint of a model or an encoder decides. Raises UserError for names of neither.

    `several`: of a model of several views, of which only a configuration says what they are.
    """
    if source.kind == "encoder":
        return _encoder(source, "")
    if source.llava is not None:
        told = told_by(str(source.path), source.info, source.llava)
        facts = {key: Fact(value, source.written.get(by, by)) for key, (value, by) in told.items()}
        return facts | {"llm.name": Fact(str(source.path), "config.json")} | _dtypes(source)
    return _model(source, several)


def embedding_of(source: Foreign) -> str:
    """The name of the LLM's embedding table in a checkpoint of a model; UserError if there is none."""
    ends = ("embed_tokens.weight", "transformer.wte.weight")
    found = [name for name in source.info if name.startswith("llm.") and name.endswith(ends)]
    if len(found) == 1:
        _shape(source, found[0], 2)
    else:
        raise _unlike(source, "one table of token embeddings", f"{len(found)} of them")
    return found[0]


def _model(source: Foreign, several: bool) -> Facts:
    embedding_of(source)
    facts = {} if several else _connector(source)
    if facts and any(view.encoder for view in ELMS[facts["elm"].value].values()):
        facts |= _encoder(source, "encoder.")
    return facts | _dtypes(source) | _lora(source)


def _dtypes(source: Foreign) -> Facts:
    """What the language model computes in: the dtype of its embeddings."""
    table = embedding_of(source)
    dtype = "bfloat16" if source.info[table].dtype == ml_dtypes.bfloat16 else "float32"
    return {f"llm.{which}_dtype": Fact(dtype, table) for which in ("compute", "param")}


def _connector(source: Foreign) -> Facts:
    """The kind of the model by its connector, of which each kind has other names."""
    elms = {elm: view for elm, views in ELMS.packaged().items() for view in views.values() if len(views) == 1}
    signs = {elm: PREFIXES[kind] + RULES[kind][0].theirs for elm, view in elms.items() if (kind := view.connector)}
    for elm, sign in reversed(signs.items()):  # of several patches before one: `patches_of` tells them apart
        if sign in source.info:
            facts = {"elm": Fact(elm, sign)}
            if elms[elm].connector == "mlp":
                inner, width = (_shape(source, f"projection.projection.{n}.weight", 2)[0] for n in (0, 2))
                facts |= {"connector.hidden": Fact(inner, sign)} if inner != width else {}
            return facts
    if not any(name.startswith(("llm.llm.", "encoder.", *PREFIXES.values())) for name in source.info):
        elm, view = next((elm, view) for elm, view in elms.items() if view.connector is None)
        table = embedding_of(source)
        return {"elm": Fact(elm, table), "data.representation": Fact(view.shows, table)}
    raise _unlike(source, f"a connector: {', '.join(dict.fromkeys(signs.values()))}", "none of them")


def patches_of(source: Foreign, leads: int, samples: int) -> Facts:
    """Of a model whose connector reads patches, of which each has leads x samples / patches values: how many they are.

    Raises UserError where an ECG of so many leads and samples cannot be cut so.
    """
    name = "project_layer.projection.weight"
    inputs = _shape(source, name, 2)[1]
    whole = leads * samples
    if whole % inputs:
        fix = "set --config.data.segment_len to the samples of an ECG, and --config.data.leads"
        found, expected = f"{name} of {inputs} inputs", f"a divisor of {leads} leads x {samples} samples"
        raise UserError(str(source.path), found, expected, fix)
    if inputs == whole:
        return {"elm": Fact("base_elf", name)}
    return {"elm": Fact("patch_elf", name), "encoder.tokens": Fact(whole // inputs, name)}


def _lora(source: Foreign) -> Facts:
    """Rank and targets of an adapter in the names of PEFT; its alpha is not in the file."""
    found = {name: spec for name, spec in source.info.items() if ".lora_A." in name}
    if not found:
        return {}
    name, spec = next(iter(found.items()))
    modules = {_LORA_A.sub("", each.partition(".lora_A.")[0]) for each in found}
    last = {module.rpartition(".")[2] for module in modules}
    others = {_LORA_A.sub("", each.removesuffix(".weight")) for each in source.info if _LORA_A.match(each)}
    clear = all(sum(other.rpartition(".")[2] == end for other in others - modules) == 0 for end in last)
    targets = ",".join(sorted(last if clear else modules))
    return {"llm.lora.rank": Fact(int(spec.shape[0]), name), "llm.lora.targets": Fact(targets, name)}


def _encoder(source: Foreign, prefix: str) -> Facts:
    """Which encoder's tensors those are whose names begin with `prefix`, and its sizes where they are not the usual."""
    mine = [name for name in source.info if name.startswith(prefix)]
    for name, kind in ENCODERS.items():
        own = {each.removeprefix(prefix).removeprefix(kind.wrapper): each for each in mine}
        names = {published: own[each] for each, published in kind.published(own).items()}
        tensors = Tensors(str(source.path), source.info, names)
        if kind.sign is not None and (sign := kind.sign(tensors)) is not None:
            told: Told = {"encoder.name": (name, sign), **kind.sizes(tensors)}
            facts = {key: Fact(value, names.get(theirs, theirs)) for key, (value, theirs) in told.items()}
            return facts | _of_folder(name, source)
    raise _unlike(source, f"an encoder: {', '.join(ENCODERS)}", "names of none of them")


def _of_folder(name: str, source: Foreign) -> Facts:
    """The sizes that a Hugging Face folder's `config.json` says."""
    read, file = ENCODERS[name].file_config, source.path / "config.json"
    return {"encoder.config": Fact(read(read_json(file, HF_FOLDER)), file.name)} if read and file.is_file() else {}


def _shape(source: Foreign, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor, which has `rank` dimensions of at least one."""
    return Tensors(str(source.path), source.info).shape(name, rank)


def _unlike(source: Foreign, expected: str, found: str) -> UserError:
    return Tensors(str(source.path), source.info).unlike(expected, found)
