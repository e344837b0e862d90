"""The language model families as data: configuration fields, weight names, chat forms, names in the registry.

Everything that a Hugging Face `config.json` says is accounted for here by name. A field that is not known, or
has a value that this decoder does not compute, is an error: never a model that runs but is another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from elm_jax.errors import UserError, nearest
from elm_jax.models.decoder import DecoderConfig
from elm_jax.models.layers import Llama3Scaling, Rope
from elm_jax.weights.rules import Rule

# Short names of the checkpoints that the project is used with.
ALIASES: Mapping[str, str] = {
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
}

# Hugging Face field -> ours, for the sizes.
_SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp",
    "max_position_embeddings": "max_len",
}
_DERIVED = ("kv_heads", "head_dim")  # from the others, where a file does not say
_READ = frozenset(
    {*_SIZES, "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
)

# Fields that say nothing about what the model computes from given tokens.
_IRRELEVANT = frozenset(
    {
        *("model_type", "architectures", "transformers_version", "_name_or_path", "_from_model_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    }
)
_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

_SCRATCH_REQUIRED = ("hidden", "layers", "heads", "mlp")
_SCRATCH_DEFAULTS: Mapping[str, Any] = {
    "family": "qwen2",
    "kv_heads": None,
    "head_dim": None,
    "max_len": 2048,
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tied": True,
}


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    constants: parts of our configuration that the family decides and its files do not say.
    only: field by field, the values for which this decoder is right (first: the usual one).
    irrelevant: fields that do not matter then, besides the common ones.
    rules: which tensor is which parameter.
    chat: (a token, the chat form of a model whose tokenizer has it).
    """

    model_type: str
    architecture: str
    constants: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    rules: tuple[Rule, ...]
    chat: tuple[str, str]
    irrelevant: frozenset[str] = frozenset()


def _llama_layout(biased: str) -> tuple[Rule, ...]:
    """The tensors of Llama, and of the families that differ from it by biases of the projections `biased`."""
    theirs, ours = "model.layers.{layer}", "layers"
    attention = [
        Rule(f"{theirs}.self_attn.{n}_proj.weight", f"{ours}.attention.{n}.kernel", True) for n in "qkvo"
    ]
    biases = [Rule(f"{theirs}.self_attn.{n}_proj.bias", f"{ours}.attention.{n}.bias") for n in biased]
    mlp = [
        Rule(f"{theirs}.mlp.{n}_proj.weight", f"{ours}.mlp.{n}.kernel", True) for n in ("gate", "up", "down")
    ]
    return (
        Rule("model.embed_tokens.weight", "embedding.table"),
        Rule(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.scale"),
        *attention,
        *biases,
        Rule(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.scale"),
        *mlp,
        Rule("model.norm.weight", "norm.scale"),
        Rule("lm_head.weight", "head.kernel", True),
    )


_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    constants={"qkv_bias": False},
    only={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0,),
        "pretraining_tp": (1,),
        "layer_types": (None,),
    },
    rules=_llama_layout(biased=""),
    chat=("<|start_header_id|>", "llama3"),
)
_QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    constants={"qkv_bias": True},
    only={
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "use_mrope": (False,),
        "attention_dropout": (0.0,),
        "layer_types": (None, "full_attention"),
    },
    rules=_llama_layout(biased="qkv"),
    chat=("<|im_start|>", "qwen2"),
    irrelevant=frozenset({"sliding_window", "max_window_layers"}),  # of the windows that are switched off
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (_LLAMA, _QWEN2)}


def family_of(model_type: str, where: str = "llm") -> Family:
    """The family called `model_type`; UserError, with the list, if there is none."""
    if model_type not in FAMILIES:
        fix = nearest(str(model_type), FAMILIES) or "use a model of one of these families"
        raise UserError(where, f"model_type '{model_type}'", " or ".join(FAMILIES), fix)
    return FAMILIES[model_type]


def from_hf(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Our configuration of a Hugging Face `config.json`, of either style; `where` names the file in errors.

    Raises UserError for an unknown model type, an unknown or missing field, or a value we do not compute.
    """
    family = family_of(config.get("model_type", ""), where)
    _refuse_unknown(config, family, where)
    sizes = {ours: config.get(theirs) for theirs, ours in _SIZES.items()}
    missing = [theirs for theirs, ours in _SIZES.items() if sizes[ours] is None and ours not in _DERIVED]
    missing += [name for name in ("rms_norm_eps",) if name not in config]
    if missing:
        raise UserError(
            where, f"no {', '.join(missing)}", "these fields", "use the checkpoint's own config.json"
        )
    others = {
        "model_type": family.model_type,
        "norm_eps": config["rms_norm_eps"],
        "rope": _rope(config, where),
        "tied": config.get("tie_word_embeddings", False),
    }
    return _checked(where, {**sizes, **others, **family.constants})


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: a `config.json` (in the flat style, which old and new readers take)."""
    family = FAMILIES[config.model_type]
    written = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        **{name: allowed[0] for name, allowed in family.only.items() if allowed[0] is not None},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope.theta,
    }
    if config.rope.llama3 is not None:
        s = config.rope.llama3
        numbers = (s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_len)
        written["rope_scaling"] = {"rope_type": "llama3", **dict(zip(_LLAMA3_FIELDS, numbers, strict=True))}
    return written


