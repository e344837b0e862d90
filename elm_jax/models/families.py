"""Hugging Face's configuration of a model <-> ours, by the table of families (`family_table.py`).

A field that is not known, or has a value that this decoder does not compute, is an error: never a model that runs
but is another one.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from elm_jax.errors import UserError, nearest
from elm_jax.models.decoder import DecoderConfig
from elm_jax.models.delta import DeltaSizes
from elm_jax.models.experts import ExpertSizes
from elm_jax.models.family_table import ALIASES, FAMILIES, Family
from elm_jax.models.layer_patterns import KINDS, SIZE, pattern_fields, patterns_to_hf, taken_patterns, with_patterns
from elm_jax.models.layers import Llama3Scaling, LongScaling, Rope
from elm_jax.models.names import Rule
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
    "rules_of",
    "scratch_config",
    "settled",
    "text_part",
    "to_hf",
]

_log = logging.getLogger(__name__)

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")

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
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
_ROPE_FIELDS = {  # by type
    "default": (),
    "linear": ("factor",),
    "llama3": _LLAMA3_FIELDS,
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
}
_LOCAL, _SHARE = "rope_local_base_freq", "partial_rotary_factor"

_FACTORS = Key(None, tuple[float, ...], "numbers", limit="above 0")
_NUMBER = Key(None, float, "a number", limit="above 0")
_KEYS = {
    **dict.fromkeys(("vocab_size", "hidden", "heads", "max_len"), SIZE),
    "layers": Key(None, int, "how many layers", limit="from 1 to 10000"),
    **dict.fromkeys(("kv_heads", "head_dim", "mlp"), replace(SIZE, type=int | None)),
    "norm_eps": _NUMBER,
    **dict.fromkeys(("query_scalar", "attention_cap", "logit_cap"), replace(_NUMBER, type=float | None)),
    "tied": Key(None, bool, "tied embeddings"),
    "embedding": replace(SIZE, type=int | None),
    "pre_norm": Key(None, bool | None, "norms before the branches"),
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
    config = text_part(config)
    family = family_of(str(config.get("model_type", "")), where)
    _refuse_unknown(config, family, where)
    values = _read_fields(config, family, where)
    values |= {"tied": config.get("tie_word_embeddings", family.tied), "model_type": family.model_type}
    if family.rotary:
        values |= _ropes(config, family, where)
    return with_patterns(_checked(where, {**values, **family.constants}), config, family, where)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model where that of a model with more parts holds one; else `config` itself."""
    inner = config.get("text_config")
    inner = dict(inner) if isinstance(inner, Mapping) else {}
    known = FAMILIES.get(str(inner.get("model_type")))
    if known is None or known.within != config.get("model_type"):
        return config
    return {**inner, "tie_word_embeddings": inner.get("tie_word_embeddings", config.get("tie_word_embeddings", False))}


