"""What a tokenizer makes of recordings: how much shorter they get, what is lost, which entries are used.

Dimension letters: C leads, L samples, N ids.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from elm_jax.errors import UserError
from elm_jax.symbols.coder import METHODS, EcgByte
from elm_jax.symbols.files import BYTES

DIGITS = 6  # significant ones of a figure in a report


@dataclass(frozen=True)
class Encoded:
    """A recording as ids (N,) int32, with what decoding needs, and the error of decoding in units of the recording."""

    ids: np.ndarray
    shape: tuple[int, int]
    low: float
    high: float
    rms_error: float
    max_error: float

    @property
    def compression(self) -> float:
        """Symbols for each id."""
        return self.shape[0] * self.shape[1] / len(self.ids)

    def describe(self) -> dict[str, Any]:
        """All of it as JSON takes it; errors also as parts of the range from `low` to `high`, 0 where that is 0."""
        span = self.high - self.low or 1.0
        figures = {
            "low": self.low,
            "high": self.high,
            "shape": list(self.shape),
            "symbols": self.shape[0] * self.shape[1],
            "tokens": len(self.ids),
            "compression": _rounded(self.compression),
            "rms_error": _rounded(self.rms_error),
            "max_error": _rounded(self.max_error),
            "rms_error_of_range": _rounded(self.rms_error / span),
            "max_error_of_range": _rounded(self.max_error / span),
        }
        return {**figures, "ids": self.ids.tolist()}


def encode(tokenizer: EcgByte, signal: np.ndarray, method: str = "longest") -> Encoded:
    """The ids of a signal (C, L), and how far decode(encode(x)) is from x. Raises UserError as `EcgByte.encode`."""
    ids = tokenizer.encode(signal, method)
    assert isinstance(ids, np.ndarray)
    low, high = float(signal.min()), float(signal.max())
    rows, samples = signal.shape
    off = tokenizer.decode(ids, (rows, samples), low, high) - signal
    rms, most = float(np.sqrt((off**2).mean())), float(np.abs(off).max())
    return Encoded(ids, (rows, samples), low, high, rms, most)


def encode_by_all(tokenizer: EcgByte, signal: np.ndarray) -> dict[str, Encoded]:
    """`encode` by "longest", and by "merges" where the merges have an order."""
    return {method: encode(tokenizer, signal, method) for method in _methods(tokenizer)}


def token_of_sample(tokenizer: EcgByte, encoded: Encoded) -> np.ndarray:
    """Which of the N tokens covers each sample: int64 (C, L)."""
    lengths = tokenizer.lengths[encoded.ids]
    return np.repeat(np.arange(len(lengths)), lengths).reshape(encoded.shape)


def totals(encoded: Iterable[dict[str, Encoded]]) -> dict[str, Any]:
    """Totals as JSON takes them, over recordings of equal shape, each encoded by one method or by several.

    Symbols, ids and compression (symbols for each id) by method, the RMS and the greatest error of all samples, both in
    units of the recordings and as parts of each one's range. At least one recording; no ids are held.
    """
    symbols, tokens, errors = 0, Counter[str](), []
    for by_method in encoded:
        tokens.update({method: len(one.ids) for method, one in by_method.items()})
        first = next(iter(by_method.values()))
        symbols += first.shape[0] * first.shape[1]
        errors.append((first.rms_error, first.max_error, first.high - first.low or 1.0))
    rms, most, spans = np.array(errors).T
    return {
        "recordings": len(errors),
        "symbols": symbols,
        "tokens": dict(tokens),
        "compression": {method: _rounded(symbols / count) for method, count in tokens.items()},
        "rms_error": _rounded(np.sqrt((rms**2).mean())),
        "max_error": _rounded(most.max()),
        "rms_error_of_range": _rounded(np.sqrt(((rms / spans) ** 2).mean())),
        "max_error_of_range": _rounded((most / spans).max()),
    }


def in_words(figures: dict[str, Any]) -> list[str]:
    """`totals` as lines for a user."""
    compression = ", ".join(f"{value:.4g} ({method})" for method, value in figures["compression"].items())
    unit, part = (
        [format(figures[f"{kind}_error{of}"] * scale, ".3g") for kind in ("rms", "max")]
        for of, scale in (("", 1), ("_of_range", 100))
    )
    return [
        f"symbols for each token: {compression}, on {figures['recordings']} of the recordings",
        f"error of decoding: RMS {unit[0]}, at most {unit[1]}, in units of the recordings "
        f"(RMS {part[0]} %, at most {part[1]} % of a recording's range)",
    ]


def _methods(tokenizer: EcgByte) -> tuple[str, ...]:
    try:
        tokenizer.encode_symbols(tokenizer.symbols[:1].encode("latin-1"), "merges")
    except UserError:
        return METHODS[:1]
    return METHODS


@dataclass(frozen=True)
class Usage:
    """How many bytes each id spells, and how often it occurs: int64 (len(tokenizer),)."""

    lengths: np.ndarray
    counts: np.ndarray

    @property
    def merges(self) -> tuple[np.ndarray, np.ndarray]:
        """`lengths` of the merges alone, each counted once, as `used`."""
        lengths = self.lengths[BYTES:]
        return lengths, np.ones_like(lengths)

    @property
    def used(self) -> tuple[np.ndarray, np.ndarray]:
        """`lengths` and `counts` of the ids that occur: int64."""
        there = self.counts > 0
        return self.lengths[there], self.counts[there]

    def describe(self) -> dict[str, Any]:
        """Sizes and lengths as JSON takes them."""
        facts: dict[str, Any] = {"vocabulary": len(self.lengths), "merges": len(self.lengths) - BYTES}
        facts["merge_lengths"] = _spread(*self.merges)
        if self.counts.any():
            facts |= {"used_ids": int(np.count_nonzero(self.counts)), "used_lengths": _spread(*self.used)}
        return facts


def median(lengths: np.ndarray, counts: np.ndarray) -> float:
    """The median of `lengths`, each taken as often as `counts` says; at least one."""
    order = np.argsort(lengths)
    ends = np.cumsum(counts[order])
    middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
    return float(lengths[order][middle].mean())


def _spread(lengths: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    mean = _rounded(np.average(lengths, weights=counts))
    return {"mean": mean, "median": median(lengths, counts), "max": int(lengths.max())}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
