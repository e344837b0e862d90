"""Hugging Face's configuration of a model <-> ours, by the table of families (`family_table.py`).

A field that is not known, or has a value that this decoder does not compute, is an error: never a model that runs
but is another one.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from elm_jax.errors import UserError, nearest
from elm_jax.models.decoder import DecoderConfig
from elm_jax.models.family_table import ALIASES, FAMILIES, Family
from elm_jax.models.layers import Llama3Scaling, Rope
from elm_jax.schema import Key, check

__all__ = [
    "ALIASES",
    "FAMILIES",
    "Family",
    "chat_family",
    "extended",
    "family_of",
    "from_hf",
    "nearest_model",
    "scratch_config",
    "to_hf",
]

_log = logging.getLogger(__name__)

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_WINDOWS = ("sliding_window", "layer_types")
_KINDS = ("sliding_attention", "full_attention")

# Fields that say nothing about what the model computes from given tokens.
_IRRELEVANT = frozenset(
    {
        *("model_type", "architectures", "transformers_version", "_name_or_path", "_from_model_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing"),
        # Of generation, from the time when these were kept in the same file.
        *("max_length", "do_sample", "temperature", "top_p", "prefix", "task_specific_params"),
    }
)
_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

_SIZE, _NUMBER = Key(None, int, "a size", limit="from 1 to 1000000000"), Key(None, float, "a number", limit="above 0")
_KEYS = {
    **dict.fromkeys(("vocab_size", "hidden", "heads", "max_len"), _SIZE),
    "layers": Key(None, int, "how many layers", limit="from 1 to 10000"),
    **dict.fromkeys(("kv_heads", "head_dim", "mlp"), replace(_SIZE, type=int | None)),
    "norm_eps": _NUMBER,
    **dict.fromkeys(("query_scalar", "attention_cap", "logit_cap"), replace(_NUMBER, type=float | None)),
    "tied": Key(None, bool, "tied embeddings"),
}

_SCRATCH_REQUIRED = ("hidden", "layers", "heads", "mlp")
_SCRATCH_FAMILY = "qwen2"
_SCRATCH_DEFAULTS: Mapping[str, Any] = {"kv_heads": None, "head_dim": None, "max_len": 2048, "norm_eps": 1e-6}


def family_of(model_type: str, where: str = "llm") -> Family:
    """The family called `model_type`; UserError, with the list, if there is none."""
    if model_type not in FAMILIES:
        fix = nearest_model(str(model_type), FAMILIES) or "use one of these families: no other is supported yet"
        raise UserError(where, f"model_type '{model_type}'", " or ".join(FAMILIES), fix)
    return FAMILIES[model_type]


def nearest_model(name: str, choices: Iterable[str]) -> str:
    """`nearest` of those with the numbers that `name` has, if any: other numbers are another model, no slip."""
    numbers = re.sub(r"\D", "", name)
    return nearest(name, [choice for choice in choices if numbers in ("", re.sub(r"\D", "", choice))])


def from_hf(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Our configuration of a Hugging Face `config.json`, of either style; `where` names the file in errors.

    Raises UserError for an unknown model type, an unknown or missing field, or a value we do not compute.
    """
    family = family_of(str(config.get("model_type", "")), where)
    _refuse_unknown(config, family, where)
    values = _read_fields(config, family, where)
    values |= {"tied": config.get("tie_word_embeddings", family.tied), "model_type": family.model_type}
    if family.rotary:
        values["rope"] = _rope(config, where)
    ours = _checked(where, {**values, **family.constants})
    return replace(ours, windows=_windows(config, where, ours.layers)) if family.windows else ours


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: a `config.json` (in the flat style, which old and new readers take)."""
    family = FAMILIES[config.model_type]
    written = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{theirs: getattr(config, ours) for theirs, ours in family.fields.items()},
        **{name: allowed[0] for name, allowed in family.only.items() if allowed[0] is not None},
        "tie_word_embeddings": config.tied,
    }
    if config.rope is not None:
        written["rope_theta"] = config.rope.theta
    if config.rope is not None and config.rope.llama3 is not None:
        s = config.rope.llama3
        numbers = (s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_len)
        written["rope_scaling"] = {"rope_type": "llama3", **dict(zip(_LLAMA3_FIELDS, numbers, strict=True))}
    if family.windows:
        windows = config.windows * (config.layers // len(config.windows))
        written["sliding_window"] = next((window for window in windows if window is not None), None)
        written["layer_types"] = [_KINDS[window is None] for window in windows]
    return written


def scratch_config(sizes: Mapping[str, Any], vocab_size: int) -> DecoderConfig:
    """The configuration of a model that is to be trained from nothing, from `llm.scratch`.

    Keys: hidden, layers, heads, mlp; optional family, max_len, tied, norm_eps, and as the family has them kv_heads
    (default: heads), head_dim (hidden / heads), rope_theta, and for gemma2 window (of every other layer),
    attention_cap, logit_cap, query_scalar; vocab_size, where the table is to have more rows than the `vocab_size` that
    the tokenizer needs. These are rounded up as in `extended`. Raises UserError.
    """
    where = "llm.scratch"
    family = family_of(sizes.get("family", _SCRATCH_FAMILY), where)
    own = {name: value for name, value in _SCRATCH_DEFAULTS.items() if name in family.fields.values()}
    rope = {"rope_theta": 10000.0} if family.rotary else {}
    defaults = {**own, "tied": True, "vocab_size": 0, **rope, **family.scratch}
    known = ("family", *_SCRATCH_REQUIRED, *defaults)
    for name in sizes:
        if name not in known:
            fix = nearest(name, known) or "remove it"
            raise UserError(where, f"'{name}'", f"{', '.join(known)} (of {family.model_type})", fix)
    missing = [name for name in _SCRATCH_REQUIRED if name not in sizes]
    if missing:
        raise UserError(where, f"no {', '.join(missing)}", ", ".join(_SCRATCH_REQUIRED), "give these sizes")
    values = {**defaults, **sizes, "model_type": family.model_type}
    if type(values["vocab_size"]) is int:  # otherwise `_checked` says what is wrong
        values["vocab_size"] = _rounded(max(vocab_size, values["vocab_size"]))
    values.pop("family", None)
    if family.rotary:
        values["rope"] = _rope({"rope_theta": values.pop("rope_theta")}, where)
    window = values.pop("window", None)
    ours = _checked(where, {**values, **family.constants})
    return replace(ours, windows=_windows({"sliding_window": window}, where, ours.layers)) if family.windows else ours


def extended(config: DecoderConfig, needed: int) -> DecoderConfig:
    """`config` with room for `needed` vocabulary rows.

    A table that is large enough stays as it is (published ones are often padded). A larger one is rounded up
    to a multiple of 64, so that it divides over a mesh; like the padding of published tables, its spare rows
    exist and are never targets.
    """
    return config if needed <= config.vocab_size else replace(config, vocab_size=_rounded(needed))


def chat_family(model_type: str, vocabulary: Mapping[str, int], template: str = "", name: str = "") -> str:
    """The chat form of a model, by what its tokenizer can say: a key of CHAT_FORMS, "plain" where none fits.

    `vocabulary` is the tokenizer's token -> id (its `get_vocab()`), `template` its own chat template: marks that are no
    tokens, as Llama 2's, are found there. Where there are none, what is known of models called `name` holds. That, and
    "plain", are guesses, which the log tells.
    """
    family = family_of(model_type)
    for mark, form in family.chat:
        if mark in vocabulary or mark in template:
            return form
    named = name.rstrip("/").rpartition("/")[2].lower()
    guess = next((form for part, form in family.called if part in named), "plain")
    _log.warning("%s: no chat form in its tokenizer; %r is taken (set llm.chat if it is another)", name or "llm", guess)
    return guess


def _rounded(rows: int) -> int:
    return -(-rows // 64) * 64


def _refuse_unknown(config: Mapping[str, Any], family: Family, where: str) -> None:
    known = {*family.fields, *family.only, "tie_word_embeddings", *_IRRELEVANT, *family.irrelevant}
    known |= {*(_ROPE if family.rotary else ()), *(_WINDOWS if family.windows else ())}
    unknown = sorted(set(config) - known)
    if unknown:
        found, expected = f"unknown field {', '.join(unknown)}", f"only known fields of {family.model_type}"
        raise UserError(
            where, found, expected, "delete it if you know that the model computes the same without it"
        )
    for name, allowed in family.only.items():
        value = config.get(name, allowed[0])
        for each in value if isinstance(value, list) else [value]:
            if each not in allowed:
                expected = " or ".join(str(option) for option in allowed)
                raise UserError(where, f"{name} = {each}", expected, "this variant is not supported")


def _read_fields(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Our values of the family's fields; those that are derived may be None."""
    values: dict[str, Any] = {}
    missing = []
    for theirs, ours in family.fields.items():
        value = config.get(theirs)
        if ours in values:
            if value not in (None, values[ours]):
                found, expected = f"{theirs} = {value}", f"{values[ours]}, as the other sizes say"
                raise UserError(where, found, expected, "this variant is not supported")
            continue
        values[ours] = value
        given = theirs in config if ours in family.nullable else value is not None
        missing += [] if given or ours in family.derived else [theirs]
    if missing:
        raise UserError(
            where, f"no {', '.join(missing)}", "these fields", "use the checkpoint's own config.json"
        )
    return values


