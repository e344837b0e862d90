"""What an export says of itself: `elm.json` for programs, the model card (README.md) for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_jax.assemble import DEMO_LLM
from elm_jax.config import DataConfig
from elm_jax.exchange.exported import config_of_export, sizes_of
from elm_jax.folders import json_if_whole
from elm_jax.models.families import ALIASES
from elm_jax.models.views import representation_of
from elm_jax.pictures.page import filled
from elm_jax.run.weights import TrainedWeights
from elm_jax.text.vocabulary import SIGNAL_TOKEN
from elm_jax.weights.peft import spec_of

# Of the models that short names stand for, as the Hugging Face hub names licences: the first start that fits.
_LICENCES = (
    ("meta-llama/Llama-3.2-", "llama3.2"),
    ("Qwen/Qwen2.5-3B", "other"),
    ("Qwen/Qwen", "apache-2.0"),
    ("google/gemma-", "gemma"),
    ("mistralai/Mistral-7B", "apache-2.0"),
    ("microsoft/Phi-", "mit"),
    ("openai-community/gpt2", "mit"),
    ("facebook/opt", "other"),
    ("lmsys/vicuna-", "llama2"),
    ("PharMolix/BioMedGPT-LM-7B", "apache-2.0"),
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A---\n.*?^license:\s*['\"]?([\w.-]+)", re.DOTALL | re.MULTILINE)


def facts_of(weights: TrainedWeights, rows: int, no_template: str) -> dict[str, Any]:
    """What a program must know to ask the model; `rows` is len(tokenizer), `no_template` why it has no template."""
    config, assembly = weights.assembly.config, weights.assembly
    return {
        "elm": config.elm,
        "phase": assembly.text.phase,
        "step": weights.step,
        "llm": config.llm.name,
        "vocabulary": rows,
        **(_encoders(weights) or {"encoder": None}),
        "signal": {
            "token": SIGNAL_TOKEN,
            "token_id": assembly.tokenizer.convert_tokens_to_ids(SIGNAL_TOKEN),
            "tokens_per_ecg": assembly.text.signal_tokens,
            **_signal(config.data),
        },
        "chat": assembly.text.family,
        "system_prompt": assembly.text.system_prompt,
        "explicit_thinking": assembly.text.explicit_thinking,
        "no_chat_template": no_template or None,
        "compat": list(config.compat),
        "config": config_of_export(weights),
    }


def facts_of_encoder(weights: TrainedWeights) -> dict[str, Any]:
    """What a program must know to use an encoder that was pretrained alone."""
    config = weights.assembly.config
    facts = {"objective": config.objective, "step": weights.step, **_encoders(weights), "signal": _signal(config.data)}
    return facts | ({"text": {"tower": config.ssl.text, "max_len": config.data.max_len}} if config.ssl.text else {})


def _encoders(weights: TrainedWeights) -> dict[str, Any]:
    """Name, tokens and sizes of each encoder, and what it is shown, by its part of the model."""
    config, found = weights.assembly.config, {}
    for view in weights.assembly.encoders:
        encoder, sizes = config.encoder_of(view), sizes_of(weights.assembly, view)
        own = {"name": encoder.name, "tokens": encoder.tokens, "config": sizes}
        found[config.part("encoder", view)] = own | {"representation": representation_of(config, view)}
    return found


def _signal(data: DataConfig) -> dict[str, Any]:
    """How a recording becomes what the model is shown."""
    return {
        "representation": data.representation, "leads": list(data.leads), "sampling_rate": data.sampling_rate,
        "segment_len": data.segment_len, "normalize": data.normalize, "norm_eps": data.norm_eps,
        "image_layout": data.image_layout, "image_rhythm": list(data.image_rhythm),
    }  # fmt: skip


def write_card(path: Path, weights: TrainedWeights, facts: Mapping[str, Any], merged: bool) -> None:
    """Write the model card (`templates/card.md`); scores are those of the evaluations in the run's folder."""
    config = weights.assembly.config
    no_base = config.llm.scratch is not None or config.llm.name == DEMO_LLM
    repo = None if no_base else ALIASES.get(config.llm.name, config.llm.name)
    evaluations = {file.parent.name: json_if_whole(file) for file in sorted(weights.folder.glob("eval/*/metrics.json"))}
    text = filled(
        "card.md", config=config, facts=facts, merged=merged, repo=repo, licence=repo and _licence(weights, repo),
        base_model=repo if repo and _HUB_ID.fullmatch(repo) else None,
        began=[Path(one.checkpoint).name for one in config.encoder_parts.values() if one.checkpoint],
        started_from=Path(config.init_from).name if config.init_from else None,
        lora=spec_of(config.llm.lora), step=weights.step, best_loss=weights.meta["history"].get("best_val_loss"),
        evaluations={name: found for name, found in evaluations.items() if found.get("metrics")},
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def _licence(weights: TrainedWeights, repo: str) -> str | None:
    """The licence of the base model: as the card beside its weights says, else as we know it."""
    folder = weights.assembly.llm_folder
    card = folder / "README.md" if folder is not None else None
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None and card.is_file() else ""
    said = _FRONT_MATTER.match(text)
    return said[1] if said else next((name for start, name in _LICENCES if repo.startswith(start)), None)
