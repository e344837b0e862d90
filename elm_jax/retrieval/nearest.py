"""The entries of an index that are nearest to an ECG: exactly, on the device, or by FAISS; one interface.

Distances are squared L2 distances of float32 vectors: an ECG's features, its signal, or one behind the other; raw, as
the reference has them, or each column less its mean and by its deviation over the index.

Dimension letters: N entries, Q queries, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from elm_jax.ecg.features import PER_LEAD
from elm_jax.errors import UserError
from elm_jax.retrieval.index import KEY, Index, opened
from elm_jax.weights.safetensors import forget

MODES = {"feature": ("features",), "signal": ("signals",), "combined": ("features", "signals")}
SEARCHES, SCALINGS = ("exact", "faiss"), ("z_scored", "raw")
Found = tuple[np.ndarray, np.ndarray]  # rows (n,) and squared distances (n,) float32, the nearest first
_AXES, _SAMPLE = 24, 4096  # directions along which distances are bounded, and entries by which they are chosen
_CANDIDATES, _GROWTH = 1024, 16  # entries whose distance is taken, at first, and how many more at a time
_BOUNDS, _VALUES = 1 << 25, 1 << 24  # numbers in memory at a time: of bounds, and of vectors
_SLACK = 2.0**-18  # of a bound's terms, which float32 rounds
_SAME = 1e-6  # mean squared difference of a column, in deviations
_FLAT = 10_000  # entries up to which FAISS compares with all


class Vectors:
    """The vectors of an index in a mode: of the `leads` (places in the canonical order), scaled as is asked for."""

    def __init__(self, index: Index, mode: str, scaling: str, leads: tuple[int, ...]) -> None:
        self.index, self.arrays = index, MODES[mode]
        if "signals" in self.arrays and not index.facts.signals:
            fix = "build it with --signals, or set --config.retrieval.mode=feature"
            raise UserError(KEY, f"{index.folder}, an index without signals", f"one for mode={mode}", fix)
        sizes = {"features": PER_LEAD, "signals": index.facts.length}
        self.columns = {
            name: np.concatenate([np.arange(sizes[name]) + lead * sizes[name] for lead in leads])
            for name in self.arrays
        }
        self.whole = leads == tuple(range(index.facts.widths["features"] // PER_LEAD))
        means, weights = [], []
        for name, columns in self.columns.items():
            mean, deviation = (index.scale[f"{name}_{what}"][columns] for what in ("mean", "deviation"))
            varies = deviation > 1e-12 * np.maximum(1.0, np.abs(mean))
            # Both parts of a combined vector count alike, however many columns they have.
            by = np.sqrt(len(columns)) if len(self.arrays) > 1 else 1.0
            weight = np.where(varies, 1 / (by * np.where(varies, deviation, 1.0)), 0.0)
            means.append(mean)
            weights.append(weight if scaling == "z_scored" else np.ones(len(columns)))
        self.mean, self.weight = np.concatenate(means).astype(np.float32), np.concatenate(weights).astype(np.float32)
        self.raw = scaling == "raw"

    def __len__(self) -> int:
        return len(self.index)

    @property
    def same(self) -> float:
        """The squared distance up to which two vectors are of one recording, however its file rounds it."""
        return _SAME * (len(self.arrays) if len(self.arrays) > 1 and not self.raw else len(self.mean))

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """Vectors (..., D) as distances are taken of them."""
        return raw if self.raw else (raw - self.mean) * self.weight

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The scaled vectors (n, D) of some rows."""
        return self.scaled(self._joined([self.index.rows(name, rows) for name in self.arrays]))

    def sample(self, most: int) -> np.ndarray:
        """The scaled vectors of about so many rows, or of all. Raises UserError as `blocks`."""
        return self._finite(self.rows(np.arange(0, len(self), max(1, len(self) // most))))

    def distances(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Squared distances (n,) float64 of some rows from a scaled query (D,)."""
        step = max(1, _VALUES // len(query))
        found = [np.zeros(0)]
        for first in range(0, len(rows), step):
            away = self.rows(rows[first : first + step]) - query
            found.append(np.einsum("nd,nd->n", away, away, dtype=np.float64))
        return np.concatenate(found)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All scaled vectors, some at a time, each with its first row. Raises UserError where some have no length."""
        step = max(1, _VALUES // len(self.mean))
        for start, arrays in self.index.blocks(self.arrays):
            for first in range(0, len(arrays[0]), step):
                block = self.scaled(self._joined([array[first : first + step] for array in arrays]))
                yield start + first, self._finite(block)
            for array in arrays:
                forget(array)

    def _finite(self, vectors: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            whole = np.isfinite(np.einsum("nd,nd->n", vectors, vectors)).all()
        if not whole:
            found = f"{self.index.folder}, an index with {' or '.join(self.arrays)} that are not finite, or too large"
            raise UserError(KEY, found, "finite numbers", "build it again with python -m elm_jax.index")
        return vectors

    def _joined(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        if not self.whole:
            arrays = [x[:, columns] for x, columns in zip(arrays, self.columns.values(), strict=True)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


class Nearest(Protocol):
    """Searches one index in one mode."""

    vectors: Vectors

    def __call__(self, queries: np.ndarray, k: int, excluded: Sequence[np.ndarray]) -> list[Found]:
        """For each query (Q, D), float32 and as they are raw, the k nearest entries, fewer only where there are not so
        many, without the rows `excluded` of each."""
        ...


class Exact:
    """Exact search, of which the device does the long part.

    Vectors are turned so that their first _AXES columns hold most of what they differ in; those, and the length of the
    rest, stay on the device: |x - q|^2 is at least the squared distance of these. The entries of the least bounds are
    held against the query itself, from the mapped files, and more of them until no bound of another is below the k-th
    distance.
    """

    def __init__(self, vectors: Vectors) -> None:
        import jax  # which worker processes of the loader never need

        self.vectors = vectors
        sample = vectors.sample(min(_SAMPLE, max(1, _VALUES // len(vectors.mean)))).astype(np.float64)
        self._centre = sample.mean(0).astype(np.float32)
        _, _, axes = np.linalg.svd(sample - self._centre, full_matrices=False)
        self._axes = axes[:_AXES].T.astype(np.float32)
        low, lengths = np.empty((self._axes.shape[1] + 1, len(vectors)), np.float32), np.empty(len(vectors), np.float32)
        for start, block in vectors.blocks():
            columns, lengths[start : start + len(block)] = self._turned(block)
            low[:, start : start + len(block)] = columns.T  # columns one by one: half the time of a product
        self._low, self._lengths = jax.device_put(low), jax.device_put(lengths)
        self._least = jax.jit(_least, static_argnames="count")

    def _turned(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bounding columns (n, p + 1) of vectors (n, D), and their squared lengths (n,)."""
        centred = vectors - self._centre
        along = centred @ self._axes
        lengths = np.einsum("nd,nd->n", centred, centred)
        rest = np.sqrt(np.maximum(lengths - np.einsum("nd,nd->n", along, along), 0.0))
        return np.column_stack([along, rest]), lengths

    def __call__(self, queries: np.ndarray, k: int, excluded: Sequence[np.ndarray]) -> list[Found]:
        scaled = self.vectors.scaled(np.asarray(queries, np.float32))
        low, lengths = self._turned(scaled)
        first = max(k, min(_CANDIDATES, _VALUES // 8 // scaled.shape[1])) + max(map(len, excluded), default=0)
        step, found = max(1, _BOUNDS // len(self.vectors)), list[Found]()
        for start in range(0, len(scaled), step):
            part = slice(start, start + step)
            found += self._part(scaled[part], low[part], lengths[part], k, excluded[part], first)
        return found

    def _part(
        self, scaled: np.ndarray, low: np.ndarray, lengths: np.ndarray, k: int, excluded: Sequence[np.ndarray],
        count: int,
    ) -> list[Found]:  # fmt: skip
        count = min(1 << (count - 1).bit_length(), len(self.vectors))  # of few sizes: each is compiled
        bounds, rows = map(np.asarray, self._least(self._low, self._lengths, low, lengths, count=count))
        found, open_ = list[Found](), list[int]()
        for i, query in enumerate(scaled):
            chosen = np.setdiff1d(rows[i], excluded[i])
            one = _sorted(chosen, self.vectors.distances(query, chosen), k)
            if count < len(self.vectors) and (len(one[0]) < k or bounds[i, -1] < one[1][-1]):
                open_.append(i)
            found.append(one)
        if open_:
            again = self._part(
                scaled[open_], low[open_], lengths[open_], k, [excluded[i] for i in open_], count * _GROWTH
            )
            for i, one in zip(open_, again, strict=True):
                found[i] = one
        return found


def _least(low: Any, lengths: Any, query: Any, of_query: Any, count: int) -> tuple[Any, Any]:
    """The `count` least of the bounds of N entries for Q queries, and their rows: (Q, count) each."""
    import jax
    import jax.numpy as jnp

    products = jnp.matmul(query, low, precision=jax.lax.Precision.HIGHEST)
    bounds = (1 - _SLACK) * (of_query[:, None] + lengths[None]) - 2 * products
    least, rows = jax.lax.top_k(-bounds, count)
    return -least, rows


class Faiss:
    """Search by FAISS: exact up to _FLAT entries, else by inverted lists, of which a part is looked into."""

    def __init__(self, vectors: Vectors) -> None:
        faiss = the_faiss()
        self.vectors, columns = vectors, len(vectors.mean)
        lists = int(4 * np.sqrt(len(vectors)))
        flat = len(vectors) <= _FLAT
        self.index = faiss.index_factory(columns, "Flat" if flat else f"IVF{lists},Flat", faiss.METRIC_L2)
        if not flat:
            self.index.train(np.ascontiguousarray(vectors.sample(64 * lists)))
            self.index.nprobe = max(10, lists // 64)
        for _, block in vectors.blocks():
            self.index.add(np.ascontiguousarray(block))

    def __call__(self, queries: np.ndarray, k: int, excluded: Sequence[np.ndarray]) -> list[Found]:
        more = min(len(self.vectors), k + max(map(len, excluded), default=0))
        scaled = np.ascontiguousarray(self.vectors.scaled(np.asarray(queries, np.float32)))
        found = []
        for query, rows, out in zip(scaled, self.index.search(scaled, more)[1], excluded, strict=True):
            rows = rows[(rows >= 0) & ~np.isin(rows, out)]
            found.append(_sorted(rows, self.vectors.distances(query, rows), k))  # FAISS's own lose digits
        return found


def the_faiss() -> Any:
    """The library. Raises UserError where it is not installed."""
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        fix = "pip install 'elm-jax[retrieval]', or set --config.retrieval.search=exact"
        raise UserError("retrieval.search", f"faiss, which is not installed ({error})", "FAISS", fix) from error
    return faiss


def _sorted(rows: np.ndarray, distances: np.ndarray, k: int) -> Found:
    order = np.lexsort((rows, distances))[:k]
    return rows[order].astype(np.int64), distances[order].astype(np.float32)


@lru_cache(4)
def nearest(folder: str, mode: str, scaling: str, search: str, leads: tuple[int, ...]) -> Nearest:
    """The search of an index, made once: of 1 M entries that takes seconds. Raises UserError as `Vectors`, `Faiss`."""
    vectors = Vectors(opened(folder), mode, scaling, leads)
    return Exact(vectors) if search == "exact" else Faiss(vectors)