def rules_of(config: DecoderConfig) -> tuple[Rule, ...]:
    """Which tensor is which parameter of this model: its family's rules but those of parts that no layer has, with the
    numbers of the layers that each stacks where these are not all."""
    found = []
    for rule in FAMILIES[config.model_type].rules:
        numbers = config.layers_with(rule.ours.split(".")[1]) if rule.stacked else ()
        if numbers or not rule.stacked:
            found.append(replace(rule, numbers=numbers) if 0 < len(numbers) < config.layers else rule)
    return tuple(found)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: a `config.json` (in the flat style, which old and new readers take)."""
    family = FAMILIES[config.model_type]
    written = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{theirs: attrgetter(ours)(config) for theirs, ours in family.fields.items()},
        **{name: allowed[0] for name, allowed in family.only.items() if allowed[0] is not None},
        "tie_word_embeddings": config.tied,
    }
    written |= _ropes_to_hf(config, family)
    return written | patterns_to_hf(config, family)


def scratch_config(sizes: Mapping[str, Any], vocab_size: int) -> DecoderConfig:
    """The configuration of a model that is to be trained from nothing, from `llm.scratch`.

    Keys: hidden, layers, heads, mlp; optional family, max_len, tied, norm_eps, and as the family has them kv_heads
    (default: heads), head_dim (hidden / heads), rope_theta, rope_scaling and other rotary fields, those of linear
    attention and of experts by Hugging Face's names, window (of the layers that have one in the family),
    sliding_window_pattern, attention_cap, logit_cap, query_scalar, and for opt pre_norm and embedding (the width of its
    table); vocab_size, where the table is to have more rows than the `vocab_size` that the tokenizer needs. These are
    rounded up as in `extended`. Raises UserError.
    """
    where = "llm.scratch"
    family = family_of(sizes.get("family", _SCRATCH_FAMILY), where)
    own = {name: value for name, value in _SCRATCH_DEFAULTS.items() if name in family.fields.values()}
    rope = {"rope_theta": 10000.0, "rope_scaling": None, **family.rope} if family.rotary else {}
    defaults = {**own, "tied": True, "vocab_size": 0, **rope, **family.scratch}
    known = ("family", *_SCRATCH_REQUIRED, *defaults)
    for name in sizes:
        if name not in known:
            fix = nearest(name, known) or "remove it"
            raise UserError(where, f"'{name}'", f"{', '.join(known)} (of {family.model_type})", fix)
    missing = [name for name in _SCRATCH_REQUIRED if name not in sizes]
    if missing:
        raise UserError(where, f"no {', '.join(missing)}", ", ".join(_SCRATCH_REQUIRED), "give these sizes")
    values = {family.fields.get(name, name): value for name, value in {**defaults, **sizes}.items()}
    values["model_type"] = family.model_type
    if type(values["vocab_size"]) is int:  # otherwise `_checked` says what is wrong
        values["vocab_size"] = _rounded(max(vocab_size, values["vocab_size"]))
    values.pop("family", None)
    if family.rotary:
        said = {name: values.pop(name) for name in rope}
        values |= _ropes({**said, "max_position_embeddings": values["max_len"]}, family, where)
    said = taken_patterns(values)
    return with_patterns(_checked(where, {**values, **family.constants}), said, family, where)


def extended(config: DecoderConfig, needed: int) -> DecoderConfig:
    """`config` with room for `needed` vocabulary rows.

    A table that is large enough stays as it is (published ones are often padded). A larger one is rounded up
    to a multiple of 64, so that it divides over a mesh; like the padding of published tables, its spare rows
    exist and are never targets.
    """
    return config if needed <= config.vocab_size else replace(config, vocab_size=_rounded(needed))


def settled(config: DecoderConfig, longest: int) -> DecoderConfig:
    """`config` for conversations of up to `longest` tokens, whose context is then this one's.

    With LongRoPE the length of a conversation decides how all of its tokens are turned; what is cached, or shared by
    several, cannot wait for that. So a model that is to stay within its original context ends there, and one that is
    to go beyond has the long frequencies from the first token on.
    """
    if config.rope is None or not isinstance(s := config.rope.stretch, LongScaling):
        return config
    if longest <= s.original_max_len:
        return replace(config, max_len=min(config.max_len, s.original_max_len))
    return replace(config, rope=replace(config.rope, stretch=replace(s, short=s.long)))


def chat_family(
    model_type: str, vocabulary: Mapping[str, int], template: str = "", name: str = "", guess: bool = True
) -> str:
    """The chat form of a model, by what its tokenizer can say: a key of CHAT_FORMS, "plain" where none fits.

    `vocabulary` is the tokenizer's token -> id (its `get_vocab()`), `template` its own chat template: marks that are no
    tokens, as Llama 2's, are found there. Where there are none, what is known of models called `name` holds. That, and
    "plain", are guesses, which the log tells.

    Raises:
        UserError: without `guess`, a tokenizer as Llama 2's, which models of many forms share, says no more.
    """
    family = family_of(model_type)
    for mark, form in family.chat:
        if mark in vocabulary or mark in template:
            return form
    named = name.rstrip("/").rpartition("/")[2].lower()
    found = next((form for part, form in family.called if part in named), None)
    if found is None and not guess and {"<s>", "</s>", "▁"} <= vocabulary.keys():
        told = f"None, and no chat template beside the tokenizer of {name or 'llm.name'}, which is of Llama 2's kind"
        forms = "the form of its conversations: llama2, vicuna_v1, llava_v1, mistral, ...; plain for a base model"
        raise UserError("llm.chat", told, forms, "set --config.llm.chat to what it was tuned with")
    found = found or "plain"
    _log.warning("%s: no chat form in its tokenizer; %r is taken (set llm.chat if it is another)", name or "llm", found)
    return found


def _rounded(rows: int) -> int:
    return -(-rows // 64) * 64


def _refuse_unknown(config: Mapping[str, Any], family: Family, where: str) -> None:
    known = {*family.fields, *family.only, "tie_word_embeddings", *_IRRELEVANT, *family.irrelevant}
    known |= {*((*_ROPE, *family.rope) if family.rotary else ()), *pattern_fields(family)}
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
    given: set[str] = set()
    for theirs, ours in family.fields.items():
        value = config.get(theirs)
        if values.get(ours) is not None:
            if value not in (None, values[ours]):
                found, expected = f"{theirs} = {value}", f"{values[ours]}, as the other sizes say"
                raise UserError(where, found, expected, "this variant is not supported")
            continue
        values[ours] = value
        given |= {ours} if (theirs in config if ours in family.nullable else value is not None) else set()
    missing = [theirs for theirs, ours in family.fields.items() if ours not in given | family.derived]
    if missing:
        raise UserError(
            where, f"no {', '.join(missing)}", "these fields", "use the checkpoint's own config.json"
        )
    return values


def _ropes(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Rope]:
    """Both styles: `rope_parameters` (theta inside; of Gemma 3 one for each kind of layer), or `rope_theta` with an
    optional `rope_scaling`, which is of the layers without a window."""
    said = _fields(config.get("rope_parameters") or config.get("rope_scaling") or {}, where)
    said = {name: value for name, value in said.items() if name not in family.irrelevant}
    outside = {"rope_theta": config.get("rope_theta", family.scratch.get("rope_theta", 10000.0))}
    outside |= {_SHARE: config.get(_SHARE, family.rope[_SHARE])} if _SHARE in family.rope else {}
    if _LOCAL not in family.rope:
        return {"rope": _rope({**outside, **said}, config, where, shares=_SHARE in family.rope)}
    local = {"rope_theta": config.get(_LOCAL, family.rope[_LOCAL])}
    if not set(said).isdisjoint(KINDS):
        if extra := sorted(set(said) - set(KINDS)):
            raise UserError(where, f"rope_parameters with {', '.join(extra)}", " and ".join(KINDS), "correct it")
        near, said = (_fields(said.get(kind) or {}, where) for kind in KINDS)
        local |= near
    ropes = {"rope": _rope({**outside, **said}, config, where), "local_rope": _rope(local, config, where)}
    if ropes["local_rope"].stretch != 1.0:
        raise UserError(where, "stretched positions within the window", "none", "this variant is not supported")
    return ropes


def _fields(said: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(said, Mapping):
        fields = "rope_parameters or rope_scaling"
        raise UserError(where, f"{fields} {said!r:.60}", "an object of fields", "correct the rope fields")
    return said


def _rope(said: Mapping[str, Any], config: Mapping[str, Any], where: str, shares: bool = False) -> Rope:
    """One kind of rotary positions of the model of `config`; `said` has its theta and, where it `shares`, the share."""
    spec = dict(said)
    theta, share = spec.pop("rope_theta"), spec.pop(_SHARE) if shares else 1.0
    old_name = spec.pop("type", "default")
    kind = spec.pop("rope_type", old_name)
    kind = "longrope" if kind == "su" else kind  # its first name
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        known = " or ".join(_ROPE_FIELDS)
        raise UserError(where, f"rope type '{kind}'", known, "this variant is not supported")
    spec |= {_ORIGINAL: spec.get(_ORIGINAL, config.get(_ORIGINAL))} if kind == "longrope" else {}
    fields = _ROPE_FIELDS[kind]
    if set(spec) != set(fields):
        found = f"rope '{kind}' with {', '.join(sorted(spec)) or 'no fields'}"
        raise UserError(where, found, ", ".join(fields) or "no further fields", "correct the rope fields")
    for name, value in {"rope_theta": theta, **spec}.items():
        check(f"{where}, {name}", _FACTORS if name in ("short_factor", "long_factor") else _NUMBER, value)
    check(f"{where}, {_SHARE}", Key(None, float, "a share", limit="above 0 and at most 1"), share)
    values = [spec[name] for name in fields]
    if kind == "longrope":
        short, long, original = values
        longest = config.get("max_position_embeddings")
        for name, value in {_ORIGINAL: original, "max_position_embeddings": longest}.items():
            check(f"{where}, {name}", Key(None, int, "a length", limit="at least 2"), value)
        scale = math.sqrt(1 + max(0.0, math.log(longest / original)) / math.log(original))
        stretch = LongScaling(tuple(map(float, short)), tuple(map(float, long)), original, scale)
    elif kind == "llama3":
        factor, low, high, original = values
        stretch = Llama3Scaling(float(factor), float(low), float(high), int(original))
    else:
        stretch = float(values[0]) if kind == "linear" else 1.0
    return Rope(float(theta), stretch, float(share))


def _ropes_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The inverse of `_ropes`, in the flat style."""
    rope, local = config.rope, config.local_rope
    if rope is None:
        return {}
    written: dict[str, Any] = {"rope_theta": rope.theta}
    written |= {_LOCAL: local.theta} if local is not None else {}
    written |= {_SHARE: rope.share} if _SHARE in family.rope else {}
    s = rope.stretch
    if isinstance(s, LongScaling):
        factors = {"short_factor": list(s.short), "long_factor": list(s.long)}
        # The scale says how long the context was before `settled` cut it.
        longest = round(s.original_max_len ** s.scale**2) if s.scale > 1 else config.max_len
        written |= {"max_position_embeddings": longest, _ORIGINAL: s.original_max_len}
        return {**written, "rope_scaling": {"type": "longrope", **factors}}
    if isinstance(s, Llama3Scaling):
        numbers = (s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_len)
        return {**written, "rope_scaling": {"rope_type": "llama3", **dict(zip(_LLAMA3_FIELDS, numbers, strict=True))}}
    return written if s == 1.0 else {**written, "rope_scaling": {"rope_type": "linear", "factor": s}}


