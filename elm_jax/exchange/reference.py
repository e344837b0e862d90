"""The reference's `state_dict` of an ECG-language model and our arrays: one table of names, read in both directions.

The reference keeps a model's parts under prefixes that differ between its kinds, wraps the LLM by PEFT where it has
LoRA, cuts vocabulary tables to the rows that the tokenizer uses, and has some tensors under two names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from elm_jax.models.connectors import PREFIXES, RULES
from elm_jax.models.encoders import ENCODERS
from elm_jax.models.families import family_of
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


def published_rules(
    names: Iterable[str], model_type: str, encoder: str | None, connector: str | None
) -> dict[str, Rule]:
    """The weight rule of each array ("llm.norm.scale") under its whole name; those of LoRA are left out.

    Args:
        model_type: the LLM's family; encoder: the encoder's name; connector: the kind of the connector, if any.
    """
    llm = {rule.ours: rule for rule in family_of(model_type).rules}
    bridge = {rule.ours: rule for rule in RULES[connector]} if connector else {}
    rules = {}
    for name in names:
        component, own = name.split(".", 1)
        if component == "encoder" and encoder is not None:
            rules[name] = replace(ENCODERS[encoder].weight_rule(own), ours=name)
        elif not is_lora(name):
            rules[name] = replace(llm[own] if component == "llm" else bridge[own], ours=name)
    return rules


def reference_of(
    leaves: Mapping[str, Leaf], model_type: str, encoder: str | None, connector: str | None, rows: int
) -> Reference:
    """The table of a model of these arrays ("llm.norm.scale"); without those of LoRA, of the model without it.

    Args:
        model_type: the LLM's family; encoder: the encoder's name; connector: the kind of the connector, None where
            ECGs are symbols in the text.
        rows: of the vocabulary tables in the state dict: the reference has exactly `len(tokenizer)`.
    """
    published = published_rules(leaves, model_type, encoder, connector)
    adapted = {name.removesuffix(".lora.a") for name in leaves if name.endswith(".lora.a")}
    before = {
        "llm": ("llm." if connector is None else "llm.llm.") + (PEFT_PREFIX if adapted else ""),
        "encoder": f"encoder.{ENCODERS[encoder].wrapper}" if encoder else "encoder.",
        "connector": PREFIXES[connector] if connector else "",
    }
    rules = {}
    for ours in leaves:
        prefix, module = before[ours.split(".")[0]], ours.rpartition(".")[0]
        if is_lora(ours):
            theirs = _of_adapter(ours, published)
        else:
            theirs = _beneath(published[ours].theirs) if module in adapted else published[ours].theirs
        rules[ours] = Rule(prefix + theirs, ours, is_lora(ours) or published[ours].transpose)
    shapes = {name: _cut(leaf.shape, rules[name], rows) for name, leaf in leaves.items()}
    table = Reference(rules, shapes, {}, ())
    return replace(table, aliases=_aliases(table, before, model_type, encoder), counters=_counters(table))


def _of_adapter(ours: str, published: Mapping[str, Rule]) -> str:
    """The name of an array of LoRA, after that of the kernel that it adapts."""
    module, _, side = ours.rpartition(".lora.")
    return f"{their_module(published[f'{module}.kernel'])}.lora_{side.upper()}.{_ADAPTER}.weight"


def _beneath(theirs: str) -> str:
    """The name of a tensor of a linear layer that PEFT has wrapped."""
    module, _, leaf = theirs.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def _cut(shape: tuple[int, ...], rule: Rule, rows: int) -> tuple[int, ...]:
    if rule.ours not in _VOCABULARY:
        return shape
    return (*shape[:-1], rows) if rule.transpose else (rows, *shape[1:])


def _aliases(table: Reference, before: Mapping[str, str], model_type: str, encoder: str | None) -> dict[str, str]:
    aliases = {}
    if "llm.embedding.table" in table.rules and "llm.head.kernel" not in table.rules:
        aliases[before["llm"] + HEAD] = before["llm"] + family_of(model_type).rules[0].theirs
    if encoder is not None:
        prefix = before["encoder"]
        own = [n.removeprefix(prefix) for ours in table.rules if ours.startswith("encoder.") for n in table.names(ours)]
        aliases |= {prefix + second: prefix + first for second, first in ENCODERS[encoder].aliases(own).items()}
    return aliases


def _counters(table: Reference) -> tuple[str, ...]:
    """PyTorch's batch norms count the batches beside their running statistics."""
    means = (rule.theirs for rule in table.rules.values() if rule.theirs.endswith(_MEAN))
    return tuple(mean.removesuffix(_MEAN) + _COUNT for mean in means)
