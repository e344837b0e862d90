"""What differs from layer to layer in a Hugging Face configuration, and in ours: one period of each pattern."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from elm_jax.errors import UserError
from elm_jax.models.decoder import DecoderConfig
from elm_jax.models.family import Family
from elm_jax.schema import Key, check

KINDS = ("sliding_attention", "full_attention")
LINEAR = ("linear_attention", "full_attention")
PATTERN, INTERVAL, DENSE, STEP = (
    *("sliding_window_pattern", "full_attention_interval", "mlp_only_layers", "decoder_sparse_step"),
)
SIZE = Key(None, int, "a size", limit="from 1 to 1000000000")


def pattern_fields(family: Family) -> set[str]:
    """Their fields that say what differs from layer to layer."""
    found = {"sliding_window"} if family.windows is not None else set()
    found |= {"layer_types"} if family.windows or family.linear else set()
    found |= {INTERVAL} if family.linear else set()
    return found | ({DENSE, STEP} if family.sparse else set())


def taken_patterns(values: dict[str, Any]) -> dict[str, Any]:
    """What keys of `llm.scratch` say of the patterns, in their fields; these keys leave `values`."""
    names = {"window": "sliding_window", **{name: name for name in (PATTERN, INTERVAL, DENSE, STEP)}}
    return {theirs: values.pop(ours) for ours, theirs in names.items() if ours in values}


def patterns_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The inverse of `with_patterns`."""
    written: dict[str, Any] = {}
    if family.windows is not None:
        windows = config.windows * (config.layers // len(config.windows))
        written["sliding_window"] = next((window for window in windows if window is not None), None)
        written |= {"layer_types": [KINDS[window is None] for window in windows]} if family.windows else {}
    if family.linear:
        has_delta = config.layers_with("delta")
        written["layer_types"] = [LINEAR[n not in has_delta] for n in range(config.layers)]
    if family.sparse:
        written |= {DENSE: list(config.layers_with("mlp")), STEP: 1}
    return written


def with_patterns(ours: DecoderConfig, config: Mapping[str, Any], family: Family, where: str) -> DecoderConfig:
    """With one period of what differs from layer to layer."""
    layers = ours.layers
    if family.linear:
        interval = config.get(INTERVAL, 4)
        check(f"{where}, {INTERVAL}", SIZE, interval)
        kinds = config.get("layer_types") or [LINEAR[(n + 1) % interval == 0] for n in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in LINEAR for kind in kinds):
            raise UserError(where, f"layer_types = {kinds}", f"{layers} times {' or '.join(LINEAR)}", "correct it")
        if LINEAR[1] not in kinds:
            raise UserError(where, f"no layer of {LINEAR[1]}", "one at least", "this variant is not supported")
        ours = replace(ours, linear=_period([kind == LINEAR[0] for kind in kinds]))
    if family.sparse:
        dense, every = config.get(DENSE) or [], config.get(STEP, 1)
        check(f"{where}, {STEP}", SIZE, every)
        check(f"{where}, {DENSE}", Key(None, tuple[int, ...], "numbers of layers", limit="at least 0"), dense)
        ours = replace(ours, sparse=_period([n not in dense and (n + 1) % every == 0 for n in range(layers)]))
    return _windowed(ours, config, family, where)


def _period(of_layers: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest beginning that makes the whole when it is repeated."""
    count = len(of_layers)
    lengths = (n for n in range(1, count + 1) if count % n == 0)
    return next(tuple(of_layers[:n]) for n in lengths if list(of_layers[:n]) * (count // n) == list(of_layers))


def _windowed(ours: DecoderConfig, config: Mapping[str, Any], family: Family, where: str) -> DecoderConfig:
    """With one period of the layers' windows."""
    if (every := family.windows) is None:
        return ours
    window, layers = config.get("sliding_window"), ours.layers
    every = every and config.get(PATTERN, config.get(f"_{PATTERN}", every))
    check(f"{where}, {PATTERN}", Key(None, int, "every which layer sees all", limit="at least 0"), every)
    has_none = [(i + 1) % every == 0 if every else window is None for i in range(layers)]
    kinds = config.get("layer_types") or [KINDS[none] for none in has_none]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        found = f"layer_types = {kinds}"
        raise UserError(where, found, f"{layers} times {' or '.join(KINDS)}", "correct it")
    if KINDS[0] in kinds:
        check(f"{where}, sliding_window", SIZE, window)
    return replace(ours, windows=_period([window if kind == KINDS[0] else None for kind in kinds]))
