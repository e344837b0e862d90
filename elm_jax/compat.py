"""Named behaviours of the reference that ours departs from; each is off unless its name is asked for.

`config.compat` and every `compat=` keyword take a tuple of names from BEHAVIOURS or PRESETS.
"""

from collections.abc import Iterable

from elm_jax.errors import UserError, nearest

BEHAVIOURS: dict[str, str] = {
    "clean_answers": "clean answers as user text is cleaned (a leading 'A:' goes, image becomes signal)",
    "truncate_tokens": "truncate by dropping single tokens of the rendered text instead of whole turns",
    "response_by_ids": "find what is supervised by searching the token ids for the response header",
    "special_tokens_in_text": "read special tokens written in a message as special tokens, not as text",
    "skip_zero_signals": "leave the text embedding of <signal> where a signal embedding is exactly zero",
    "dequantize_by_25": "read an ECG-Byte symbol q as q/25 instead of the middle of its bin, (q+0.5)/26",
}

_BOTH = tuple(BEHAVIOURS)

PRESETS: dict[str, tuple[str, ...]] = {
    "elm-2026-04": _BOTH,
    "elm-2026-08": _BOTH,
}


def enabled(name: str, compat: Iterable[str]) -> bool:
    """Whether behaviour `name` is asked for in `compat`, by its own name or through a preset."""
    assert name in BEHAVIOURS, f"{name!r} is not in compat.BEHAVIOURS"
    return any(name == asked or name in PRESETS.get(asked, ()) for asked in compat)


def check(compat: Iterable[str]) -> None:
    """Raise UserError for a name that is neither a behaviour nor a preset."""
    known = [*BEHAVIOURS, *PRESETS]
    for asked in compat:
        if asked not in known:
            fix = nearest(asked, known) or "leave the name out"
            raise UserError("compat", repr(asked), f"names out of {', '.join(known)}", fix)
