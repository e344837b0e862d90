"""What an export says of itself: `elm.json` for programs, the model card (README.md) for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_jax.assemble import DEMO_LLM
from elm_jax.errors import UserError, printable
from elm_jax.folders import read_json
from elm_jax.models.families import ALIASES
from elm_jax.run.weights import TrainedWeights
from elm_jax.text.vocabulary import SIGNAL_TOKEN
from elm_jax.weights.peft import spec_of

FACTS = "elm.json"
# Of the models that short names stand for, as the Hugging Face hub names licences: the first start that fits.
_LICENCES = (
    ("meta-llama/Llama-3.2-", "llama3.2"),
    ("Qwen/Qwen2.5-3B", "other"),
    ("Qwen/Qwen", "apache-2.0"),
    ("google/gemma-2", "gemma"),
    ("openai-community/gpt2", "mit"),
    ("facebook/opt", "other"),
    ("lmsys/vicuna-", "llama2"),
    ("PharMolix/BioMedGPT-LM-7B", "apache-2.0"),
)
_FRONT_MATTER = re.compile(r"\A---\n.*?^license:\s*['\"]?([\w.-]+)", re.DOTALL | re.MULTILINE)

_CARD = """---
{front}
---

# {title}

An ECG-language model: it reads electrocardiograms and answers in text. {kind}, trained with elm_jax.
It is a research model and no medical device.

## Files

| file | what it is |
|---|---|
{files}

## How it was trained

{training}

## Scores

{scores}

## Licence

