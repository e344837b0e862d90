"""What the names and shapes of a checkpoint say about the model, as keys of the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import ml_dtypes

from elm_jax.errors import UserError
from elm_jax.exchange.source import Source
from elm_jax.models.encoders import ENCODERS
from elm_jax.models.encoders.mae import HEAD_DIM, PATCHINGS, MaeConfig
from elm_jax.models.encoders.merl import LAYOUTS, MerlConfig, bottleneck
from elm_jax.weights.load import read_json
from elm_jax.weights.releases import published_names

Shapes = Mapping[str, jax.ShapeDtypeStruct]
_LEADS = 12  # of which the patches of MTAE are made, and by whose number those of MLAE are known
_LORA_A = re.compile(r".*\.layers?\.\d+\.|.*\.h\.\d+\.")


@dataclass(frozen=True)
class Fact:
    """The value of a key, and the tensor that says so."""

    value: Any
    tensor: str


Facts = dict[str, Fact]


def facts_of(source: Source) -> Facts:
    """Every key that a checkpoint of a model or an encoder decides. Raises UserError for names of neither."""
    if source.kind == "encoder":
        return _encoder(_unwrapped(source, ""), source)
    return _model(source)


def embedding_of(source: Source) -> str:
    """The name of the LLM's embedding table in a checkpoint of a model; UserError if there is none."""
    ends = ("embed_tokens.weight", "transformer.wte.weight")
    found = [name for name in source.info if name.startswith("llm.") and name.endswith(ends)]
    if len(found) == 1:
        _shape(source, found[0], 2)
    else:
        raise _unlike(source, "one table of token embeddings", f"{len(found)} of them")
    return found[0]


def _model(source: Source) -> Facts:
    info, table = source.info, embedding_of(source)
    facts = _connector(source)
    if facts["elm"].value.endswith("_llava"):
        facts |= _encoder(_unwrapped(source, "encoder."), source)
    dtype = "bfloat16" if info[table].dtype == ml_dtypes.bfloat16 else "float32"
    facts |= {f"llm.{which}_dtype": Fact(dtype, table) for which in ("compute", "param")}
    return facts | _lora(source)


def _connector(source: Source) -> Facts:
    """The kind of the model by its connector, of which each kind has other names."""
    info = source.info
    linear, hidden, out = (f"projection.projection.{n}weight" for n in ("", "0.", "2."))
    patch, conv = "project_layer.projection.weight", "project_layer.conv1.weight"
    if linear in info:
        return {"elm": Fact("linear_llava", linear)}
    if hidden in info and out in info:
        inner, width = _shape(source, hidden, 2)[0], _shape(source, out, 2)[0]
        facts = {"elm": Fact("mlp_llava", hidden)}
        return facts if inner == width else facts | {"connector.hidden": Fact(inner, hidden)}
    if conv in info:
        return {"elm": Fact("conv_elf", conv)}
    if patch in info:
        return {"elm": Fact("patch_elf", patch)}
    if not any(name.startswith(("llm.llm.", "encoder.", "projection.", "project_layer.")) for name in info):
        facts = {"elm": Fact("ecg_byte", embedding_of(source)), "data.representation": Fact("symbolic", "")}
        return {name: Fact(fact.value, facts["elm"].tensor) for name, fact in facts.items()}
    raise _unlike(source, f"a connector: {linear}, {hidden}, {patch} or {conv}", "none of them")


def patches_of(source: Source, leads: int, samples: int) -> Facts:
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


def _lora(source: Source) -> Facts:
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


def _unwrapped(source: Source, prefix: str) -> dict[str, str]:
    """The encoder's own names, without `prefix` and the module around a Hugging Face model -> the checkpoint's."""
    mine = {name.removeprefix(prefix): name for name in source.info if name.startswith(prefix)}
    return {name.removeprefix("vision_encoder."): theirs for name, theirs in mine.items()}


def encoder_of(names: Mapping[str, Any], source: Source) -> str:
    """Which encoder has tensors of these names. Raises UserError for none."""
    for name in ENCODERS:
        published = published_names(name, names.keys()).values()
        if any(each.startswith(_SIGNS[name]) for each in published):
            return _among_autoencoders(names, source) if name == "mtae" else name
    raise _unlike(source, f"an encoder: {', '.join(ENCODERS)}", "names of none of them")


# The first encoder is meant of which a tensor's published name begins so, in the order of ENCODERS.
_SIGNS: Mapping[str, tuple[str, ...]] = {
    "merl": ("resnet.conv1.",),
    "st_mem": ("encoder.sep_embedding",),
    "mtae": ("encoder.cls_embedding",),
    "mlae": ("encoder.cls_embedding",),
    "clip": ("visual_projection.",),
    "vit": ("vit.embeddings.", "embeddings.patch_embeddings."),
    "siglip2": ("vision_model.head.",),
    "siglip_ecg": ("vision_model.",),
}


def _among_autoencoders(names: Mapping[str, str], source: Source) -> str:
    """MTAE's patches are of time, MLAE's are leads, one or several of which make a patch; its head makes one."""
    tokens = _shape(source, _named(names, "mtae", "encoder.pos_embedding"), 3)[1]
    patch = _shape(source, _named(names, "mtae", "encoder.to_patch_embedding.1.weight"), 1)
    head = _shape(source, _named(names, "mtae", "decoder_head.weight"), 2)
    return "mlae" if tokens - 1 == _LEADS or patch[0] != head[0] else "mtae"