def scratch_config(sizes: Mapping[str, Any], vocab_size: int) -> DecoderConfig:
    """The configuration of a model that is to be trained from nothing, from `llm.scratch`.

    Keys: hidden, layers, heads, mlp; optional kv_heads (default: heads), head_dim (hidden / heads), max_len,
    family, norm_eps, rope_theta, tied. `vocab_size` is rounded up as in `extended`. Raises UserError.
    """
    where, known = "llm.scratch", (*_SCRATCH_REQUIRED, *_SCRATCH_DEFAULTS)
    for name in sizes:
        if name not in known:
            raise UserError(where, f"'{name}'", ", ".join(known), nearest(name, known) or "remove it")
    missing = [name for name in _SCRATCH_REQUIRED if name not in sizes]
    if missing:
        raise UserError(where, f"no {', '.join(missing)}", ", ".join(_SCRATCH_REQUIRED), "give these sizes")
    values = {**_SCRATCH_DEFAULTS, **sizes, "vocab_size": _rounded(vocab_size)}
    family = family_of(values.pop("family"), where)
    rope = _rope({"rope_theta": values.pop("rope_theta")}, where)
    return _checked(where, {**values, "model_type": family.model_type, "rope": rope, **family.constants})


def extended(config: DecoderConfig, needed: int) -> DecoderConfig:
    """`config` with room for `needed` vocabulary rows.

    A table that is large enough stays as it is (published ones are often padded). A larger one is rounded up
    to a multiple of 64, so that it divides over a mesh; like the padding of published tables, its spare rows
    exist and are never targets.
    """
    return config if needed <= config.vocab_size else replace(config, vocab_size=_rounded(needed))


def chat_family(model_type: str, vocabulary: Mapping[str, int]) -> str:
    """The chat form of a model, by what its tokenizer can say: "llama3", "qwen2" or "plain".

    `vocabulary` is the tokenizer's token -> id (its `get_vocab()`).
    """
    token, form = family_of(model_type).chat
    return form if token in vocabulary else "plain"


def _rounded(rows: int) -> int:
    return -(-rows // 64) * 64


def _refuse_unknown(config: Mapping[str, Any], family: Family, where: str) -> None:
    unknown = sorted(set(config) - _READ - _IRRELEVANT - family.irrelevant - set(family.only))
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


def _rope(config: Mapping[str, Any], where: str) -> Rope:
    """Both styles: `rope_parameters` (theta inside), or `rope_theta` with an optional `rope_scaling`."""
    spec = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
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
        if not _is_number(value):
            raise UserError(where, f"{name} = {value!r}", "a number above 0", "correct it")
    if kind == "default":
        return Rope(float(theta))
    factor, low, high, original = (spec[name] for name in fields)
    return Rope(float(theta), Llama3Scaling(float(factor), float(low), float(high), int(original)))


def _checked(where: str, values: dict[str, Any]) -> DecoderConfig:
    """A DecoderConfig of these values, its derived sizes filled in, if they are sound and fit each other."""
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    for name in _SIZES.values():
        if not isinstance(values[name], int) or not _is_number(values[name]):
            if name == "head_dim" and values[name] is None:
                continue
            raise UserError(where, f"{name} = {values[name]!r}", "a whole number above 0", "correct it")
    hidden, heads, kv_heads = values["hidden"], values["heads"], values["kv_heads"]
    if values["head_dim"] is None:
        if hidden % heads:
            raise UserError(
                where, f"hidden {hidden} and {heads} heads", "a multiple of the heads", "give head_dim"
            )
        values["head_dim"] = hidden // heads
    if heads % kv_heads:
        raise UserError(
            where, f"{heads} heads, {kv_heads} kv_heads", "kv_heads that divide heads", "correct them"
        )
    if values["head_dim"] % 2:
        raise UserError(where, f"head_dim {values['head_dim']}", "an even number", "correct it")
    if not _is_number(values["norm_eps"]) or not isinstance(values["tied"], bool):
        found = f"norm eps {values['norm_eps']!r}, tied embeddings {values['tied']!r}"
        raise UserError(where, found, "a number above 0 and true or false", "correct them")
    return DecoderConfig(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
