"""Text towers, against which encoders of ECGs are held: BERT and RoBERTa, and those of CLIP and SigLIP.

Flow: (B, T) token ids -> (B, T, D) -> transformer -> one embedding of the text, (B, W) float32.
Dimension letters: B texts, T tokens, D width, W width of the embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from elm_jax.errors import UserError
from elm_jax.models.encoders.transformer import Transformer, TransformerConfig
from elm_jax.models.encoders.vision import USUAL_LINEARS, USUAL_NORMS
from elm_jax.models.encoders.vision_config import HIDDEN_ACTS
from elm_jax.models.layers import Held, LayerNorm, LearnedPositions, Linear
from elm_jax.models.names import Rule, bare_name
from elm_jax.schema import key, sizes_of

WHERE = "ssl.text"
_size = partial(key, meaning="a size", limit="from 1 to 1000000000")
_id = partial(key, meaning="a token", limit="at least 0")


@dataclass(frozen=True)
class TextConfig:
    """A tower's sizes, by their names in a Hugging Face `config.json`.

    frozen: how many of its first layers are not trained, and with them its embeddings; -1: nothing of it is.
    """

    family: str = key("bert", "which tower", choices=("bert", "roberta", "clip", "siglip"))
    vocab_size: int = _size(30522)
    hidden_size: int = _size(768)
    num_hidden_layers: int = _size(12)
    num_attention_heads: int = _size(12, divides="hidden_size")
    intermediate_size: int = _size(3072)
    max_position_embeddings: int = _size(512)
    type_vocab_size: int = _size(2)
    hidden_act: str = key("gelu", "the activation inside an MLP", choices=tuple(HIDDEN_ACTS))
    layer_norm_eps: float = key(1e-12, "of the norms", limit="above 0")
    pad_token_id: int = _id(0)
    eos_token_id: int = _id(49407)
    projection: int = _size(768)
    frozen: int = key(0, "layers that are not trained; -1 is all of it")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> TextConfig:
        """Read what `fields_of` returns. UserError for values that do not fit."""
        return cls(**sizes_of(cls, WHERE, fields))

    @property
    def longest(self) -> int:
        """Tokens of the longest text; RoBERTa's positions begin behind that of padding."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.family == "roberta" else 0)

    @property
    def of_bert(self) -> bool:
        return self.family in ("bert", "roberta")

    @property
    def stacks(self) -> dict[int, int]:
        """Layers of each stack, by the number of its first one: those that are not trained are one of their own."""
        frozen = min(max(self.frozen, 0), self.num_hidden_layers)
        parts = {0: frozen or self.num_hidden_layers, frozen: self.num_hidden_layers - frozen}
        return {first: depth for first, depth in parts.items() if depth}

    def blocks(self, depth: int) -> TransformerConfig:
        return TransformerConfig(
            self.hidden_size, depth, self.num_attention_heads, self.intermediate_size,
            activation=HIDDEN_ACTS[self.hidden_act], norm_eps=self.layer_norm_eps, post_norm=self.of_bert,
            causal=self.family == "clip",
        )  # fmt: skip