{licence}
"""


def facts_of(weights: TrainedWeights, rows: int, no_template: str) -> dict[str, Any]:
    """What a program must know to ask the model; `rows` is len(tokenizer), `no_template` why it has no template."""
    config, assembly = weights.config, weights.assembly
    data = config.data
    encoder = None
    if config.encoder.name is not None:
        sizes = {key: value for key, value in assembly.encoder.items() if not isinstance(value, (tuple, set))}
        encoder = {"name": config.encoder.name, "tokens": config.encoder.tokens, "config": sizes}
    return {
        "elm": config.elm,
        "phase": config.phase,
        "step": weights.step,
        "llm": config.llm.name,
        "vocabulary": rows,
        "encoder": encoder,
        "signal": {
            "token": SIGNAL_TOKEN,
            "token_id": assembly.tokenizer.convert_tokens_to_ids(SIGNAL_TOKEN),
            "tokens_per_ecg": assembly.text.signal_tokens,
            "representation": data.representation,
            "leads": list(data.leads),
            "sampling_rate": data.sampling_rate,
            "segment_len": data.segment_len,
            "normalize": data.normalize,
            "norm_eps": data.norm_eps,
        },
        "chat": assembly.text.family,
        "system_prompt": assembly.text.system_prompt,
        "explicit_thinking": assembly.text.explicit_thinking,
        "no_chat_template": no_template or None,
        "compat": list(config.compat),
    }


def write_card(path: Path, weights: TrainedWeights, facts: Mapping[str, Any], merged: bool) -> None:
    """Write the model card; scores are those of the evaluations in the run's folder."""
    config = weights.config
    base = None if config.llm.scratch is not None or config.llm.name == DEMO_LLM else config.llm.name
    repo = ALIASES.get(str(base), str(base))
    licence = _licence(weights, repo) if base else None
    front = {
        "license": licence or "other",
        **({"base_model": repo} if base and re.fullmatch(r"[\w.-]+/[\w.-]+", repo) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": json.dumps(["ecg", "ecg-language-model", "elm_jax", config.elm]),
    }
    title = f"{config.elm} · {repo if base else 'a language model from nothing'}"
    title += f" · {config.encoder.name}" if config.encoder.name else ""
    text = _CARD.format(
        front="\n".join(f"{key}: {value}" for key, value in front.items()), title=title, kind=config.view.meaning,
        files="\n".join(f"| `{name}` | {what} |" for name, what in _files(weights, facts, merged)),
        training=_training(weights), scores=_scores(weights), licence=_terms(weights, base, repo, licence),
    )  # fmt: skip
    path.write_text(printable(text, "\n"), encoding="utf-8")


def _licence(weights: TrainedWeights, repo: str) -> str | None:
    """The licence of the base model: as the card beside its weights says, else as we know it."""
    folder = weights.assembly.llm_folder
    card = folder / "README.md" if folder is not None else None
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None and card.is_file() else ""
    said = _FRONT_MATTER.match(text)
    return said[1] if said else next((name for start, name in _LICENCES if repo.startswith(start)), None)


def _files(weights: TrainedWeights, facts: Mapping[str, Any], merged: bool) -> list[tuple[str, str]]:
    config = weights.config
    adapted = spec_of(config.llm.lora) is not None
    state = " with the LoRA adapter merged into it" if merged else ", without the adapter" if adapted else ""
    told = f"the language model{state}, for `AutoModelForCausalLM.from_pretrained`, and its tokenizer"
    missing = facts["no_chat_template"]
    files = [("llm/", f"{told}; no chat template, for {missing}" if missing else told)]
    if adapted and not merged:
        files.append(("adapter/", "the LoRA adapter, for `PeftModel.from_pretrained`"))
    if facts["encoder"] is not None:
        files.append(("encoder.safetensors", f"the ECG encoder ({config.encoder.name})"))
    if config.view.connector is not None:
        files.append(("connector.safetensors", "from the ECG's features to the language model's inputs"))
    else:
        files.append(("ecg_byte.json", "the ECG tokenizer"))
    files.append(("elm.json", "how ECGs and prompts are prepared"))
    files.append(("elm.pt, encoder.pt", "checkpoints for ELM-Research/ELM, where PyTorch was there to write them"))
    return files


def _training(weights: TrainedWeights) -> str:
    config, data, lora = weights.config, weights.config.data, spec_of(weights.config.llm.lora)
    counted = "conversations" if config.train.conversations else "rows"
    lines = [
        ("data", ", ".join(data.names)),
        ("ECGs", f"{len(data.leads)} leads, {data.segment_len} samples at {data.sampling_rate:g} Hz, {data.normalize}"),
        ("phase", config.phase),
        ("trained", ", ".join(config.update) or "nothing"),
        ("steps", f"{weights.step} of {config.train.count} {counted}"),
        ("optimizer", f"{config.optim.name}, learning rate {config.optim.lr:g}, {config.optim.schedule}"),
        ("computed in", config.llm.compute_dtype),
        ("seed", str(config.seed)),
    ]
    if lora is not None:
        lines.append(("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, {lora.targets}"))
    if config.init_from is not None:
        lines.append(("started from", Path(config.init_from).name))
    loss = weights.meta["history"].get("best_val_loss")
    if loss is not None:
        lines.append(("best validation loss", f"{loss:.4f}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in lines)


def _scores(weights: TrainedWeights) -> str:
    """The evaluations' scores, each beside its controls."""
    tables = []
    for path in sorted(weights.folder.glob("eval/*/metrics.json")):
        found = _read_metrics(path)
        if found is not None:
            tables.append(f"On `{path.parent.name}`{_table(found)}")
    return "\n\n".join(tables) or "The run was not evaluated."


def _read_metrics(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except UserError:  # an evaluation that is being written
        return None
    return found if found.get("metrics") else None


def _table(found: Mapping[str, Any]) -> str:
    controls = found.get("controls", {})
    head = ["metric", "score (95 % interval)", *controls]
    lines = [head, ["---"] * len(head)]
    for metric, score in found["metrics"].items():
        low, high = score["ci95"]
        others = [controls[name].get(metric, {}).get("value") for name in controls]
        cells = ["" if value is None else f"{value:.3f}" for value in others]
        lines.append([metric, f"{score['value']:.3f} ({low:.3f} to {high:.3f})", *cells])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    asked = f", {found['n']} questions" if "n" in found else ""
    at = f", at step {found['step']}" if "step" in found else ""
    told = "\n\nThe columns after the score: the same questions with this in place of the ECG." if controls else ""
    return f"{asked}{at}:\n\n{table}{told}{_dependence(found.get('signal_dependence'))}"


def _dependence(found: Mapping[str, Any] | None) -> str:
    """How much better the answers are for the ECG's sake, where that was measured."""
    if not found:
        return ""
    low, high = found["ci95"]
    value = f"{found['value']:.3f} ({low:.3f} to {high:.3f})"
    return f" With its own ECG rather than another's, an answer is right more often by {value}, p = {found['p']:.2g}."


def _terms(weights: TrainedWeights, base: str | None, repo: str, licence: str | None) -> str:
    terms = []
    if base:
        known = f" ({licence})" if licence and licence != "other" else ""
        terms.append(f"The language model is derived from {repo}: its licence{known} holds for this one too.")
    if weights.config.encoder.checkpoint is not None:
        name = Path(str(weights.config.encoder.checkpoint)).name
        terms.append(f"The encoder began from `{name}`: the terms of those weights hold for it.")
    terms.append("The terms of the training data hold too; some forbid passing on what was derived from them.")
    return " ".join(terms)


