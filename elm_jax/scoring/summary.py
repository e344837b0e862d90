"""What `metrics.json` says of a table of scores, and what blind answers, which know no ECG, would score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from elm_jax.scoring import answers as compared
from elm_jax.scoring.metrics import Score, Table

_CANDIDATES = 32  # answers that are tried as constant ones


def scores_of(table: Table) -> dict[str, Any]:
    """Scores of a table: "protocol", "n", "metrics", "by", "baselines" and more, as `metrics.json` has them.

    n: of the answers that are scored, about "patients"; "empty_answers" counts all empty ones, scored or left out.
    metrics: {metric: {"value", "ci95": [low, high]}}; by: {field: {level: {metric: the same and "n"}}}.
    baselines: "constant" is {metric: what one answer to all its questions would score at best, chosen with
    the truths in hand}; "majority" is {metric: the score of each name's most frequent truth}.
    perfect: {metric: what answers equal to the truths score}, of the metrics that give short ones less than 1.
    """
    scorer = table.scorer
    result: dict[str, Any] = {
        "protocol": scorer.name,
        "protocol_meaning": scorer.protocol.meaning,
        "n": len(table.pairs),
        "patients": table.patients.count,
        "empty_answers": sum(not pair.answer for pair in table.pairs) + table.left_out,
        "empty_answers_left_out": table.left_out,
        "metrics": table.scores(),
        "unavailable": scorer.unavailable,
        "by": table.by(),
        "baselines": baselines(table),
        "perfect": table.perfect(),
    }
    thinking = table.thinking()
    if thinking.pairs and scorer.protocol.parts:
        result["thinking"] = {"n": len(thinking.pairs), "metrics": thinking.scores()}
    return result


def baselines(table: Table) -> dict[str, dict[str, float]]:
    """What answers that know no ECG and no question's words would score, by metric."""
    if not table.pairs:
        return {"constant": {}, "majority": {}}
    majority = table.majority.values()
    constant = {name: _constant(table, name) for name in majority}
    return {"constant": constant, "majority": majority}


def _constant(table: Table, name: str) -> float:
    metric = table.scorer.metrics[name]
    pairs = [table.pairs[i] for i in metric.among(table.pairs)]
    truths = [pair.truth for pair in pairs]
    if metric.score is not None and metric.cheap:
        return best_constant(truths, metric.score, metric.numbers)[1]
    answer = Counter(truths).most_common(1)[0][0]
    blind = [replace(pair, answer=answer, thinking="") for pair in pairs]
    return float(metric.value(table.scorer.rows(name, blind).sum(0)))


def best_constant(truths: Sequence[str], score: Score, numbers: bool = False) -> tuple[str, float]:
    """The single answer that scores best against `truths`, and its score.

    Tried are the most frequent truths, and where truths are `numbers` every number between them.
    """
    counts = Counter(truths)
    candidates = [truth for truth, _ in counts.most_common(_CANDIDATES)]
    if numbers:
        rates = [rate for rate in map(compared.first_integer, counts) if rate is not None and rate < 1000]
        candidates += [str(rate) for rate in range(min(rates, default=0), max(rates, default=0) + 1)]
    sums = [0.0] * len(candidates)
    for truth, n in counts.items():
        for i, answer in enumerate(candidates):
            sums[i] += n * score(answer, truth)
    best = int(np.argmax(sums))
    return candidates[best], sums[best] / len(truths)
