"""Typed keys: what a configuration key may hold, how text becomes its value, and its errors in words.

Generic: which keys exist is said by the dataclasses of `elm_jax.config`.
"""

import ast
import json
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from elm_jax.errors import UserError, nearest
from elm_jax.json_text import parse_json

LIMITS: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda v: v >= 0,
    "at least 1": lambda v: v >= 1,
    "at least 2": lambda v: v >= 2,
    "above 0": lambda v: v > 0,
    "from 0 to 4294967295": lambda v: 0 <= v < 2**32,
    "-1 or at least 0": lambda v: v >= -1,
    "-1 or at least 1": lambda v: v == -1 or v >= 1,
    "from 0 to 1": lambda v: 0 <= v <= 1,
    "at least 0 and below 1": lambda v: 0 <= v < 1,
    "above 0 and at most 1": lambda v: 0 < v <= 1,
    "above 0 and at most 100000": lambda v: 0 < v <= 1e5,
    # Of what a file may ask for: far above all that there is, and no memory is asked for what is beyond.
    "from 1 to 10000": lambda v: 1 <= v <= 1e4,
    "from 1 to 100000": lambda v: 1 <= v <= 1e5,
    "from 1 to 10000000": lambda v: 1 <= v <= 1e7,
    "from 1 to 1000000000": lambda v: 1 <= v <= 1e9,
}
WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "None",
}
TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


@dataclass(frozen=True)
class Key:
    """What is known of one key. `choices` and `limit` hold for each item of a list."""

    default: Any
    type: Any
    meaning: str
    choices: Collection[str] = ()
    limit: str = ""  # a name in LIMITS
    accepts: Any = None  # the type that may be written, where it is wider than `type`
    divides: str = ""  # a key beside this one, which this one divides


def key(default: Any, meaning: str, **rules: Any) -> Any:
    """A dataclass field for one key; `rules` are the last four fields of `Key`."""
    metadata = {"meaning": meaning, **rules}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """(dotted name, Key) of each key of a dataclass, in order, and of its sections; other fields are left out."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from walk(hints[f.name], f"{prefix}{f.name}.")
        elif f.metadata:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            yield prefix + f.name, Key(default, hints[f.name], **f.metadata)


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of `cls` from dotted name -> value; every key must be there."""
    hints = get_type_hints(cls)
    parts = {}
    for f in fields(cls):
        name, section = prefix + f.name, is_dataclass(hints[f.name])
        parts[f.name] = build(hints[f.name], values, f"{name}.") if section else values[name]
    return cls(**parts)


def sizes_of(cls: type, where: str, values: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """What `values` say of the keys of a dataclass, checked. UserError, which names `where` and the key, for values
    that these may not have, and for names that are neither keys nor `ignored`."""
    known = dict(walk(cls))
    for name in values:
        if name not in known and name not in ignored:
            fix = nearest(name, known) or "remove it if you know that the same is computed without it"
            raise UserError(f"{where}.{name}", "an unknown field", f"one of {', '.join(known)}", fix)
    found = {name: check(f"{where}.{name}", k, values[name]) for name, k in known.items() if name in values}
    for name, k in known.items():
        own, whole = (found.get(each, known[each].default) for each in (name, k.divides or name))
        if k.divides and whole % own:
            raise UserError(f"{where}.{name}", str(own), f"a divisor of {k.divides}, {whole}", "change one of them")
    return found


def check(where: str, k: Key, value: Any) -> Any:
    """`value` in the key's own type. UserError naming `where` if it is not one that the key may have."""
    default = f"correct it, or leave it out for {to_text(k.default) or 'none'}"
    try:
        value = fit(value, k.accepts or k.type)
    except (TypeError, OverflowError):  # the second: a whole number that no float can hold
        raise UserError(where, shown(value), type_name(k.accepts or k.type), default) from None
    items = value if isinstance(value, tuple) else () if value is None else (value,)
    for item in items:
        if k.choices and item not in k.choices:
            fix = nearest(str(item), k.choices) or default
            raise UserError(where, shown(item), f"one of {', '.join(k.choices)}", fix)
        if k.limit and not LIMITS[k.limit](item):
            raise UserError(where, shown(item), f"{type_name(type(item))} {k.limit}", default)
    names = [item for item in items if isinstance(item, str)]
    if len(set(names)) < len(names):
        raise UserError(where, shown(value), "each item once", "remove the repeated one")
    return value


def fit(value: Any, hint: Any) -> Any:
    """`value` as type `hint`, a whole number counting as a number and a list as a tuple; else TypeError."""
    for option in options(hint):
        kind = get_origin(option) or option
        if kind is tuple and isinstance(value, list | tuple):
            return tuple(fit(item, get_args(option)[0]) for item in value)
        if kind is dict and isinstance(value, Mapping):
            return json.loads(json.dumps(value))  # what a run's config.json will hold; TypeError if it cannot
        if kind is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if type(value) is kind:  # bool is not int here
            return value if kind is not float else _refuse(value)
    return _refuse(value)


def _refuse(value: Any) -> Any:
    raise TypeError(f"{value!r} has the wrong type")


def read(text: str, hint: Any) -> Any:
    """The value of type `hint` that `text` stands for, or `text` itself where it stands for none."""
    for option in sorted(options(hint), key=lambda option: option is not types.NoneType):
        kind = get_origin(option) or option
        if kind is types.NoneType and text in ("None", "none"):
            return None
        if kind is bool and text.lower() in TRUTH:
            return TRUTH[text.lower()]
        if kind is tuple:
            return _read_list(text, get_args(option)[0])
        with suppress(ValueError):
            if kind in (int, float):
                return kind(text)
            if kind is dict and isinstance(value := read_literal(text), dict):
                return value
    return text


def read_literal(text: str) -> Any:
    """JSON or a Python literal; anything else is text."""
    with suppress(ValueError):
        return parse_json(text)
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: of what is nested too deeply
        return ast.literal_eval(text)
    return text


def _read_list(text: str, item: Any) -> Any:
    if text[:1] in ("(", "[") and isinstance(value := read_literal(text), list | tuple):
        return tuple(value)
    parts = [part.strip().strip("'\"") for part in text.strip("()[] ").split(",")]
    return tuple(read(part, item) for part in parts if part)


def to_text(value: Any) -> str:
    """A value as it is written in a flag."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def shown(value: Any) -> str:
    """A value in an error: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def kinds(hint: Any) -> tuple[type, ...]:
    """The plain classes of a type: (dict, NoneType) for `dict[str, Any] | None`."""
    return tuple(get_origin(option) or option for option in options(hint))


def type_name(hint: Any) -> str:
    """A type in words."""
    return " or ".join(
        f"a list (each {type_name(get_args(option)[0])})"
        if get_origin(option) is tuple
        else WORDS.get(option, "a dictionary")
        for option in options(hint)
    )
