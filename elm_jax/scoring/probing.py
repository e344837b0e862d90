"""How well embeddings tell classes apart: zero-shot from prompts, and any scores of several labels.

The protocol of MERL (arXiv 2403.06659) for zero-shot classification.

Dimension letters: N records, K classes, P prompts of a class, D features.
"""

from __future__ import annotations

import numpy as np


def prompt_classifier(prompts: np.ndarray) -> np.ndarray:
    """(D, K) unit vectors of classes: of their prompts' embeddings (K, P, D), each of length 1, the mean."""
    mean = _unit(prompts.astype(np.float64)).mean(1)
    return _unit(mean).T


def zero_shot(embeddings: np.ndarray, classifier: np.ndarray) -> np.ndarray:
    """(N, K) cosines of embeddings (N, D) with the classes of a `prompt_classifier`."""
    return _unit(embeddings.astype(np.float64)) @ classifier


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The part of pairs of a positive and a negative that scores (N,) put in order, ties by half; nan without both."""
    positive = labels.astype(bool)
    n, p = len(positive), int(positive.sum())
    if p in (0, n):
        return float("nan")
    order = np.argsort(scores, kind="stable")
    values, ranks = scores[order], np.empty(n)
    ends = np.append(np.flatnonzero(np.diff(values)) + 1, n)
    starts = np.concatenate([[0], ends[:-1]])
    for start, end in zip(starts, ends, strict=True):
        ranks[order[start:end]] = (start + end + 1) / 2
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * (n - p)))


def best_f1(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(the highest F1, its threshold) over thresholds at the scores (N,) themselves, which count as positive.

    To be chosen on records that nothing is judged by; MERL chooses it on the test set.
    """
    positive = labels.astype(bool)
    thresholds = np.unique(scores)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    # How many are at or above each threshold, from the lowest on.
    above = len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
    found = 2 * hits[above - 1] / np.maximum(above + positive.sum(), 1)
    best = int(np.argmax(found))
    return float(found[best]), float(thresholds[best])


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Of predictions (N,) of one class; 0 where nothing is positive."""
    a, b = predicted.astype(bool), labels.astype(bool)
    return float(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
