"""What embeddings tell: heads, neighbours and scores, beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score, roc_auc_score

from elm_jax.scoring import probing
from elm_jax.scoring.statistics import Patients


def made(count: int = 120, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Features, and two labels that depend on them."""
    rng = np.random.default_rng(0)
    features = rng.normal(3.0, 5.0, (count, width))
    noise = rng.normal(0, 3, (count, 2))
    return features, ((features[:, :2] - 3 + noise) > 1).astype(float)


def test_heads_are_scikit_learns() -> None:
    features, labels = made()
    (x,) = probing.standardised(features)
    for penalty, head in zip(probing.PENALTIES, probing.logistic_heads(x, labels), strict=True):
        for k in range(2):
            theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=1000).fit(x, labels[:, k])
            np.testing.assert_allclose(head[:-1, k], theirs.coef_[0], atol=2e-3)
            np.testing.assert_allclose(head[-1, k], theirs.intercept_[0], atol=2e-3)
    for rows in (120, 4):  # more of them than features, and fewer
        (x,) = probing.standardised(features[:rows])
        theirs = Ridge(alpha=0.5 * rows).fit(x, labels[:rows])
        head = probing.ridge_head(x, labels[:rows], 0.5)
        np.testing.assert_allclose(head[:-1], theirs.coef_.T, atol=1e-9)
        np.testing.assert_allclose(head[-1], theirs.intercept_, atol=1e-9)


def test_a_head_as_merl_trains_it_learns() -> None:
    features, labels = made()
    found, first = (probing.merl_head(features, labels, seed=1, epochs=epochs) for epochs in (100, 1))
    losses = [probing.cross_entropy(probing.apply_head(features, head), labels)[0].mean() for head in (found, first)]
    assert losses[0] < 0.8 * losses[1]
    np.testing.assert_array_equal(found, probing.merl_head(features, labels, seed=1))


def test_the_nearest_are_asked() -> None:
    known = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    labels = np.array([[1, 0], [1, 1], [0, 1], [0, 0]])
    found = probing.neighbours(known, labels, np.array([[2.0, 0.0], [0.0, 3.0]]), 2)
    near = np.exp((0.9 / np.hypot(0.9, 0.1) - 1) / 0.07)  # the weight of the second, beside 1 of the first
    np.testing.assert_allclose(found[0], [1.0, near / (1 + near)])
    assert found[1, 1] == pytest.approx(1.0) and found[1, 0] < 1e-4
    np.testing.assert_allclose(probing.neighbours(known, labels, known[:1], 9)[0, 0], 1.0, atol=1e-5)


def test_what_does_not_vary_is_nothing() -> None:
    train = np.array([[1.0, 7.0], [3.0, 7.0]])
    first, second = probing.standardised(train, np.array([[5.0, 9.0]]))
    np.testing.assert_array_equal(first, [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(second, [[3, 0]])


def test_scores_are_judged_label_by_label() -> None:
    features, labels = made()
    patients = Patients([str(i) for i in range(120)])
    judged = probing.judge(features[:, :2], features[:, :2] > 4, labels, ["a", "b"], patients)
    report = judged.report
    assert report["macro_auc"]["value"] == pytest.approx(roc_auc_score(labels, features[:, :2], average="macro"))
    for k, name in enumerate("ab"):
        one = report["labels"][name]
        assert one["auc"] == pytest.approx(roc_auc_score(labels[:, k], features[:, k]))
        assert one["f1"] == pytest.approx(f1_score(labels[:, k], features[:, k] > 4))
        assert one["n"] == labels[:, k].sum()
        for value in ("auc", "f1"):
            low, high = one[f"{value}_ci95"]
            assert low < one[value] < high
    assert judged.macro_aucs.mean() == pytest.approx(report["macro_auc"]["value"], abs=0.02)
