"""Numbers with their units in an English text, in digits or words, alone, as ranges or as bounds."""

import re
from dataclasses import dataclass
from math import inf

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen " \
    "seventeen eighteen nineteen"  # fmt: skip
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = {word: n for n, word in enumerate(_ONES.split())}
_NUMBERS |= {word: 10 * n for n, word in enumerate(_TENS.split(), 2)}
_WORD = "|".join(sorted((*_NUMBERS, "hundred"), key=len, reverse=True))
_SPELLED = re.compile(rf"\b(?:{_WORD})\b(?:(?:[ -]|\s+and\s+)(?:{_WORD})\b)*(?:\s+point(?:\s+(?:{_WORD})\b)+)?", re.I)
_FIRST = re.compile(r"\b(?:half an?|half)\b(?=\s+(?:mm|milli))", re.I)
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "‑": "-", "≤": "<", "≥": ">", "µ": "u", "μ": "u", "′": "'", "’": "'", "*": " "}
)
_NO_VALUE = re.compile(  # what stands behind a letter and ms but is no measurement: where ST is measured
    r"\bJ\s*(?:[- ]point)?\s*(?:\+|plus)\s*\d+\s*(?:ms|milliseconds)?|"
    r"\b\d+\s*ms (?:after|behind|past|from) (?:the )?J\b|"
    r"\b\d+(?:\.\d+)?\s*mm\s*(?:/|per)\s*\w+|\b\d+(?:\.\d+)?\s*hz\b|\b\d+[- ]leads?\b", re.I
)  # fmt: skip
# What is usual, in parentheses behind what is measured: "(normal: 120-200 ms)".
_USUAL = re.compile(
    r"\((?:normal|reference|ref|usual)(?: (?:range|values?|limits?|interval))?[\s:=]*(?:is|of|between|from)?\s*[<>]?"
    r"\s*\d[^()]*\)", re.I
)  # fmt: skip
_COMMA = re.compile(r"(?<=\d),(?=\d{1,3}\s*(?:s|mv|mm)\b)", re.I)  # of a decimal fraction
UNITS = {
    "rate": r"bpm\b|beats?\s*(?:per|/|a)\s*min(?:ute)?\b|/\s*min(?:ute)?\b|per minute\b",
    "ms": r"ms\b|msecs?\b|milliseconds?\b", "s": r"s\b|secs?\b|seconds?\b", "deg": r"°|degrees?\b|deg\b",
    "mm": r"mm\b|millimet(?:er|re)s?\b", "mv": r"mv\b|millivolts?\b", "uv": r"uv\b|microvolts?\b",
}  # fmt: skip
_UNIT = "|".join(UNITS.values())
_NUMBER = r"\d{1,4}(?:\.\d{1,3})?"
_UP_TO = (
    r"less than|below|under|shorter than|lower than|at most|(?:no|not) (?:more|longer|greater) than|up to|"
    r"(?:does )?not exceed(?:ing)?|<"
)
_FROM = r"more than|greater than|higher than|above|over|longer than|at least|exceed(?:s|ing)?|(?:no|not) less than|>"
_VALUE = re.compile(
    rf"(?:(?P<up_to>{_UP_TO})|(?P<from>{_FROM}))?[\s=]*(?P<between>\b(?:between|from)\b)?\s*"
    r"(?:(?:about|approximately|approx|around|roughly|nearly|~)\s*)?"
    rf"(?<![\w.])(?P<a>[-+]?{_NUMBER})(?!\.?\d)(?:\s*-?\s*(?P<ua>{_UNIT}))?"
    r"(?:\s*(?(between)(?:-|to\b|and\b)|(?:-|to\b))\s*"
    rf"(?P<b>-?{_NUMBER})(?!\.?\d)(?:\s*-?\s*(?P<ub>{_UNIT}))?)?", re.I
)  # fmt: skip
_REFERENCE = re.compile(
    r"\b(?:normal|reference|typical|usual|expected|limits?|range|threshold|cut-?off|criteri\w+)\b[^.;]{0,20}$", re.I
)
_NEAR = 60  # letters before a number in which it is looked for what says that it is but the usual one
_LIMIT = re.compile(r"\b(?:limits?|threshold|cut-?off|criterion|range)\b(?: of| is|:)?\s*$", re.I)


@dataclass(frozen=True)
class Number:
    """Where it stands; low, high: alike, the ends of a range, or infinite at the open end of a bound; unit: a name of
    UNITS, "" for none."""

    start: int
    end: int
    low: float
    high: float
    unit: str


def numbers(text: str) -> list[Number]:
    """The numbers of a sentence whose `digits` are there, without those that say what is usual."""
    found = []
    for match in _VALUE.finditer(text):
        unit = _unit(match["ua"] or match["ub"] or "")
        low = high = float(match["a"])
        if match["b"] is not None:
            low, high = sorted((low, float(match["b"])))
        if match["up_to"]:
            low = -inf
        elif match["from"]:
            high = inf
        before = text[max(0, match.start() - _NEAR) : match.start()]
        if _LIMIT.search(before) or (low < high and _REFERENCE.search(before)):
            continue
        found.append(Number(match.start(), match.end(), low, high, unit))
    return found


def _unit(text: str) -> str:
    return next(
        (name for name, unit in UNITS.items() if text and re.fullmatch(unit.replace(r"\b", ""), text, re.I)), ""
    )


def digits(text: str) -> str:
    """The text with digits for numbers in words, plain signs, and without numbers that are no measurement."""
    text = _SPELLED.sub(_spelled, _FIRST.sub("0.5", _COMMA.sub(".", text.translate(_SIGNS))))
    text = _USUAL.sub(" ", text)
    return _NO_VALUE.sub(lambda match: " " * len(match[0]), text)


def _spelled(match: re.Match[str]) -> str:
    """The digits of a number in words."""
    whole, _, part = match[0].lower().partition("point")
    total = 0
    for word in re.findall(_WORD, whole):
        total = max(total, 1) * 100 if word == "hundred" else total + _NUMBERS[word]
    return f"{total}" + ("." + "".join(str(_NUMBERS.get(word, 0)) for word in part.split()) if part else "")
