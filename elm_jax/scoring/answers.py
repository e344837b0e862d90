"""Answers and single comparisons: thinking and answer, equality, words in common, numbers."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache

HEART_RATE_TOLERANCE = 5
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_UNSPACED = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def split_response(text: str) -> tuple[str, str]:
    """(thinking, answer), stripped: the answer is what answer tags hold, else what follows the thinking."""
    if "</think>" in text and "<think>" not in text:
        text = "<think>" + text
    thinking = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    rest = text[thinking.end() :] if thinking else text
    return (thinking[1].strip() if thinking else ""), (tagged[1] if tagged else rest).strip()


def exact_match(answer: str, truth: str) -> float:
    """1 if the two strings are equal."""
    return float(answer == truth)


def token_f1(answer: str, truth: str) -> float:
    """F1 of the words in common, lower-cased and without ASCII punctuation; two texts without words agree."""
    ours, theirs = _counted(answer), _counted(truth)
    if not ours or not theirs:
        return float(not ours and not theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


@lru_cache(1024)
def _counted(text: str) -> Counter[str]:
    """How often each word occurs. Remembered, as one truth is compared with many blind answers in a row."""
    return Counter(words(text))


def same_words(answer: str, truth: str) -> float:
    """1 if the two agree but for case, ASCII punctuation and spaces."""
    return float(words(answer) == words(truth))


def within_5_bpm(answer: str, truth: str) -> float:
    """1 if the first whole number of the answer is within 5 of that of the truth."""
    ours, theirs = first_integer(answer), first_integer(truth)
    return float(ours is not None and theirs is not None and abs(ours - theirs) <= HEART_RATE_TOLERANCE)


def first_integer(text: str) -> int | None:
    """The first run of ASCII digits as a number, None if there is none."""
    match = re.search(r"[0-9]+", text)
    return int(match[0][:18]) if match else None


def words(text: str) -> list[str]:
    """Lower-cased words without ASCII punctuation, composed."""
    return composed(text).lower().translate(_NO_PUNCTUATION).split()


def composed(text: str) -> str:
    """In Unicode's form NFC: one spelling for what looks the same, "é" and "e" with an accent behind it."""
    return unicodedata.normalize("NFC", text)


def spaced(text: str) -> str:
    """With blanks around each character of a script that writes none between words, such as Chinese, Japanese or Thai.

    What is between blanks is then a word, or a character where words cannot be told.
    """
    return text if text.isascii() else "".join(f" {c} " if _stands_alone(c) else c for c in text)


@lru_cache(2**16)
def _stands_alone(character: str) -> bool:
    return unicodedata.name(character, "").partition(" ")[0] in _UNSPACED
