"""The reference's `state_dict` of an ECG-language model and our arrays: one table of names, read in both directions.

The reference keeps a model's parts under prefixes that differ between its kinds, wraps the LLM by PEFT where it has
LoRA, cuts vocabulary tables to the rows that the tokenizer uses, and has some tensors under two names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from elm_jax.assemble import Assembly
from elm_jax.models.connectors import PREFIXES, RULES
from elm_jax.models.decoder import DecoderConfig
from elm_jax.models.encoders import kind_of
from elm_jax.models.families import family_of, rules_of
from elm_jax.models.functional import Leaf
from elm_jax.models.lora import is_lora, their_module
from elm_jax.models.names import Rule

HEAD = "lm_head.weight"
PEFT_PREFIX = "base_model.model."  # what PEFT puts before the names of the model that it wraps
_ADAPTER = "default"  # PEFT's name of the adapter, a part of names in a state dict (not in an adapter's own file)
_MEAN, _COUNT = ".running_mean", ".num_batches_tracked"
_VOCABULARY = ("llm.embedding.table", "llm.head.kernel")


@dataclass(frozen=True)
class Reference:
    """What is called what, and has which shape.

    rules: the name of our array ("llm.layers.attention.q.kernel") -> its rule, with their whole name.
    shapes: the name of our array -> its shape where the vocabulary has `rows` rows.
    aliases: a further name of theirs -> the name of the same tensor (the head of a tied model).
    counters: further names of theirs: int64 scalars that count batches, and that nothing reads.
    """

    rules: Mapping[str, Rule]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    counters: tuple[str, ...]

    def names(self, ours: str) -> list[str]:
        """Their names of our array, in the order of the layers where it stacks some."""
        return self.rules[ours].names(self.shapes[ours])

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every name of the state dict with its shape."""
        shapes = {
            theirs: self.rules[ours].their_shape(shape) for ours, shape in self.shapes.items()
            for theirs in self.names(ours)
        }  # fmt: skip
        shapes |= {second: shapes[first] for second, first in self.aliases.items()}
        return shapes | dict.fromkeys(self.counters, ())


@dataclass(frozen=True)
class Kinds:
    """What a model is made of: its LLM (None: encoders alone); by part ("encoder", "encoder.<view>") its encoders and
    connectors."""

    llm: DecoderConfig | None
    encoders: Mapping[str, str]
    connectors: Mapping[str, str]

    @classmethod
    def of(cls, assembly: Assembly) -> Self:
        config = assembly.config
        encoders = assembly.encoder_kinds
        connectors = {config.part("connector", view): str(each.connector) for view, each in config.slots.items()}
        return cls(assembly.llm, encoders, {} if assembly.llm is None else connectors)

    def part_of(self, name: str) -> str:
        """The part that an array is of; its name within that follows a dot."""
        return next((part for part in (*self.encoders, *self.connectors) if name.startswith(f"{part}.")), "llm")

    def before(self, part: str) -> str:
        """What the reference puts before the names of a part, or would, if its models had several views."""
        component, _, view = part.partition(".")
        if part in self.encoders:
            return f"{part}.{kind_of(self.encoders[part]).wrapper}"
        if part in self.connectors:
            return PREFIXES[self.connectors[part]] + (f"{view}." if view else "")
        return f"{component}.llm." if self.connectors else f"{component}."


def published_rules(names: Iterable[str], kinds: Kinds) -> dict[str, Rule]:
    """The weight rule of each array ("llm.norm.scale") under its whole name; those of LoRA are left out."""
    tables = {part: {rule.ours: rule for rule in RULES[kind]} for part, kind in kinds.connectors.items()}
    if kinds.llm:
        tables["llm"] = {rule.ours: rule for rule in rules_of(kinds.llm)}
    rules = {}
    for name in names:
        part = kinds.part_of(name)
        own = name.removeprefix(f"{part}.")
        if part in kinds.encoders:
            rules[name] = replace(kind_of(kinds.encoders[part]).weight_rule(own), ours=name)
        elif not is_lora(name):
            rules[name] = replace(tables[part][own], ours=name)
    return rules


def reference_of(leaves: Mapping[str, Leaf], kinds: Kinds, rows: int) -> Reference:
    """The table of a model of these arrays ("llm.norm.scale"); without those of LoRA, of the model without it.

    `rows`: of the vocabulary tables in the state dict: the reference has exactly `len(tokenizer)`.
    """
    published = published_rules(leaves, kinds)
    adapted = {name.removesuffix(".lora.a") for name in leaves if name.endswith(".lora.a")}
    rules = {}
    for ours in leaves:
        part, module = kinds.part_of(ours), ours.rpartition(".")[0]
        prefix = kinds.before(part) + (PEFT_PREFIX if part == "llm" and adapted else "")
        if is_lora(ours):
            theirs = _of_adapter(ours, published)
        else:
            theirs = _beneath(published[ours].theirs) if module in adapted else published[ours].theirs
        rule = published[_kernel(ours) if is_lora(ours) else ours]
        rules[ours] = replace(rule, theirs=prefix + theirs, ours=ours, transpose=is_lora(ours) or rule.transpose)
    shapes = {name: _cut(leaf.shape, rules[name], rows) for name, leaf in leaves.items()}
    table = Reference(rules, shapes, {}, ())
    return replace(table, aliases=_aliases(table, kinds, PEFT_PREFIX if adapted else ""), counters=_counters(table))


def _of_adapter(ours: str, published: Mapping[str, Rule]) -> str:
    """The name of an array of LoRA, after that of the kernel that it adapts."""
    return f"{their_module(published[_kernel(ours)])}.lora_{ours[-1].upper()}.{_ADAPTER}.weight"


def _kernel(ours: str) -> str:
    """The kernel that an array of LoRA adapts."""
    return f"{ours.rpartition('.lora.')[0]}.kernel"


def _beneath(theirs: str) -> str:
    """The name of a tensor of a linear layer that PEFT has wrapped."""
    module, _, leaf = theirs.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def _cut(shape: tuple[int, ...], rule: Rule, rows: int) -> tuple[int, ...]:
    if rule.ours not in _VOCABULARY:
        return shape
    return (*shape[:-1], rows) if rule.transpose else (rows, *shape[1:])


def _aliases(table: Reference, kinds: Kinds, before: str) -> dict[str, str]:
    """Of the LLM, whose names begin with `before`, its head where it is tied; of encoders what they have twice."""
    aliases, llm = {}, kinds.before("llm") + before
    if kinds.llm and "llm.embedding.table" in table.rules and "llm.head.kernel" not in table.rules:
        aliases[llm + HEAD] = llm + family_of(kinds.llm.model_type).rules[0].theirs
    for part, encoder in kinds.encoders.items():
        prefix, mine = kinds.before(part), [ours for ours in table.rules if ours.startswith(f"{part}.")]
        own = [name.removeprefix(prefix) for ours in mine for name in table.names(ours)]
        aliases |= {prefix + second: prefix + first for second, first in kind_of(encoder).aliases(own).items()}
    return aliases


def _counters(table: Reference) -> tuple[str, ...]:
    """PyTorch's batch norms count the batches beside their running statistics."""
    means = (rule.theirs for rule in table.rules.values() if rule.theirs.endswith(_MEAN))
    return tuple(mean.removesuffix(_MEAN) + _COUNT for mean in means)
