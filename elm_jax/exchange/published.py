"""The published tensor behind every array of an ECG-language model, through the tables of its parts."""

from __future__ import annotations

from collections.abc import Iterable

from elm_jax.models.connectors import RULES
from elm_jax.models.encoders import ENCODERS
from elm_jax.models.families import family_of
from elm_jax.models.lora import is_lora
from elm_jax.models.names import Rule


def published_rules(
    names: Iterable[str], model_type: str, encoder: str | None, connector: str | None
) -> dict[str, Rule]:
    """The weight rule of each array ("llm.norm.scale"), named within its component; those of LoRA are left out.

    Args:
        model_type: the LLM's family; encoder: the encoder's name; connector: the kind of the connector, if any.
    """
    llm = {rule.ours: rule for rule in family_of(model_type).rules}
    bridge = {rule.ours: rule for rule in RULES[connector]} if connector else {}
    rules = {}
    for name in names:
        component, own = name.split(".", 1)
        if component == "encoder" and encoder is not None:
            rules[name] = ENCODERS[encoder].weight_rule(own)
        elif not is_lora(name):
            rules[name] = llm[own] if component == "llm" else bridge[own]
    return rules
