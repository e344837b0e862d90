"""How sure a score is: bootstrap over patients, Student's t over runs, and paired tests.

n pairs, P patients, R resamples, k numbers that are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

RESAMPLES, FLIPS = 1000, 9999
SIGNIFICANT = 0.05
_LEAST_TOLD = 1e-4
_CELLS = 4_000_000  # of one chunk of resamples: bounds the memory


class Patients:
    """Who each of n pairs is about: questions about one patient stand or fall together.

    `seed` decides the resamples: two sets of numbers about the same pairs are resampled alike.
    """

    def __init__(self, patients: Sequence[str], seed: int = 0) -> None:
        names, self._of = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
        self.count, self._seed = len(names), seed

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """(n, k) -> (P, k), summed for each patient."""
        return np.stack([np.bincount(self._of, column, self.count) for column in rows.T], axis=1)

    def resampled(self, rows: np.ndarray) -> np.ndarray:
        """(n, k) -> (R, k): the sums over as many patients as there are, drawn with replacement."""
        sums = self.sums(rows)
        return np.concatenate([drawn @ sums for drawn in self._draws()])

    def weights(self) -> Iterator[np.ndarray]:
        """For each resample how often each pair is in it, (n,)."""
        for drawn in self._draws():
            yield from drawn[:, self._of]

    def swap_p(self, mine: np.ndarray, theirs: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> float:
        """Two-sided p of value(sums of `mine`) less value(sums of `theirs`), both (n, k) of the same pairs in order.

        Nothing but the name tells the two apart if there is no difference: so each patient's rows are swapped or not,
        and p is the share of swaps that make a difference as large. Of a mean that is a flip of each patient's sign.
        All 2^m swaps are tried where m, the patients that differ, are few (the least p is then 2 / 2^m); else FLIPS
        random ones, beside what was found: (1 + b) / (1 + FLIPS). It is never below `least_p`.
        """
        differing = self.sums(mine - theirs)
        differing = differing[differing.any(1)]
        first, total = mine.sum(0), mine.sum(0) + theirs.sum(0)
        observed = abs(value(first) - value(theirs.sum(0)))
        extreme = tried = 0
        for swapped in self._swaps(len(differing)):
            sums = first - swapped @ differing
            extreme += int(np.count_nonzero(abs(value(sums) - value(total - sums)) >= observed - 1e-9))
            tried += len(swapped)
        return extreme / tried

    @property
    def least_p(self) -> float:
        """The least p that `swap_p` can find, whatever the scores: with few patients none can be below 0.05."""
        return 1 / min(2 ** max(self.count - 1, 0), FLIPS + 1)

    def _swaps(self, m: int) -> Iterator[np.ndarray]:
        """Which of m patients are swapped, in chunks (r, m) of 0 and 1, the first time none of them.

        To swap the others instead makes the same difference: where all ways are tried, the last patient stays.
        """
        if 2 ** max(m - 1, 0) <= FLIPS + 1:
            yield (np.arange(2 ** max(m - 1, 0))[:, None] >> np.arange(m) & 1).astype(float)
            return
        yield np.zeros((1, m))
        rng, size = np.random.default_rng(self._seed), max(1, _CELLS // m)
        for start in range(0, FLIPS, size):
            yield rng.integers(0, 2, (min(size, FLIPS - start), m), np.int8).astype(float)

    def _draws(self) -> Iterator[np.ndarray]:
        """How often each patient is drawn, in chunks (r, P)."""
        rng = np.random.default_rng(self._seed)
        size = max(1, _CELLS // self.count)
        for start in range(0, RESAMPLES, size):
            chosen = rng.integers(0, self.count, (min(size, RESAMPLES - start), self.count))
            chosen += np.arange(len(chosen))[:, None] * self.count
            counts = np.bincount(chosen.ravel(), minlength=len(chosen) * self.count)
            yield counts.reshape(len(chosen), self.count).astype(float)


def ci95(values: np.ndarray) -> list[float]:
    """The middle 95 % of resampled values; those that a resample leaves undefined (NaN) are not counted."""
    finite = values[np.isfinite(values)]
    return [float(bound) for bound in np.percentile(finite, (2.5, 97.5))] if len(finite) else [float("nan")] * 2


def student_t(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "std", "ci95"} of runs: the sample's deviation, mean ± t(.975, n-1) std / sqrt(n).

    One run has no deviation and no interval: None.
    """
    from scipy import special  # slow to import; scipy.stats would take seconds

    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "std": None, "ci95": None}
    std = float(np.std(values, ddof=1))
    half = float(special.stdtrit(n - 1, 0.975)) * std / n**0.5
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def p_text(p: float | None) -> str:
    """A p as it stands in tables and sentences: two digits, and none that is said to be 0."""
    return "" if p is None else f"{p:.2g}" if p >= _LEAST_TOLD else f"< {_LEAST_TOLD:g}"


def mcnemar_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: of pairs right (1) or wrong (0) twice, only those that changed count."""
    from scipy import special  # slow to import; scipy.stats would take seconds

    gained, lost = int(np.sum((ours == 1) & (theirs == 0))), int(np.sum((ours == 0) & (theirs == 1)))
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5)))
