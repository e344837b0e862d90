"""Does the model read the ECG? How much of a score is owed to the signal, with a paired test.

The signal-dependence score is what the same questions score with their own ECG less what they score with another
patient's. Another ECG is as good an ECG, and answers stay as frequent as they were, so that what a model knows of
questions and answers alone cancels; zeros, noise and no ECG at all also show how it bears what it has never seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from elm_jax.scoring.metrics import Scorer, Table, ratio
from elm_jax.scoring.statistics import ci95, mcnemar_p

METRIC = "exact_match"
PREFERRED = ("shuffled", "zeros", "noise", "text_only")


def signal_dependence(ours: Table, others: Mapping[str, Table]) -> dict[str, Any] | None:
    """{"value", "ci95", "p"} of exact matches, real minus control, paired by question; None without a control.

    ours: the answers with the right ECGs; others: those under each control, of the same scorer.

    The control is "shuffled" where it is there, and is named. "by_control" has the same for every control,
    "by_metric" for every mean of a score, "by_name" for every kind of question. A control may hold several answers to
    a question, whose scores are averaged. `p` is two-sided, from flipping the sign of each patient's difference
    (`Patients.swap_p`), "least_p" the least that these patients allow; "mcnemar_p", where each question was answered
    once with its ECG and once under the control, is McNemar's exact test, which takes questions for independent.
    """
    chosen = next((name for name in PREFERRED if name in others), None)
    if chosen is None or not ours.pairs:
        return None
    control = others[chosen]
    known = by_question(control, METRIC)  # once for all kinds of question: it holds several answers to each
    means = [name for name in ours.rows if name in control.rows and ours.scorer.metrics[name].is_mean]
    return {
        **_difference(ours, known, METRIC),
        "control": chosen,
        "metric": METRIC,
        "by_control": {name: _difference(ours, by_question(other, METRIC), METRIC) for name, other in others.items()},
        "by_metric": {name: _difference(ours, by_question(control, name), name) for name in means},
        "by_name": {
            level: _difference(ours.part(places), known, METRIC) for level, places in ours.groups("name").items()
        },
    }


def pairing(scorer: Scorer) -> Scorer:
    """The scorer of paired differences: pairs must be the same everywhere, so answers that a protocol leaves out count
    here, as `ours` has it."""
    return scorer if scorer.protocol.empty_answers else Scorer("ours")


def by_question(table: Table, metric: str) -> dict[str, list[float]]:
    """Question -> its scores, one for each answer to it; those that the metric does not ask are left out."""
    found: dict[str, list[float]] = {}
    if metric in table.rows:
        for pair, (value, count) in zip(table.pairs, table.rows[metric], strict=True):
            if count:
                found.setdefault(pair.id, []).append(float(value))
    return found


def tested(values: np.ndarray, table: Table) -> dict[str, Any]:
    """{"value", "ci95", "p", "least_p"} of the mean of n paired differences, by the patients of the table's n pairs."""
    patients, rows = table.patients, np.stack([values, np.ones_like(values)], axis=1)
    p = patients.swap_p(rows, rows * [0, 1], ratio)
    return {"value": float(values.mean()), "ci95": ci95(ratio(patients.resampled(rows))), "p": p,
            "least_p": patients.least_p}  # fmt: skip


def _difference(real: Table, theirs: Mapping[str, list[float]], metric: str) -> dict[str, Any]:
    mine = by_question(real, metric)
    missing = [key for key in mine if key not in theirs]
    assert mine and not missing, f"the control lacks predictions: {missing[:3]}"
    keys = list(mine)
    ours = np.array([mine[key][0] for key in keys])
    others = np.array([np.mean(theirs[key]) for key in keys])
    table = real.part([i for i, pair in enumerate(real.pairs) if pair.id in mine])
    result = tested(ours - others, table)
    once = all(len(theirs[key]) == 1 for key in keys) and len({pair.asked for pair in table.pairs}) == len(keys)
    if once and set(np.unique([ours, others])) <= {0.0, 1.0}:
        result["mcnemar_p"] = mcnemar_p(ours, others)
    return result
