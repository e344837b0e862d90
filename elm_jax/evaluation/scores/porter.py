"""The Porter stemmer in the variant that NLTK has by default, which ROUGE and METEOR are published with.

M. F. Porter, "An algorithm for suffix stripping", 1980, with NLTK's departures: words of one or two letters stay,
some irregular forms are looked up, "flies" and "dies" differ, and `y` becomes `i` behind any consonant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

_VOWELS = frozenset("aeiou")
_IRREGULAR = {
    form: stem
    for stem, forms in {
        "sky": ("sky", "skies"), "die": ("dying",), "lie": ("lying",), "tie": ("tying",), "news": ("news",),
        "inning": ("innings", "inning"), "outing": ("outings", "outing"), "canning": ("cannings", "canning"),
        "howe": ("howe",), "proceed": ("proceed",), "exceed": ("exceed",), "succeed": ("succeed",),
    }.items()
    for form in forms
}  # fmt: skip

Condition = Callable[[str], bool]
Rule = tuple[str, str, Condition]  # suffix, what replaces it, and what the stem before it must be


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of one word, in lower case."""
    word = word.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _y, _second, _third, _fourth, _final_e, _double_l):
        word = step(word)
    return word


def _is_consonant(word: str, i: int) -> bool:
    if word[i] == "y":
        return i == 0 or not _is_consonant(word, i - 1)
    return word[i] not in _VOWELS


def _measure(word: str) -> int:
    """How many runs of vowels are followed by consonants."""
    shape = [_is_consonant(word, i) for i in range(len(word))]
    return sum(after and not before for before, after in zip(shape, shape[1:], strict=False))


def _long(word: str) -> bool:
    return _measure(word) > 0


def _longer(word: str) -> bool:
    return _measure(word) > 1


def _any(_: str) -> bool:
    return True


def _has_vowel(word: str) -> bool:
    return any(not _is_consonant(word, i) for i in range(len(word)))


def _is_short(word: str) -> bool:
    """Whether the word ends as "hop" does: consonant, vowel, consonant other than w, x, y."""
    n = len(word)
    if n == 2:
        return not _is_consonant(word, 0) and _is_consonant(word, 1)
    closed = n >= 3 and _is_consonant(word, n - 3) and not _is_consonant(word, n - 2) and _is_consonant(word, n - 1)
    return closed and word[-1] not in "wxy"


def _apply(word: str, rules: Sequence[Rule]) -> str:
    """The word after the first rule whose suffix it has; as it is where that rule's condition fails."""
    for suffix, replacement, condition in rules:
        if word.endswith(suffix):
            base = word[: len(word) - len(suffix)]
            return base + replacement if condition(base) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    return _apply(word, [("sses", "ss", _any), ("ies", "i", _any), ("ss", "ss", _any), ("s", "", _any)])


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _long(word[:-3]) else word
    for suffix in ("ed", "ing"):
        base = word[: -len(suffix)]
        if word.endswith(suffix) and _has_vowel(base):
            return _mended(base)
    return word


def _mended(base: str) -> str:
    """What "-ed" and "-ing" leave, as the word it stands for: conflat -> conflate, hopp -> hop, fil -> file."""
    for suffix in ("at", "bl", "iz"):
        if base.endswith(suffix):
            return base + "e"
    if len(base) >= 2 and base[-1] == base[-2] and _is_consonant(base, len(base) - 1):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _is_short(base) else base


def _y(word: str) -> str:
    return _apply(word, [("y", "i", lambda base: len(base) > 1 and _is_consonant(base, len(base) - 1))])


_SECOND: tuple[Rule, ...] = tuple(
    (suffix, replacement, _long)
    for suffix, replacement in (
        ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
        ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
        ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"),
        ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
    )
)  # fmt: skip


def _second(word: str) -> str:
    if word.endswith("alli") and _long(word[:-4]):
        return _second(word[:-2])
    # Of "logi" the l belongs to what is measured.
    return _apply(word, [*_SECOND, ("logi", "log", lambda base: _long(base + "l"))])


_THIRD: tuple[Rule, ...] = tuple(
    (suffix, replacement, _long)
    for suffix, replacement in (
        ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
    )
)  # fmt: skip


def _third(word: str) -> str:
    return _apply(word, _THIRD)


_FOURTH: tuple[Rule, ...] = (
    *((s, "", _longer) for s in ("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent")),
    ("ion", "", lambda base: _longer(base) and base[-1] in "st"),
    *((s, "", _longer) for s in ("ou", "ism", "ate", "iti", "ous", "ive", "ize")),
)


def _fourth(word: str) -> str:
    return _apply(word, _FOURTH)


def _final_e(word: str) -> str:
    base = word[:-1]
    goes = word.endswith("e") and (_longer(base) or (_measure(base) == 1 and not _is_short(base)))
    return base if goes else word


def _double_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _longer(word[:-1]) else word