class TextTower(nnx.Module):
    """A tower; `width` is W. What of it is not trained is held as float32, whatever the parameters are.

    pool: "own" as the model itself has it (BERT: the pooler over the first token; CLIP: the last norm at the first end
    of text, projected; SigLIP: the last token through its head); "mean" over the tokens that are no padding.
    """

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32,
        pool: str = "own",
    ) -> None:  # fmt: skip
        self.config, self.dtype, self.pooled_by = config, jnp.dtype(dtype), pool
        size, table = config.hidden_size, partial(LearnedPositions, offset=0, rngs=rngs, param_dtype=param_dtype)
        self.words = table(config.vocab_size, dim=size)
        self.positions = table(config.max_position_embeddings, dim=size)
        self.norm = LayerNorm(size, config.layer_norm_eps, param_dtype)  # of BERT before the layers, else behind them
        if config.of_bert:
            self.types = table(config.type_vocab_size, dim=size)
        stacks = {str(n): Transformer(config.blocks(depth), rngs, param_dtype) for n, depth in config.stacks.items()}
        self.layers = nnx.Dict(stacks)
        self.width = size if pool == "mean" or config.of_bert else config.projection
        if pool == "own":
            with_bias = config.family != "clip"
            self.pool = Linear(size, self.width, ("signal", None), rngs, bias=with_bias, param_dtype=param_dtype)
        if config.frozen < 0:
            _hold(self)
        elif config.frozen:
            first = [self.words, self.positions, self.layers["0"], *([self.types, self.norm] if config.of_bert else [])]
            for module in first:
                _hold(module)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """(B, T) ids, padded with the model's own pad id -> (B, W) float32."""
        x = self.hidden(ids)
        if self.pooled_by == "mean":
            seen = self.seen(ids)[..., None].astype(jnp.float32)
            return (x.astype(jnp.float32) * seen).sum(1) / jnp.maximum(seen.sum(1), 1.0)
        if self.config.family == "clip":
            # Old files say 2, which is no token of theirs: the end of text is then the largest id.
            ends = ids if self.config.eos_token_id == 2 else ids == self.config.eos_token_id
            x = jnp.take_along_axis(x, jnp.argmax(ends, -1)[:, None, None], axis=1)[:, 0]
        else:
            x = x[:, 0] if self.config.of_bert else x[:, -1]
        x = self.pool(x).astype(jnp.float32)
        return jnp.tanh(x) if self.config.of_bert else x

    def seen(self, ids: jax.Array) -> jax.Array:
        """(B, T) bool: what is no padding."""
        return ids != self.config.pad_token_id

    def hidden(self, ids: jax.Array) -> jax.Array:
        """(B, T) ids -> the last hidden states (B, T, D), of CLIP and SigLIP after their norm."""
        x, seen = self.embed(ids), self.seen(ids)
        for first in sorted(self.layers, key=int):
            x = self.layers[first](x, None if self.config.family == "clip" else seen)  # what it sees has no padding
        return x if self.config.of_bert else self.norm(x)

    def embed(self, ids: jax.Array) -> jax.Array:
        """(B, T) ids -> what the layers read, (B, T, D): tokens and their places."""
        seen = self.seen(ids)
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        if self.config.family == "roberta":
            places = jnp.cumsum(seen, -1) * seen + self.config.pad_token_id
        x = self.words(ids, jnp.float32) + self.positions(places, jnp.float32)
        if self.config.of_bert:
            x = self.norm(x + self.types(jnp.zeros_like(ids), jnp.float32))
        return x.astype(self.dtype)


def _hold(module: nnx.Module) -> None:
    """Turn all parameters of `module`, and of the modules in it, into `Held`."""
    for _, inside in nnx.iter_modules(module):
        for name, value in list(vars(inside).items()):
            if isinstance(value, nnx.Param):
                setattr(inside, name, Held(value[...].astype(jnp.float32), axes=value.axes))


