"""ECG-QA: answers as sets out of a closed vocabulary, types of questions, and what a question alone tells.

Oh et al. 2023. The official metric is the exact match of the set of answers, for each type of question; ECG-LM's
"average" is the mean over the three types that ask about one ECG.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.scoring.answers import words
from elm_jax.scoring.classification import classification

SINGLE = ("single-verify", "single-choose", "single-query")
_TYPES = re.compile(r"(single|comparison_consecutive|comparison_irrelevant)-(verify|choose|query)")
_SEPARATORS = re.compile(r"[\s.]*[,;\n][\s.,;]*")


def is_ecg_qa(name: str) -> bool:
    """Whether records called `name` are ECG-QA's."""
    return _TYPES.fullmatch(name) is not None


def answer_list(text: Any) -> list[str]:
    """The true answers of a record's `text` [question_type, question, answers]; none where it has another form."""
    if not isinstance(text, list | tuple) or len(text) != 3 or not isinstance(text[1], str):
        return []
    given = text[2] if isinstance(text[2], list | tuple) else [text[2]]
    return [str(answer) for answer in given]


def set_matches(answers: Sequence[str], truths: Sequence[Iterable[str]]) -> np.ndarray:
    """1 for each answer that spells exactly its set of true answers, in any order, (n,).

    The vocabulary is that of all truths. An answer may separate them by commas, semicolons or only blanks, and leave
    out those that a true answer has of its own.
    """
    sets = [frozenset(_folded(one) for one in truth) for truth in truths]
    names = sorted({name for truth in sets for name in truth})
    known = {name.replace(",", ""): name for name in names} | {name: name for name in names}
    longest = max((name.count(" ") + 1 for name in names), default=1)
    parsed: dict[str, frozenset[str]] = {text: parse_answers(text, known, longest) for text in set(answers)}
    return np.array([float(parsed[text] == truth) for text, truth in zip(answers, sets, strict=True)])


def parse_answers(text: str, known: Mapping[str, str], longest: int) -> frozenset[str]:
    """The answers that a text spells. `known`: spelling -> answer of all that there are, folded, of at most `longest`
    words.

    From the left the longest known answer is taken, over the text's separators only if they are its own, and a word
    that begins none of them stands for itself: what was said beside the truth makes a set another one.
    """
    found: set[str] = set()
    left = _folded(text).split()
    while left:
        spans = [" ".join(left[:n]).rstrip(",") for n in range(min(longest, len(left)), 0, -1)]
        span = next((span for span in spans if span in known), spans[-1])
        found.add(known.get(span, span))
        left = left[len(spans) - spans.index(span) :]
    return frozenset(found - {""})


def average_of_types(by_type: Mapping[str, Mapping[str, float]], metric: str) -> float | None:
    """ECG-LM's average: the unweighted mean over the types about one ECG; None unless all three were asked."""
    if not all(metric in by_type.get(kind, {}) for kind in SINGLE):
        return None
    return float(np.mean([by_type[kind][metric] for kind in SINGLE]))


class QuestionOnly:
    """Answers learnt from questions without ECGs: the most frequent answer to the same words in training, else to
    questions of the same name, else to any."""

    def __init__(self, asked: Iterable[tuple[str, str, str]]) -> None:
        """`asked`: (name, question, answer) of each question in training."""
        counts: dict[tuple[str, ...], Counter[str]] = {}
        for name, question, answer in asked:
            for key in ((name, _words_of(question)), (name,), ()):
                counts.setdefault(key, Counter())[answer] += 1
        self._best = {key: max(sorted(found), key=found.__getitem__) for key, found in counts.items()}

    def __bool__(self) -> bool:
        return bool(self._best)

    def answer(self, name: str, question: str) -> str:
        """The answer that training makes most likely."""
        keys: Sequence[tuple[str, ...]] = ((name, _words_of(question)), (name,), ())
        return next(self._best[key] for key in keys if key in self._best)


def macro_f1(truths: Sequence[str], answers: Sequence[str]) -> float:
    """Unweighted mean of the F1 of each true answer, case, punctuation and spaces aside; as OpenTSLM scores a template
    of ECG-QA-CoT."""
    report = classification([_words_of(text) for text in truths], [_words_of(text) for text in answers])["report"]
    return float(np.mean([rates["f1"] for rates in report.values()]))


def _words_of(text: str) -> str:
    return " ".join(words(text))


def _folded(text: str) -> str:
    """Lower-cased, with ", " for each separator, one blank between words and no stop at the end of a part."""
    return " ".join(_SEPARATORS.sub(", ", text.lower()).split()).strip(" .,")
