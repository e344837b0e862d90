"""GEM and PULSE: what a folder that LLaVA's program has saved says of the model, and such a folder written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_jax.assemble import Assembly
from elm_jax.config import Config
from elm_jax.data.specs import page_size
from elm_jax.errors import UserError
from elm_jax.models.encoders import kind_of
from elm_jax.models.encoders.checkpoints import Tensors
from elm_jax.models.encoders.clip_patches import GRIDS, ClipPatchesConfig
from elm_jax.models.families import to_hf
from elm_jax.weights.encoders import encoder_config
from elm_jax.weights.llava import MODEL_TYPES

_ECG, _PROJECTOR = "encoder.ecg.ecg.", "projection.{view}projection.{number}.weight"
_HEAD = 64  # values of a head of both towers, which no shape tells
_USUAL_EDGE = 336  # of openai/clip-vit-large-patch14-336
_FITS = {"ori": "crop", None: "crop", "square": "crop", "pad": "pad", "anyres": "anyres"}
_FEATURES = {"patch": False, None: False, "cls_patch": True}
_PROJECTORS = {"mm_projector_type": "mlp2x_gelu", "ecg_projector_type": "linear"}  # those that are read


def told_by(where: str, info: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Keys of the configuration and what says so: tensors, by the names that they have with us, or `config.json`.

    Raises UserError for what such a model has and ours has not.
    """
    both = "projection.ecg.projection.weight" in info
    shape, view = Tensors(where, info).shape, "image." if both else ""
    for name, usual in _PROJECTORS.items():
        if (both or name != "ecg_projector_type") and fields.get(name, usual) != usual:
            raise UserError(f"{where}, {name}", str(fields[name]), usual, "this variant is not supported")
    first, second = (_PROJECTOR.format(view=view, number=number) for number in (0, 2))
    image, inner, width = _image(where, info, fields, view), shape(first, 2)[0], shape(second, 2)[0]
    found: dict[str, tuple[Any, str]] = {"elm": ("gem" if both else "mlp_llava", first)}
    if fields.get("model_type") == "llava_llama":
        found["llm.chat"] = ("llava_v1", "model_type")
    found |= {"connector.hidden": (inner, first)} if inner != width else {}
    if not both:
        return found | {f"encoder.{name}": value for name, value in image.items()}
    found |= {"encoders": ({"image": {name: value for name, (value, _) in image.items()}}, first)}
    found |= {"encoder.name": ("ecg_coca", "mm_ecg_tower"), "data.representation": ("signal", "mm_ecg_tower")}
    found |= {"data.sampling_rate": (500, "mm_ecg_tower"), "data.normalize": ("none", "mm_ecg_tower")}
    if f"{_ECG}conv1.weight" not in info:  # its own file is elsewhere: encoder.checkpoint
        return found | {"encoder.tokens": (101, "mm_ecg_tower"), "data.segment_len": (5000, "mm_ecg_tower")}
    (wide, leads, patch), (places, _) = shape(f"{_ECG}conv1.weight", 3), shape(f"{_ECG}positional_embedding", 2)
    sizes = {"num_leads": leads, "patch_size": patch, "width": wide, "heads": max(1, wide // _HEAD),
             "layers": _layers(info, f"{_ECG}transformer.resblocks."), "embed_dim": shape(f"{_ECG}proj", 2)[1],
             "seq_len": (places - 1) * patch}  # fmt: skip
    told = {"encoder.config": sizes, "encoder.tokens": places, "data.segment_len": (places - 1) * patch}
    return found | {key: (value, f"{_ECG}positional_embedding") for key, value in told.items()}


def _image(where: str, info: Mapping[str, Any], fields: Mapping[str, Any], view: str) -> dict[str, tuple[Any, str]]:
    """Of the tower of images: the keys of its encoder."""
    tower, shape = f"encoder.{view}vision_encoder.vision_model.", Tensors(where, info).shape
    how = {"layer": fields.get("mm_vision_select_layer", -2), "merge": fields.get("mm_patch_merge_type", "flat"),
           "class_token": _one_of(where, fields, "mm_vision_select_feature", _FEATURES),
           "fit": _one_of(where, fields, "image_aspect_ratio", _FITS)}  # fmt: skip
    found: dict[str, tuple[Any, str]] = {"name": ("clip_patches", "mm_vision_tower")}
    if f"{tower}embeddings.class_embedding" not in info:
        if how["fit"] == "anyres":
            how["grids"] = _grids(where, fields, _USUAL_EDGE)
        checkpoint = fields.get("mm_vision_tower")
        return found | {"checkpoint": (checkpoint, "mm_vision_tower"), "config": (how, "mm_vision_tower")}
    wide, _, patch, _ = shape(f"{tower}embeddings.patch_embedding.weight", 4)
    places = shape(f"{tower}embeddings.position_embedding.weight", 2)[0]
    sizes = {"hidden_size": wide, "num_attention_heads": max(1, wide // _HEAD), "patch_size": patch,
             "num_hidden_layers": _layers(info, f"{tower}encoder.layers."),
             "intermediate_size": shape(f"{tower}encoder.layers.0.mlp.fc1.weight", 2)[0],
             "image_size": round((places - 1) ** 0.5) * patch}  # fmt: skip
    if how["fit"] == "anyres":
        how["grids"] = _grids(where, fields, sizes["image_size"])
    return found | {"config": (sizes | how, f"{tower}embeddings.patch_embedding.weight")}


def _grids(where: str, fields: Mapping[str, Any], edge: int) -> list[list[int]]:
    """(columns, rows) of the sizes in pixels that tiles of this edge may make."""
    given = fields.get("image_grid_pinpoints") or [[edge * n for n in grid] for grid in GRIDS]
    sound = isinstance(given, list) and all(isinstance(size, list) and len(size) == 2 for size in given)
    if not sound or not all(isinstance(n, int) and n > 0 and n % edge == 0 for size in given for n in size):
        expected = f"pairs of width and height, multiples of {edge}"
        raise UserError(f"{where}, image_grid_pinpoints", str(given)[:80], expected, "correct config.json")
    return [[n // edge for n in size] for size in given]


def places(config: Config) -> dict[str, tuple[Any, str]]:
    """How many tokens an image has, by the size of the pages that the configuration draws."""
    view = "image" if config.elm == "gem" else next(iter(config.views))
    encoder, page = config.encoder_of(view), page_size(config.data, "rgb", config.compat)
    fields = encoder_config("clip_patches", encoder.checkpoint, {**encoder.config, "page": page})
    tokens = len(ClipPatchesConfig.from_fields(fields).order)
    if config.elm != "gem":
        return {"encoder.tokens": (tokens, "config.json")}
    return {"encoders": ({"image": {**config.encoders["image"], "tokens": tokens}}, "config.json")}


def config_json(assembly: Assembly) -> dict[str, Any]:
    """The `config.json` of a LLaVA folder of the model.

    Raises UserError where the model is none that LLaVA's program knows.
    """
    config = assembly.config
    view = "image" if config.elm == "gem" else next(iter(config.views))
    types = {ours: theirs for theirs, ours in MODEL_TYPES.items()}
    known = config.elm in ("gem", "mlp_llava") and config.encoder_of(view).name == "clip_patches"
    if not known or assembly.llm.model_type not in types:
        found = f"elm={config.elm}, encoder {config.encoder_of(view).name}, {assembly.llm.model_type}"
        expected = f"gem, or mlp_llava with clip_patches, before one of {', '.join(types)}"
        raise UserError("--llava", found, expected, "leave --llava out")
    sizes = kind_of("clip_patches").config(assembly.encoders[view])
    if sizes.fit == "whole":
        found, expected = "fit=whole of the encoder of images", "crop, pad or anyres, as LLaVA's program makes images"
        raise UserError("--llava", found, expected, "leave --llava out, or train with one of these")
    told = {
        **to_hf(assembly.llm), "model_type": types[assembly.llm.model_type], "use_mm_proj": True,
        "architectures": [f"Llava{types[assembly.llm.model_type].removeprefix('llava_').title()}ForCausalLM"],
        "mm_vision_tower": config.encoder_of(view).checkpoint, "mm_hidden_size": sizes.hidden_size,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": sizes.read - sizes.num_hidden_layers - 1,
        "mm_vision_select_feature": "cls_patch" if sizes.class_token else "patch", "mm_patch_merge_type": sizes.merge,
        "image_aspect_ratio": {"crop": "ori"}.get(sizes.fit, sizes.fit),
    }  # fmt: skip
    if sizes.fit == "anyres":
        told["image_grid_pinpoints"] = [[n * sizes.image_size for n in grid] for grid in sizes.grids]
    of_ecgs = {"ecg_projector_type": "linear", "mm_ecg_tower": config.encoder.checkpoint}
    return told | (of_ecgs if view == "image" else {})


def write_config(folder: Path, assembly: Assembly, dtype: str) -> None:
    """Write `config_json` into a folder."""
    text = json.dumps({**config_json(assembly), "torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")


def _layers(info: Mapping[str, Any], before: str) -> int:
    return len({name.removeprefix(before).partition(".")[0] for name in info if name.startswith(before)})


def _one_of(where: str, fields: Mapping[str, Any], name: str, known: Mapping[Any, Any]) -> Any:
    if fields.get(name) not in known:
        expected = " or ".join(str(value) for value in known if value)
        raise UserError(f"{where}, {name}", str(fields[name]), expected, "this variant is not supported")
    return known[fields.get(name)]