@dataclass(frozen=True)
class TextFamily:
    """Towers with the same names of weights, as their own Hugging Face folders have them.

    models: `model_type` of such a tower -> the family in TextConfig. names: our module or array -> theirs. linears,
    norms: those of a layer. layer: a layer's own name. prefixes: what some files put before the names. ignored: how
    names begin, after these prefixes, that are of other parts.
    """

    models: Mapping[str, str]
    names: Mapping[str, str]
    layer: str
    linears: Mapping[str, str]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def fields_of(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What a `config.json` says of the tower, as fields of TextConfig.

        Raises:
            UserError: it is of another kind of model, or of one with a part that these towers have not.
        """
        tower = config if config.get("model_type") in self.models else _inner(config)
        family = self.models.get(str(tower.get("model_type")))
        if family is None:
            found = f"a model of type {config.get('model_type')!r}"
            raise UserError(where, found, f"one of type {' or '.join(self.models)}", "name the folder of such a model")
        for name, allowed in _ONLY.items():
            if tower.get(name, allowed) != allowed:
                raise UserError(f"{where} {name}", repr(tower[name]), repr(allowed), "name the folder of another model")
        told = {**_DEFAULTS[family], **{n: tower[n] for n in _FIELDS if tower.get(n) is not None}}
        projection = tower.get("projection_size", config.get("projection_dim", tower.get("projection_dim")))
        return {**told, "family": family, "projection": projection or told["hidden_size"]}

    def rule(self, ours: str, before: str = "") -> Rule:
        """The rule of our array `ours` of a tower ("words.table"), with what `before` puts before their names."""
        module, _, leaf = ours.rpartition(".")
        if module.startswith("layers."):
            _, first, _, part = module.split(".", 3)
            theirs = f"{before}{self.layer}.{self.linears[part]}.{_LEAVES[leaf]}"
            return Rule(theirs, ours, leaf == "kernel", int(first))
        return Rule(f"{before}{self.names[module]}.{_LEAVES[leaf]}", ours, leaf == "kernel")

    def own_name(self, name: str, pool: str) -> str | None:
        """A name in a folder as `rule` has it; None for what is of another part, or of no use with this `pool`."""
        name = bare_name(name)
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        unused = (*self.ignored, *([self.names["pool"]] if pool == "mean" else []))
        return None if name.startswith(unused) or name.endswith(NO_WEIGHTS) else name


NO_WEIGHTS = ("embeddings.position_ids", "embeddings.token_type_ids")  # tables of numbers, in some files
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "table": "weight"}
_ONLY = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps", "pad_token_id", "eos_token_id",
)  # fmt: skip
_CLIP_SIZES = {"vocab_size": 49408, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
_SIGLIP_SIZES = {"vocab_size": 32000, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
# What a file means where it does not say so.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bert": {"hidden_size": 768},
    "roberta": {"hidden_size": 768, "vocab_size": 50265, "pad_token_id": 1},
    "clip": {
        **_CLIP_SIZES, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    },
    "siglip": {**_SIGLIP_SIZES, "hidden_size": 768, "max_position_embeddings": 64, "eos_token_id": 1},
}  # fmt: skip


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text tower of a model of two; some files leave its `model_type` out."""
    tower = {**(config.get("text_config_dict") or {}), **(config.get("text_config") or {})}
    return {"model_type": f"{config.get('model_type')}_text_model", **tower} if tower else {}


_BERT_LINEARS = {
    **{f"attention.{n[0]}": f"attention.self.{n}" for n in ("query", "key", "value")},
    "attention.o": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}
BERT = TextFamily(
    {"bert": "bert", "roberta": "roberta"},
    {
        "words": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings", "norm": "embeddings.LayerNorm", "pool": "pooler.dense",
    },
    "encoder.layer.{layer}", _BERT_LINEARS, ("bert.", "roberta."), ("cls.", "lm_head.", "classifier.", "qa_outputs."),
)  # fmt: skip
_OF_PAIRS = {
    "words": "text_model.embeddings.token_embedding", "positions": "text_model.embeddings.position_embedding",
    "norm": "text_model.final_layer_norm",
}  # fmt: skip
_USUAL = {**USUAL_LINEARS, **{f"norm{n}": name for n, name in enumerate(USUAL_NORMS, start=1)}}
_OTHERS = ("vision_model.", "visual_projection.", "logit_scale", "logit_bias")
CLIP_TEXT = TextFamily(
    {"clip_text_model": "clip"}, {**_OF_PAIRS, "pool": "text_projection"}, "text_model.encoder.layers.{layer}",
    _USUAL, (), _OTHERS,
)  # fmt: skip
SIGLIP_TEXT = TextFamily(
    {"siglip_text_model": "siglip", "siglip2_text_model": "siglip"}, {**_OF_PAIRS, "pool": "text_model.head"},
    "text_model.encoder.layers.{layer}", _USUAL, (), _OTHERS,
)  # fmt: skip


TEXT = "text."  # before the names of a tower's arrays, in an encoder that is pretrained against it
OwnConfig = TypeVar("OwnConfig")


@dataclass(frozen=True)
class Paired:
    """The text tower that an encoder is pretrained against.

    family: of which names. before: what stands before these in a checkpoint of both. frozen: how many of its layers are
    not trained where nobody says so, as in TextConfig. pool: as TextTower has it.
    """

    family: TextFamily
    before: str = ""
    frozen: int = 0
    pool: str = "own"

    def with_rule(self, of_encoder: Callable[[str], Rule]) -> Callable[[str], Rule]:
        """The rules of an encoder, and of the tower in it, whose arrays are "text.words.table" and so on."""

        def rule(name: str) -> Rule:
            if not name.startswith(TEXT):
                return of_encoder(name)
            return replace(self.family.rule(name.removeprefix(TEXT), self.before), ours=name)

        return rule


def with_text(
    of_encoder: Callable[[Mapping[str, Any]], OwnConfig],
) -> Callable[[Mapping[str, Any]], tuple[OwnConfig, TextConfig]]:
    """How the config of an encoder is read where the fields of its text tower are there too, as `text`."""

    def read(config: Mapping[str, Any]) -> tuple[OwnConfig, TextConfig]:
        own = {name: x for name, x in config.items() if name != "text"}
        return of_encoder(own), TextConfig.from_fields(config.get("text", {}))

    return read
