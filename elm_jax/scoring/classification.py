"""Answers as classes: what was taken for what; and reports as sets of statements: what was missed or made up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

OTHER = "Other"
TOP_STATEMENTS = 15
TOP_WRONG = 10


def classification(truths: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix of answers to questions with few different truths, which are the classes.

    {"confusion": {class: {class or "Other": count}}, "other": {answer: count}, "accuracy": {class: share right},
    "report": {class: {"precision", "recall", "f1", "support"}}}. An answer that is no class is "Other" (or that class,
    where one is called so).
    """
    classes = sorted(set(truths))
    other = Counter(answer for answer in answers if answer not in classes)
    columns = classes if OTHER in classes or not other else [*classes, OTHER]
    counts = Counter((t, a if a in classes else OTHER) for t, a in zip(truths, answers, strict=True))
    matrix = {row: {column: counts[row, column] for column in columns} for row in classes}
    right = Counter(t for t, a in zip(truths, answers, strict=True) if t == a)
    support, given = Counter(truths), Counter(answers)
    return {
        "accuracy": {name: matrix[name][name] / support[name] for name in classes},
        "confusion": matrix,
        "other": dict(other.most_common()),
        "report": {name: _rates(right[name], given[name], support[name]) for name in classes},
    }


def _rates(right: int, given: int, support: int) -> dict[str, Any]:
    total = given + support
    return {
        "precision": right / given if given else 0.0, "recall": right / support,
        "f1": 2 * right / total if total else 0.0, "support": support,
    }  # fmt: skip


def top_wrong(truths: Sequence[str], answers: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent wrong answers: [{"answer", "count"}]."""
    wrong = Counter(answer for truth, answer in zip(truths, answers, strict=True) if truth != answer)
    return [{"answer": answer, "count": count} for answer, count in wrong.most_common(TOP_WRONG)]


def statements(text: str) -> set[str]:
    """The statements of a report: what stands between semicolons."""
    return {part.strip() for part in text.split(";") if part.strip()}


def pretrain_breakdown(truths: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Reports as sets of statements: how many are equal, miss some, or have some that are not true.

    An answer without a statement is "other" where the truth has one. `top_missed` and `top_extra` are
    [[statement, count]], equally frequent ones in alphabetical order.
    """
    counts: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    extra: Counter[str] = Counter()
    for truth, answer in zip(truths, answers, strict=True):
        theirs, ours = statements(truth), statements(answer)
        kind = "matched" if ours == theirs else "not_matched" if ours else "other"
        counts[kind] += 1
        if kind != "not_matched":
            continue
        lacking, added = theirs - ours, ours - theirs
        missed.update(lacking)
        extra.update(added)
        counts["missed_instances"] += bool(lacking)
        counts["extra_instances"] += bool(added)
        counts["both" if lacking and added else "only_missed" if lacking else "only_extra"] += 1
    names = (
        "matched", "other", "not_matched", "missed_instances", "extra_instances", "only_missed", "only_extra", "both",
    )  # fmt: skip
    return {
        "n": len(truths),
        **{name: counts[name] for name in names},
        "top_missed": _top(missed),
        "top_extra": _top(extra),
    }


def _top(counts: Mapping[str, int]) -> list[list[Any]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[statement, count] for statement, count in ordered[:TOP_STATEMENTS]]
