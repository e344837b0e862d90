"""Checkpoints of LLaVA and its heirs PULSE and GEM: how their parts are called, and what their `config.json` adds to
that of the language model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from elm_jax.models.names import Rule

MODEL_TYPES = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}  # -> of the language model
ECG_TOWER, IMAGE_TOWER = "model.ecg_tower.ecg_tower.", "model.vision_tower.vision_tower."
ECG_PROJECTOR, PROJECTOR, NEWLINE = "model.ecg_projector.", "model.mm_projector.", "model.image_newline"
PARTS = ("model.ecg_tower.", "model.vision_tower.", ECG_PROJECTOR, PROJECTOR, NEWLINE)  # beside the language model
_ADDED = ("mm_", "image_", "ecg_", "tune_", "freeze_", "unfreeze_", "use_mm_", "tokenizer_", "vision_", "open_clip_")
# How the names of a part begin in a checkpoint of ours (`exchange.reference`) -> in one of LLaVA's: of a model that has
# an ECG tower beside that of images, and of one that has not.
BOTH = {
    "encoder.ecg.ecg.": ECG_TOWER, "encoder.image.vision_encoder.vision_model.": IMAGE_TOWER,
    "projection.ecg.projection.": ECG_PROJECTOR, "projection.image.projection.": PROJECTOR,
    "projection.image.image_newline": NEWLINE, "llm.llm.": "",
}  # fmt: skip
ALONE = {
    "encoder.vision_encoder.vision_model.": IMAGE_TOWER, "projection.projection.": PROJECTOR,
    "projection.image_newline": NEWLINE, "llm.llm.": "",
}  # fmt: skip


def text_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as that of the language model alone; what is none of LLaVA's, as it is."""
    if str(fields.get("model_type")) not in MODEL_TYPES:
        return dict(fields)
    own = {name: value for name, value in fields.items() if not name.startswith(_ADDED)}
    return own | {"model_type": MODEL_TYPES[fields["model_type"]]}


def is_llava(names: Collection[str]) -> bool:
    """Whether tensors are those of such a checkpoint: it has a projector beside its language model."""
    return f"{PROJECTOR}0.weight" in names


def of_llm(name: str) -> bool:
    """Whether a tensor is the language model's."""
    return not name.startswith(PARTS)


def our_name(name: str, both: bool) -> str:
    """A tensor's name in a checkpoint -> the one in a checkpoint of ours."""
    name = name.replace(f"{IMAGE_TOWER}vision_model.", IMAGE_TOWER)  # as older versions of Transformers had it
    table = (BOTH if both else ALONE).items()
    return next(ours + name.removeprefix(theirs) for ours, theirs in table if name.startswith(theirs))


def their_rule(rule: Rule) -> Rule:
    """The rule of an array with its name in a checkpoint of ours -> with that in LLaVA's."""
    table = (BOTH | ALONE).items()
    ours, theirs = next((ours, theirs) for ours, theirs in table if rule.theirs.startswith(ours))
    return replace(rule, theirs=theirs + rule.theirs.removeprefix(ours))
