"""How well embeddings tell classes apart: linear probes, nearest neighbours, zero-shot from prompts; and what scores of
several labels are worth.

The protocols of MERL (arXiv 2403.06659) for zero-shot classification and, as `merl_head`, for linear probes.

Dimension letters: N records, n training records, K classes, P prompts of a class, D features, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elm_jax.scoring.ecgbench import label_counts, macro_f1, micro_f1
from elm_jax.scoring.statistics import Patients, ci95

PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # of `logistic_heads`, in this order: each begins where the last one ended
_ITERATIONS = 100
_TEMPERATURE = 0.07  # of the neighbours' weights (Wu et al. 2018, arXiv 1805.01978)
_CHUNK = 512  # records whose neighbours are looked for together


def standardised(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Features (n, D) and others (N, D) less the mean of the first, by their deviation, float64. What does not vary
    is 0."""
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    varies = deviation > 1e-6 * max(float(deviation.max(initial=0.0)), 1e-12)
    scale = np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0)
    return [(x - mean) * scale for x in (train, *others)]


def ridge_head(features: np.ndarray, labels: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """(D + 1, K), the last row the bias: least squares of labels (n, K) on standardised features (n, D), of which
    `penalty` x n x the squared weights is added. In closed form: cheap enough for a training log."""
    n, width = features.shape
    centred = labels - labels.mean(0)
    if width <= n:
        weights = np.linalg.solve(features.T @ features + penalty * n * np.eye(width), features.T @ centred)
    else:  # the same, by a matrix of n x n
        weights = features.T @ np.linalg.solve(features @ features.T + penalty * n * np.eye(n), centred)
    return np.concatenate([weights, labels.mean(0)[None]])


def logistic_heads(features: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """For each of PENALTIES the head (D + 1, K) of a logistic regression for each class, labels (n, K) on standardised
    features (n, D): the mean cross-entropy and half the penalty times the squared weights are least (L-BFGS)."""
    from scipy.optimize import fmin_l_bfgs_b  # slow to import

    head, heads = np.zeros((features.shape[1] + 1, labels.shape[1])), []
    for penalty in PENALTIES:

        def cost(flat: np.ndarray, penalty: float = penalty) -> tuple[float, np.ndarray]:
            head = flat.reshape(-1, labels.shape[1])
            losses, slopes = cross_entropy(apply_head(features, head), labels)
            slopes /= len(labels)
            gradient = np.concatenate([features.T @ slopes + penalty * head[:-1], slopes.sum(0, keepdims=True)])
            return losses.sum() / len(labels) + penalty / 2 * (head[:-1] ** 2).sum(), gradient.ravel()

        head = fmin_l_bfgs_b(cost, head.ravel(), maxiter=_ITERATIONS)[0].reshape(head.shape)
        heads.append(head)
    return heads


def apply_head(features: np.ndarray, head: np.ndarray) -> np.ndarray:
    """(N, D) and a head (D + 1, K) -> (N, K)."""
    return features @ head[:-1] + head[-1]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The binary cross-entropy of each of (N, K), and its derivative by the logit."""
    losses = np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
    return losses, 0.5 * (1 + np.tanh(logits / 2)) - labels


class Adam:
    """Adam with weight decay in the gradient, and a rate that falls to a tenth after `milestone` steps: MERL's recipe.

    MERL counts its milestone of 40 epochs in batches, so that it comes in the first epoch; so does this.
    """

    def __init__(self, rate: float = 1e-3, decay: float = 1e-4, milestone: int = 40) -> None:
        self.rate, self.decay, self.milestone, self.steps = rate, decay, milestone, 0
        self._moments: list[tuple[np.ndarray, np.ndarray]] = []

    def step(self, values: Sequence[np.ndarray], gradients: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The values after one step."""
        self._moments = self._moments or [(np.zeros_like(x), np.zeros_like(x)) for x in values]
        rate = self.rate if self.steps < self.milestone else self.rate / 10
        self.steps += 1
        moved, moments = [], []
        for x, slope, (first, second) in zip(values, gradients, self._moments, strict=True):
            slope = slope + self.decay * x
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            moments.append((first, second))
            scale = np.sqrt(second / (1 - 0.999**self.steps)) + 1e-8
            moved.append(x - rate * first / (1 - 0.9**self.steps) / scale)
        self._moments = moments
        return moved


def merl_head(
    features: np.ndarray, labels: np.ndarray, seed: int = 0, epochs: int = 100, batch: int = 16
) -> np.ndarray:
    """(D + 1, K): a head as MERL trains it, on features (n, D) as they are, in shuffled batches of the mean loss."""
    rng, optimizer, bound = np.random.default_rng(seed), Adam(), features.shape[1] ** -0.5
    head = rng.uniform(-bound, bound, (features.shape[1] + 1, labels.shape[1]))
    for _ in range(epochs):
        order = rng.permutation(len(features))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            head = merl_step(optimizer, head, features[chosen], labels[chosen])
    return head


def merl_step(optimizer: Adam, head: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The head (D + 1, K) after a step on one batch."""
    slopes = cross_entropy(apply_head(features, head), labels)[1] / labels.size
    return optimizer.step([head], [np.concatenate([features.T @ slopes, slopes.sum(0, keepdims=True)])])[0]


def neighbours(train: np.ndarray, labels: np.ndarray, features: np.ndarray, count: int) -> np.ndarray:
    """(N, K): the share of the `count` nearest of standardised training features (n, D) that have each of labels
    (n, K), nearer ones weighing more: by their cosine."""
    known, count = _unit(train), min(count, len(train))
    found = []
    for start in range(0, len(features), _CHUNK):
        cosines = _unit(features[start : start + _CHUNK]) @ known.T
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / _TEMPERATURE)
        found.append(np.einsum("nc,nck->nk", weights / weights.sum(1, keepdims=True), labels[nearest].astype(float)))
    return np.concatenate(found)


def prompt_classifier(prompts: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(D, K) unit vectors of classes: of their prompts' embeddings, (P, D) of each of K, made of length 1, the mean."""
    return _unit(np.stack([_unit(np.asarray(own, np.float64)).mean(0) for own in prompts])).T


def zero_shot(embeddings: np.ndarray, classifier: np.ndarray) -> np.ndarray:
    """(N, K) cosines of embeddings (N, D) with the classes of a `prompt_classifier`."""
    return _unit(embeddings.astype(np.float64)) @ classifier


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The part of pairs of a positive and a negative that scores (N,) put in order, ties by half; nan without both."""
    return Auroc(scores, labels)(np.ones(len(labels)))


class Auroc:
    """The area under one label's curve, for records of any weights (N,): ties count half; nan without both."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        self._order = np.argsort(scores, kind="stable")
        ranked = scores[self._order]
        self._true = labels[self._order].astype(bool)
        self._group = np.concatenate([[0], np.cumsum(ranked[1:] > ranked[:-1])])

    def __call__(self, weights: np.ndarray) -> float:
        weights = weights[self._order]
        yes, no = (np.bincount(self._group, weights * part) for part in (self._true, ~self._true))
        total = yes.sum() * no.sum()
        below = np.cumsum(no) - no
        return float((yes * (below + no / 2)).sum() / total) if total else float("nan")


def macro_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes of (N, K) that have both; nan where none has."""
    areas = np.array([auroc(scores[:, k], labels[:, k]) for k in range(labels.shape[1])])
    return float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")


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


@dataclass(frozen=True)
class Judged:
    """What scores of N records and K labels are worth.

    report: {"macro_f1", "micro_f1", "macro_auc": {"value", "ci95"}, "n", "labels": {label: {"f1", "f1_ci95", "auc",
    "auc_ci95", "n"}}}, intervals from a bootstrap over patients. macro_aucs: (R,) of its resamples.
    """

    report: dict[str, Any]
    macro_aucs: np.ndarray


def judge(
    scores: np.ndarray, decided: np.ndarray, true: np.ndarray, labels: Sequence[str], patients: Patients
) -> Judged:
    """What scores (N, K), and what is decided by them (N, K), are worth against the truth (N, K), of which every label
    has both."""
    true, decided = true.astype(bool), decided.astype(bool)
    rows = label_counts(decided, true)
    sums, resampled = rows.sum(0), patients.resampled(rows)
    areas = [Auroc(scores[:, k], true[:, k]) for k in range(len(labels))]
    drawn = np.array([[area(weights) for area in areas] for weights in patients.weights()])
    with np.errstate(invalid="ignore"):
        means = np.nansum(drawn, axis=1) / np.isfinite(drawn).sum(1)
    alone = [area(np.ones(len(true))) for area in areas]
    report = {
        "macro_f1": {"value": float(macro_f1(sums)), "ci95": ci95(macro_f1(resampled))},
        "micro_f1": {"value": float(micro_f1(sums)), "ci95": ci95(micro_f1(resampled))},
        "macro_auc": {"value": float(np.mean(alone)), "ci95": ci95(means)},
        "n": len(true),
        "labels": {
            label: {
                "f1": f1(decided[:, k], true[:, k]), "f1_ci95": ci95(macro_f1(resampled[:, k :: len(labels)])),
                "auc": alone[k], "auc_ci95": ci95(drawn[:, k]), "n": int(true[:, k].sum()),
            }
            for k, label in enumerate(labels)
        },
    }  # fmt: skip
    return Judged(report, means)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
