"""Which recordings the ECG-Byte tokenizer is trained on: some at random, or equally many of every kind.

Kinds are clusters of the recordings' features, as the reference makes them: principal components with 95 % of the
variance of the unscaled features, scaled to unit variance, then k-means; the number of clusters is the smaller of the
elbow's and the best silhouette's. Where that gives fewer than three, DBSCAN is asked; if it knows no more, k-means
stands. Dimension letters: N recordings, F features.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from elm_jax.errors import UserError

KINDS = ("random", "stratified")
_VARIANCE = 0.95
_MOST_CLUSTERS, _STARTS, _FEWEST = 10, 10, 3
_SILHOUETTE_OF = 10_000  # recordings
_NEAR = 6  # decimals: points that agree to so many, in standard deviations, are one
_EPS, _NEIGHBOURS = 0.5, 5  # of DBSCAN


@dataclass(frozen=True)
class Strata:
    """The cluster of each recording, int (N,) (-1: DBSCAN's noise, a cluster, too), and how it was found."""

    labels: np.ndarray
    method: str

    def describe(self) -> dict[str, Any]:
        """The method and the clusters' sizes, largest first, as a tokenizer's file states them."""
        return {"method": self.method, "sizes": sorted(Counter(self.labels.tolist()).values(), reverse=True)}


def random_order(total: int, seed: int) -> np.ndarray:
    """0..total-1, each order as likely as any other: the first few are a random sample."""
    return np.random.default_rng(seed).permutation(total)


def stratified_sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` places in `labels` (N,), sorted: of every label equally many, or all that it has; the rest at random."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(labels))
    kinds = np.unique(labels)
    quota = count // len(kinds)
    taken = np.concatenate([places[labels[places] == kind][:quota] for kind in kinds])
    others = places[~np.isin(places, taken)]
    return np.sort(np.concatenate([taken, others[: count - len(taken)]]))


def require_sampling() -> None:
    """Raises UserError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--sample stratified", f"no scikit-learn ({error})", "scikit-learn",
            "run pip install scikit-learn threadpoolctl, or take --sample random",
        ) from None  # fmt: skip


def cluster(features: np.ndarray, seed: int) -> Strata:
    """The kinds of recordings with `features` (N, F): the same for the same features and seed.

    Raises UserError where scikit-learn is not installed.
    """
    require_sampling()
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # threads would add up in another order each time
        return _cluster(features, seed)


def _cluster(features: np.ndarray, seed: int) -> Strata:
    from sklearn.cluster import DBSCAN

    points = _components(features, seed)
    if points is None:
        return Strata(np.zeros(len(features), np.int64), "one kind")
    labels = _k_means(points, seed)
    if len(np.unique(labels)) < _FEWEST:
        dense = DBSCAN(eps=_EPS, min_samples=_NEIGHBOURS).fit_predict(points)
        if len(np.unique(dense)) >= _FEWEST:
            return Strata(dense, "DBSCAN")
    return Strata(labels, "k-means")


def _components(features: np.ndarray, seed: int) -> np.ndarray | None:
    """Scaled principal components (N, few), or None where they tell fewer than three recordings apart."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(features, axis=0)) < _FEWEST:
        return None
    few = PCA(_VARIANCE, svd_solver="full", random_state=seed).fit_transform(features)
    points = StandardScaler().fit_transform(few).round(_NEAR)
    return None if len(np.unique(points, axis=0)) < _FEWEST else points


def _k_means(points: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    most = min(_MOST_CLUSTERS, len(np.unique(points, axis=0)) - 1)
    settings: dict[str, Any] = {"n_init": _STARTS, "random_state": seed}
    runs: list[Any] = [KMeans(k, **settings).fit(points) for k in range(2, most + 1)]
    labels = [run.labels_ for run in runs]
    some = random_order(len(points), seed)[:_SILHOUETTE_OF]
    scores = [_silhouette(points[some], found[some]) for found in labels]
    falls = np.diff([run.inertia_ for run in runs])
    elbow = int(np.argmin(falls)) if len(falls) else 0
    return labels[min(elbow, int(np.argmax(scores)))]


def _silhouette(points: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import silhouette_score

    # Some of the recordings may be all of one cluster, where the others are rare.
    return float(silhouette_score(points, labels)) if 1 < len(np.unique(labels)) < len(labels) else -1.0
