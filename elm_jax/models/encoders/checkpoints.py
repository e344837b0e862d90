"""What the names and shapes of a checkpoint say of the encoder that it holds: which one it is, and its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from elm_jax.errors import UserError
from elm_jax.models.encoders.mae import HEAD_DIM, PATCHINGS, MaeConfig
from elm_jax.models.encoders.merl import LAYOUTS, MerlConfig, bottleneck
from elm_jax.models.encoders.merl_vit import MerlVitConfig

_LEADS = 12  # of which the patches of MTAE are made, and by whose number those of MLAE are known


@dataclass(frozen=True)
class Tensors:
    """Tensors of a checkpoint, under an encoder's published names.

    where: the checkpoint, for errors. info: its own name of each -> what has a `shape`. names: a published name -> its
    own.
    """

    where: str
    info: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Of the tensor that has a published name. UserError unless it has `rank` dimensions of at least one."""
        own = self.names.get(name, name)
        if own not in self.info:
            raise self.unlike(own, "no such tensor")
        shape = tuple(int(size) for size in self.info[own].shape)
        if len(shape) != rank or not all(shape):
            raise self.unlike(f"{rank} dimensions of {own}", str(list(shape)))
        return shape

    def unlike(self, expected: str, found: str) -> UserError:
        return UserError(self.where, found, expected, "check that the file is a checkpoint of such a model")


Sign = Callable[[Tensors], str | None]  # the published name of a tensor that only a checkpoint of the encoder has
Told = dict[str, tuple[Any, str]]  # a key of the configuration -> its value, and the published name that says so


def begins(*starts: str, without: str = "") -> Sign:
    """The first tensor whose published name begins so, where no tensor is called `without`."""

    def sign(tensors: Tensors) -> str | None:
        found = next((name for name in tensors.names if name.startswith(starts)), None)
        return None if without in tensors.names else found

    return sign


def has(name: str) -> Sign:
    """The tensor of this published name."""
    return lambda tensors: name if name in tensors.names else None


def is_siglip(tensors: Tensors) -> str | None:
    """SigLIP 1, whose names SigLIP 2 has too: its patches are a convolution's."""
    patches = "vision_model.embeddings.patch_embedding.weight"
    there = {"vision_model.head.probe", patches} <= set(tensors.names)
    return patches if there and len(tensors.info[tensors.names[patches]].shape) == 4 else None


def is_mtae(tensors: Tensors) -> str | None:
    """Of MTAE and MLAE, which have the same names, the one whose patches are of time."""
    found = begins("encoder.cls_embedding")(tensors)
    return None if found is None or _by_lead(tensors) else found


def is_mlae(tensors: Tensors) -> str | None:
    """Of MTAE and MLAE, which have the same names, the one whose patches are leads."""
    found = begins("encoder.cls_embedding")(tensors)
    return found if found is not None and _by_lead(tensors) else None


def _by_lead(tensors: Tensors) -> bool:
    """One lead or several make a patch of MLAE; its head makes one."""
    positions = tensors.shape("encoder.pos_embedding", 3)[1]
    patch = tensors.shape("encoder.to_patch_embedding.1.weight", 1)
    head = tensors.shape("decoder_head.weight", 2)
    return positions - 1 == _LEADS or patch[0] != head[0]


def merl_sizes(tensors: Tensors) -> Told:
    """MERL's width and its kind of ResNet, where they are not the usual ones."""
    conv = "resnet.conv1.weight"
    width = tensors.shape(conv, 3)[0]
    blocks = [re.match(r"resnet\.layer(\d+)\.(\d+)\.conv(\d)\.", name) for name in tensors.names]
    found = {tuple(map(int, block.groups())) for block in blocks if block}
    stages = sorted({stage for stage, *_ in found})
    depths = tuple(len({block for each, block, _ in found if each == stage}) for stage in stages)
    deep = any(number == 3 for *_, number in found)
    kinds = [kind for kind, layout in LAYOUTS.items() if layout[1] == depths and (layout[0] is bottleneck) == deep]
    if not kinds:
        raise tensors.unlike(f"a ResNet: {', '.join(LAYOUTS)}", f"one of {depths} blocks")
    usual = MerlConfig()
    sizes = {"width": width, "resnet_type": kinds[-1]}
    return {f"encoder.config.{k}": (v, conv) for k, v in sizes.items() if v != getattr(usual, k)}


def merl_vit_sizes(tensors: Tensors) -> Told:
    """The sizes of MERL's ViT that are not the usual ones; the length of its ECGs is data.segment_len."""
    conv, qkv = "to_patch_embedding.weight", "block0.attn.fn.to_qkv.weight"
    width, leads, patch = tensors.shape(conv, 3)
    sizes = {
        "num_leads": leads,
        "patch_size": patch,
        "width": width,
        "depth": sum(bool(re.fullmatch(r"block\d+\.attn\.norm\.weight", name)) for name in tensors.names),
        "heads": tensors.shape(qkv, 2)[0] // (3 * HEAD_DIM),
        "mlp_dim": tensors.shape("block0.ff.fn.net.0.weight", 2)[0],
    }
    usual, length = MerlVitConfig(), tensors.shape("pos_embedding", 3)[1] * patch
    changed = {f"encoder.config.{k}": (v, conv) for k, v in sizes.items() if v != getattr(usual, k)}
    return {"data.segment_len": (length, "pos_embedding"), **changed}


def mae_sizes(encoder: str, tensors: Tensors) -> Told:
    """The sizes of ST-MEM, MTAE and MLAE that are not the usual ones; the length of their ECGs is data.segment_len."""
    position, qkv = "encoder.pos_embedding", "encoder.block0.attn.fn.to_qkv.weight"
    _, tokens, width = tensors.shape(position, 3)
    values = tensors.shape("encoder.to_patch_embedding.1.weight", 1)[0]
    patch, length = {
        "st_mem": (values, (tokens - 2) * values),
        "mtae": (values // _LEADS, (tokens - 1) * (values // _LEADS)),
        "mlae": (_LEADS // max(1, tokens - 1), values * (tokens - 1) // _LEADS),
    }[encoder]

    def count(pattern: str) -> int:
        return sum(bool(re.fullmatch(pattern, name)) for name in tensors.names)

    inner, fed = tensors.shape("encoder.block0.ff.fn.net.0.weight", 2)
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "depth": count(r"encoder\.block\d+\.attn\.norm\.weight"),
        "num_heads": tensors.shape(qkv, 2)[0] // (3 * HEAD_DIM),
        "mlp_ratio": inner // fed if inner % fed == 0 else inner / fed,
        "qkv_bias": "encoder.block0.attn.fn.to_qkv.bias" in tensors.names,
        "patch_size": patch,
    }
    if encoder == "st_mem":
        sizes["num_leads"] = count(r"encoder\.lead_embeddings\..*")
    else:
        sizes |= {
            "decoder_embed_dim": tensors.shape("to_decoder_embedding.weight", 2)[0],
            "decoder_depth": count(r"decoder_blocks\.\d+\.attn\.norm\.weight"),
            "decoder_num_heads": tensors.shape("decoder_blocks.0.attn.fn.to_qkv.weight", 2)[0] // (3 * HEAD_DIM),
        }
    usual = {each.name: each.default for each in fields(MaeConfig)} | {"patch_size": PATCHINGS[encoder].size(length)}
    changed = {f"encoder.config.{k}": (v, qkv) for k, v in sizes.items() if v != usual[k]}
    return {"data.segment_len": (length, position), **changed}