def _windows(config: Mapping[str, Any], where: str, layers: int) -> tuple[int | None, ...]:
    """One period of the layers' windows; without `layer_types` every other layer has one, from the first."""
    kinds = config.get("layer_types") or [_KINDS[i % 2] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _KINDS for kind in kinds):
        found = f"layer_types = {kinds}"
        raise UserError(where, found, f"{layers} times {' or '.join(_KINDS)}", "correct it")
    window = config.get("sliding_window")
    if _KINDS[0] in kinds:
        check(f"{where}, sliding_window", _SIZE, window)
    windows = tuple(window if kind == _KINDS[0] else None for kind in kinds)
    periods = (n for n in range(1, layers + 1) if layers % n == 0)
    return next(windows[:n] for n in periods if windows[:n] * (layers // n) == windows)


def _rope(config: Mapping[str, Any], where: str) -> Rope:
    """Both styles: `rope_parameters` (theta inside), or `rope_theta` with an optional `rope_scaling`."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        fields = "rope_parameters or rope_scaling"
        raise UserError(where, f"{fields} {said!r:.60}", "an object of fields", "correct the rope fields")
    spec = dict(said)
    theta = spec.pop("rope_theta", config.get("rope_theta", 10000.0))
    old_name = spec.pop("type", "default")
    kind = spec.pop("rope_type", old_name)
    if kind not in ("default", "llama3"):
        raise UserError(where, f"rope type '{kind}'", "default or llama3", "this variant is not supported")
    fields = _LLAMA3_FIELDS if kind == "llama3" else ()
    if set(spec) != set(fields):
        found = f"rope '{kind}' with {', '.join(sorted(spec)) or 'no fields'}"
        raise UserError(where, found, ", ".join(fields) or "no further fields", "correct the rope fields")
    for name, value in {"rope_theta": theta, **spec}.items():
        check(f"{where}, {name}", _NUMBER, value)
    if kind == "default":
        return Rope(float(theta))
    factor, low, high, original = (spec[name] for name in fields)
    return Rope(float(theta), Llama3Scaling(float(factor), float(low), float(high), int(original)))


def _checked(where: str, values: dict[str, Any]) -> DecoderConfig:
    """A DecoderConfig of these values, its derived sizes filled in, if they are sound and fit each other."""
    for name, k in _KEYS.items():
        check(f"{where}, {name}", k, values.get(name))
    hidden, heads = values["hidden"], values["heads"]
    kv_heads = values["kv_heads"] = values.get("kv_heads") or heads
    values["mlp"] = values["mlp"] or 4 * hidden
    if not values.get("head_dim"):
        if hidden % heads:
            raise UserError(
                where, f"hidden {hidden} and {heads} heads", "a multiple of the heads", "give head_dim"
            )
        values["head_dim"] = hidden // heads
    if heads % kv_heads:
        raise UserError(
            where, f"{heads} heads, {kv_heads} kv_heads", "kv_heads that divide heads", "correct them"
        )
    if values["head_dim"] % 2 and values["rope"] is not None:
        raise UserError(where, f"head_dim {values['head_dim']}", "an even number", "correct it")
    if "query_scalar" in values and values["query_scalar"] is None:
        values["query_scalar"] = values["head_dim"]
    return DecoderConfig(**values)
