"""What a language model family is, as data, and what several of them have in common.

Everything that a `config.json` may say is accounted for here by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elm_jax.models.names import Rule


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    rules: which tensor is which parameter, the embedding table first.
    fields: Hugging Face field -> ours; two fields of theirs for one of ours must agree.
    constants: parts of our configuration that the family decides and its files do not say.
    only: field by field, the values for which this decoder is right (first: the one that is written).
    irrelevant: fields that do not matter then, besides the common ones.
    derived: parts of ours that follow from the others where a file does not say.
    nullable: parts of ours that a file must say, and may say to be null.
    tied: what `tie_word_embeddings` is where a file does not say.
    windows: which layers have a window, where a file has no `layer_types`: all but every so many-th (0: all, where
        `sliding_window` is no null, and no `layer_types` is known). None: no layer has one.
    rope: fields of its rotary positions besides the common ones, with what they are where a file does not say.
    linear: whether some layers have linear attention, by `layer_types` (absent: all but every
        `full_attention_interval`-th).
    sparse: whether layers have experts, by `mlp_only_layers` and `decoder_sparse_step`.
    within: the `model_type` of a model with more parts, whose `text_config` is of this family. Its tensors' names
        begin with the first of `renamed`, where rules have the second; those of other parts with one of `dropped`.
    chat: (a token, the chat form of a model whose tokenizer has it), the first that fits.
    called: (part of a model's name, its chat form), for models whose tokenizer says nothing of it.
    scratch: `llm.scratch` keys of this family, or other defaults than the common ones.
    peft: the modules that PEFT adapts when it is not told.
    buffers: ends of the names of tensors that are no parameters, which old exports saved and nobody reads.
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    fields: Mapping[str, str]
    constants: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    chat: tuple[tuple[str, str], ...]
    called: tuple[tuple[str, str], ...] = ()
    derived: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()
    irrelevant: frozenset[str] = frozenset()
    tied: bool = False
    windows: int | None = None
    linear: bool = False
    sparse: bool = False
    within: str = ""
    renamed: tuple[str, str] = ("", "")
    dropped: tuple[str, ...] = ()
    rope: Mapping[str, Any] = field(default_factory=dict)
    scratch: Mapping[str, Any] = field(default_factory=dict)
    peft: str = "q_proj,v_proj"
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)

    @property
    def rotary(self) -> bool:
        """Whether its positions are rotary (else the constants say so)."""
        return "rope" not in self.constants


def rules(table: Mapping[str, str], biased: str = "", transpose: bool = True) -> tuple[Rule, ...]:
    """Rules of modules: their name -> ours.

    `biased`: our names, after `layers.`, of what has a bias (* of everything). transpose: whether their linear
    layers keep (out, in), as PyTorch's do; GPT-2's keep (in, out).
    """
    found = []
    for theirs, ours in table.items():
        is_table, is_norm = ours in ("embedding", "positions"), ours.endswith("norm")
        leaf = "table" if is_table else "scale" if is_norm else "kernel"
        turned = leaf == "kernel" and (transpose or ours == "head")
        found.append(Rule(f"{theirs}.weight", f"{ours}.{leaf}", turned))
        everything = biased == "*" and not is_table and ours != "head"
        if everything or ours.removeprefix("layers.") in biased.split():
            found.append(Rule(f"{theirs}.bias", f"{ours}.bias"))
    return tuple(found)


def llama_layout(
    norms: tuple[str, ...] = ("attention_norm", "mlp_norm"), biased: str = "", qk_norm: bool = False,
    fused: bool = False,
) -> tuple[Rule, ...]:  # fmt: skip
    """The tensors of Llama and its relatives; `norms` are ours for theirs, in the order of _LLAMA_NORMS."""
    layer, ours = "model.layers.{layer}", "layers"
    heads = {f"{layer}.self_attn.{n}_norm": f"{ours}.attention.{n}_norm" for n in ("qk" if qk_norm else "")}
    table = {
        "model.embed_tokens": "embedding",
        **{f"{layer}.{n}": f"{ours}.{norm}" for n, norm in zip(_LLAMA_NORMS, norms, strict=False)},
        **{f"{layer}.self_attn.{n}_proj": f"{ours}.attention.{n}" for n in (("qkv", "o") if fused else "qkvo")},
        **heads,
        **{f"{layer}.mlp.{n}_proj": f"{ours}.mlp.{n}" for n in (*(["gate_up"] if fused else ["gate", "up"]), "down")},
        "model.norm": "norm",
        "lm_head": "head",
    }
    return rules(table, biased)


_LLAMA_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma's
)
LLAMA_FIELDS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp",
    "max_position_embeddings": "max_len",
    "rms_norm_eps": "norm_eps",
}