def _encoder(names: Mapping[str, str], source: Source) -> Facts:
    """The encoder and its sizes, where they are not the usual ones."""
    name = encoder_of(names, source)
    sizes = _merl(names, source) if name == "merl" else _autoencoder(name, names, source) if name in PATCHINGS else {}
    sign = next(theirs for own, theirs in names.items() if published_names(name, names)[own].startswith(_SIGNS[name]))
    return {"encoder.name": Fact(name, sign), **sizes, **_of_folder(name, source)}


def _of_folder(name: str, source: Source) -> Facts:
    """The sizes that a Hugging Face folder's `config.json` says."""
    read, file = ENCODERS[name].file_config, source.path / "config.json"
    return {"encoder.config": Fact(read(read_json(file)), file.name)} if read and file.is_file() else {}


def _merl(names: Mapping[str, str], source: Source) -> Facts:
    conv = _named(names, "merl", "resnet.conv1.weight")
    width = _shape(source, conv, 3)[0]
    blocks = [re.match(r"resnet\.layer(\d+)\.(\d+)\.conv(\d)\.", n) for n in published_names("merl", names).values()]
    found = {tuple(map(int, block.groups())) for block in blocks if block}
    stages = sorted({stage for stage, *_ in found})
    depths = tuple(len({block for each, block, _ in found if each == stage}) for stage in stages)
    deep = any(number == 3 for *_, number in found)
    kinds = [kind for kind, layout in LAYOUTS.items() if layout[1] == depths and (layout[0] is bottleneck) == deep]
    if not kinds:
        raise _unlike(source, f"a ResNet: {', '.join(LAYOUTS)}", f"one of {depths} blocks")
    facts = {"width": width, "resnet_type": kinds[-1]}
    usual = MerlConfig()
    return {f"encoder.config.{k}": Fact(v, conv) for k, v in facts.items() if v != getattr(usual, k)}


def _autoencoder(name: str, names: Mapping[str, str], source: Source) -> Facts:
    """Sizes of ST-MEM, MTAE and MLAE; the length of their ECGs is `data.segment_len`."""
    own = published_names(name, names.keys())
    position = _named(names, name, "encoder.pos_embedding")
    patch = _named(names, name, "encoder.to_patch_embedding.1.weight")
    qkv = _named(names, name, "encoder.block0.attn.fn.to_qkv.weight")
    _, tokens, width = _shape(source, position, 3)
    values = _shape(source, patch, 1)[0]
    leads = sum(each.startswith("encoder.lead_embeddings.") for each in own.values())
    size, length = {
        "st_mem": (values, (tokens - 2) * values),
        "mtae": (values // _LEADS, (tokens - 1) * (values // _LEADS)),
        "mlae": (_LEADS // max(1, tokens - 1), values * (tokens - 1) // _LEADS),
    }[name]
    fed = _named(names, name, "encoder.block0.ff.fn.net.0.weight")
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "depth": sum(bool(re.fullmatch(r"encoder\.block\d+\.attn\.norm\.weight", each)) for each in own.values()),
        "num_heads": _shape(source, qkv, 2)[0] // (3 * HEAD_DIM),
        "mlp_ratio": _ratio(_shape(source, fed, 2)),
        "qkv_bias": "encoder.block0.attn.fn.to_qkv.bias" in own.values(),
        "patch_size": size,
    }
    if name == "st_mem":
        sizes["num_leads"] = leads
    else:
        to_decoder = _named(names, name, "to_decoder_embedding.weight")
        decoder_qkv = _named(names, name, "decoder_blocks.0.attn.fn.to_qkv.weight")
        sizes |= {
            "decoder_embed_dim": _shape(source, to_decoder, 2)[0],
            "decoder_depth": sum(
                bool(re.fullmatch(r"decoder_blocks\.\d+\.attn\.norm\.weight", each)) for each in own.values()
            ),
            "decoder_num_heads": _shape(source, decoder_qkv, 2)[0] // (3 * HEAD_DIM),
        }
    usual = {field.name: field.default for field in fields(MaeConfig)} | {"patch_size": PATCHINGS[name].size(length)}
    facts = {f"encoder.config.{k}": Fact(v, qkv) for k, v in sizes.items() if v != usual[k]}
    return {"data.segment_len": Fact(length, position), **facts}


def _ratio(shape: tuple[int, ...]) -> int | float:
    inner, width = shape
    return inner // width if inner % width == 0 else inner / width


def _named(names: Mapping[str, str], encoder: str, published: str) -> str:
    """The checkpoint's name of a published one, which the strict comparison will miss if it is not there."""
    found = [names[own] for own, each in published_names(encoder, names.keys()).items() if each == published]
    return found[0] if found else published


def _shape(source: Source, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor, which has `rank` dimensions of at least one."""
    if name not in source.info:
        raise _unlike(source, name, "no such tensor")
    shape = tuple(int(size) for size in source.info[name].shape)
    if len(shape) != rank or not all(shape):
        raise _unlike(source, f"{rank} dimensions of {name}", str(list(shape)))
    return shape


def _unlike(source: Source, expected: str, found: str) -> UserError:
    return UserError(str(source.path), found, expected, "check that the file is a checkpoint of such a model")