def _checked(where: str, values: dict[str, Any]) -> DecoderConfig:
    """A DecoderConfig of these values, its derived sizes filled in, if they are sound and fit each other."""
    for name, k in _KEYS.items():
        check(f"{where}, {name}", k, values.get(name))
    hidden, heads = values["hidden"], values["heads"]
    kv_heads = values["kv_heads"] = values.get("kv_heads") or heads
    values["mlp"] = values["mlp"] or 4 * hidden
    values["embedding"] = values.get("embedding") or hidden
    values["pre_norm"] = values.get("pre_norm") in (None, True)
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
    if (rope := values["rope"]) is not None:
        head_dim, s = values["head_dim"], rope.stretch
        if (turned := int(head_dim * rope.share)) % 2 or not turned:
            found = f"head_dim {head_dim}" + (f", {rope.share:g} of it turned" if rope.share != 1 else "")
            raise UserError(where, found, "an even number", "correct it")
        if isinstance(s, LongScaling) and not len(s.short) == len(s.long) == turned // 2:
            found = f"{len(s.short)} short_factor, {len(s.long)} long_factor"
            raise UserError(where, found, f"{turned // 2} each", "correct the rope fields")
    if "query_scalar" in values and values["query_scalar"] is None:
        values["query_scalar"] = values["head_dim"]
    for name, made in {"delta": DeltaSizes, "experts": ExpertSizes}.items():
        inner = {key.partition(".")[2]: values.pop(key) for key in list(values) if key.startswith(f"{name}.")}
        for key, value in inner.items():
            check(f"{where}, {name} {key}", Key(None, bool, "true or false") if key == "normalised" else SIZE, value)
        values |= {name: made(**inner)} if inner else {}
    if (delta := values.get("delta")) and delta.value_heads % delta.key_heads:
        found = f"{delta.value_heads} value heads, {delta.key_heads} key heads of linear attention"
        raise UserError(where, found, "key heads that divide value heads", "correct them")
    if (experts := values.get("experts")) and experts.chosen > experts.count:
        found = f"{experts.chosen} of {experts.count} experts for a token"
        raise UserError(where, found, "at most all", "correct them")
    return DecoderConfig(**values)
