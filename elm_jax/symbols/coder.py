"""The ECG-Byte tokenizer: an ECG as letters, one per sample, and runs of letters as ids.

Ids 0..255 are the bytes, id 256+i is merge i. They are ids of the tokenizer's file, not of an LLM.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np

from elm_jax.compat import check, enabled
from elm_jax.errors import UserError, nearest, refused
from elm_jax.symbols import files as symbolic_files
from elm_jax.symbols.files import BYTES, TokenizerFile

if TYPE_CHECKING:
    from elm_jax._bpe import Encoder

METHODS = ("longest", "merges")
NORM_EPS = 1e-6

Progress = Callable[[int, int, int], object]


class EcgByte:
    """A trained tokenizer: its merges, the letters that stand for amplitudes, and what it was made with.

    `merges[i]` is the byte string that id 256+i spells. `order` is the order of the ids in the vocabulary of
    the file that was read; the reference gives its LLM tokens in that order, which is not sorted there.
    """

    def __init__(
        self,
        merges: Sequence[bytes],
        symbols: str = ascii_lowercase,
        order: Sequence[int] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.merges = tuple(merges)
        self.symbols = symbols
        self.order = tuple(range(len(self))) if order is None else tuple(order)
        self.settings = dict(settings or {})

    def __len__(self) -> int:
        return BYTES + len(self.merges)

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader workers get the tokenizer by pickle; the compiled encoder is built anew there.
        return type(self), (self.merges, self.symbols, self.order, self.settings)

    @classmethod
    def load(cls, path: str | Path) -> "EcgByte":
        """Read a tokenizer: .json is our format, .pkl the reference's, read without executing anything.

        Raises UserError for any other file and for contents that are not a tokenizer.
        """
        return cls(*symbolic_files.read(path))

    def save(self, path: str | Path) -> None:
        """Write our format, with a checksum (.json), or the reference's, without the settings (.pkl).

        Raises UserError for any other name, and for symbols that the reference does not have.
        """
        order = None if self.order == tuple(range(len(self))) else self.order
        symbolic_files.write(TokenizerFile(self.merges, self.symbols, order, self.settings), path)

    @classmethod
    def train(
        cls,
        symbols: Sequence[bytes],
        num_merges: int,
        across_records: bool = False,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> "EcgByte":
        """A tokenizer with up to `num_merges` merges learnt from records of symbols; fewer where no pair is left.

        Byte-pair training: the commonest pair of neighbours becomes a new symbol, again and again; pairs are counted
        as windows ("aaaa" has three), and of equally common ones the smallest ids win. `across_records` lets a pair
        reach from one record into the next, as the reference does, and keeps one thread busy; `threads` (None: all
        cores) make no difference to the merges. `progress` is called now and then with the merges so far, the count
        of the last pair and the tokens that are left. Ctrl-C keeps what has been learnt, and `settings` say so.
        Memory: up to 17 bytes for each symbol, and some 150 for each pair of neighbours ever met, which are few beside
        the symbols of many ECGs. Raises UserError for a number below 0, fewer than 1 thread, a record of some 2**32
        symbols (with `across_records`: so many in all), and when the extension is not built.
        """
        if num_merges < 0:
            raise UserError("EcgByte.train", f"num_merges = {num_merges}", "0 or more", "raise it")
        learn, most = _extension().train, sum(map(len, symbols))  # each merge leaves at least one symbol fewer
        workers = _workers(threads)
        with refused("EcgByte.train", "", "fewer", "train on fewer recordings", ValueError):
            learnt = learn(list(symbols), min(num_merges, most), across_records, workers, progress)
        merges, _, before, after, interrupted = learnt
        settings = {"records": len(symbols), "across_records": across_records, "symbols": before, "tokens": after}
        return cls(merges, settings=settings | ({"interrupted_of": num_merges} if interrupted else {}))

    def encode(
        self, signals: np.ndarray, method: str = "longest", eps: float = NORM_EPS, threads: int | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """The ids of one recording (C, L) as int32 (N,), or a list of such for (B, C, L).

        Amplitudes are taken relative to the minimum and the maximum (plus `eps`) over all leads of a recording, so
        units do not matter. `method` "longest" takes the longest entry that matches at each place, left to right, as
        the reference does; "merges" applies all merges in the order in which they were learnt, as training did.
        float32 and float64 arrays are read where they are; a batch is spread over `threads` (None: all cores), and
        other Python threads go on meanwhile. Raises UserError for another method, another shape, samples that are not
        finite, merges that have no order, and when the extension is not built.
        """
        if method not in METHODS:
            fix = nearest(method, METHODS) or "leave method out"
            raise UserError("EcgByte.encode", f"method {method!r}", " or ".join(map(repr, METHODS)), fix)
        signals = _readable(signals, (2, 3))
        if signals.ndim == 3 and not len(signals):
            return []
        records = len(signals) if signals.ndim == 3 else 1
        workers = 1 if records == 1 else _workers(threads)
        data, lengths = self._call(
            lambda encoder: encoder.encode_signals(signals, records, eps, method == "merges", workers)
        )
        ids = np.frombuffer(data, np.int32)
        return np.split(ids, np.cumsum(lengths[:-1])) if signals.ndim == 3 else ids

    def decode(
        self, ids: np.ndarray, shape: tuple[int, int], low: float, high: float, compat: tuple[str, ...] = ()
    ) -> np.ndarray:
        """The signal (C, L) float64 that `ids` (N,) spell, `low` and `high` being its minimum and maximum.

        A level stands for the middle of its interval. Under compat "dequantize_by_25" the first level stands
        for `low` and the last for `high`, which widens every signal. Raises UserError for ids that the
        tokenizer does not have, that spell anything but levels, or that do not fill `shape`.
        """
        check(compat)
        spelt = np.frombuffer(self.spell(ids), np.uint8)
        if spelt.size != np.prod(shape):
            found, expected = f"ids that spell {spelt.size} samples", f"{np.prod(shape)} for {tuple(shape)}"
            raise UserError("EcgByte.decode", found, expected, "give the shape that was encoded")
        levels = self._level_of_byte[spelt]
        if (levels < 0).any():
            found, expected = f"byte {spelt[levels < 0][0]}", f"ids that spell letters of {self.symbols!r}"
            raise UserError("EcgByte.decode", found, expected, "leave out ids that stand for no amplitude")
        count = len(self.symbols)
        by_edges = enabled("dequantize_by_25", compat)
        unit = levels / (count - 1) if by_edges else (levels + 0.5) / count
        # The epsilon of the encoder (a millionth of a unit) is left out: it is far below half a level.
        return (low + unit * (high - low)).reshape(shape)

    def to_symbols(self, signal: np.ndarray, eps: float = NORM_EPS) -> bytes:
        """The letters of one recording (C, L), lead after lead: min-max normalised, then cut into levels."""
        signal = _readable(signal, (2,))
        return self._call(lambda encoder: encoder.symbols_of(signal, eps))

    def encode_symbols(self, symbols: bytes, method: str = "longest") -> np.ndarray:
        """The ids int32 (N,) of a byte string. Raises UserError as `encode` does."""
        return np.frombuffer(self._call(lambda encoder: encoder.encode(symbols, method == "merges")), np.int32)

    def spell(self, ids: np.ndarray | Sequence[int]) -> bytes:
        """The byte string of `ids` (N,): the inverse of encode_symbols. Raises UserError for what is no id."""
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            found = f"ids of shape {array.shape} and dtype {array.dtype}"
            raise UserError("EcgByte.decode", found, "whole numbers (N,)", "give what encode returned")
        known: list[int] = array.tolist()
        for i in known:
            if not 0 <= i < len(self):
                found, expected = f"id {i}", f"ids from 0 to {len(self) - 1}"
                raise UserError("EcgByte.decode", found, expected, "use the tokenizer that made the ids")
        return b"".join(self._pieces[i] for i in known)

    @cached_property
    def lengths(self) -> np.ndarray:
        """How many bytes each id spells: int64 (len(self),)."""
        return np.array([1] * BYTES + [len(merge) for merge in self.merges])

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the symbols and the merges."""
        told = repr((self.symbols, self.merges))
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    @cached_property
    def _pieces(self) -> tuple[bytes, ...]:
        return (*(bytes([i]) for i in range(BYTES)), *self.merges)

    @cached_property
    def _level_of_byte(self) -> np.ndarray:
        levels = np.full(BYTES, -1, np.int64)
        levels[np.frombuffer(self.symbols.encode("latin-1"), np.uint8)] = np.arange(len(self.symbols))
        return levels

    @cached_property
    def _encoder(self) -> "Encoder":
        return _extension().Encoder(list(self.merges), self.symbols.encode("latin-1"))

    def _call(self, work: Callable[["Encoder"], Any]) -> Any:
        expected = "finite samples, eps of 0 or more, merges that a training gives"
        fix = "mend or leave out the recording, or use another tokenizer"
        with refused("EcgByte.encode", "", expected, fix, ValueError):
            return work(self._encoder)


def _readable(signals: np.ndarray, dimensions: tuple[int, ...]) -> np.ndarray:
    """`signals` as the extension reads them: float32 or float64, contiguous; copied only where they are not so."""
    signals = np.asarray(signals)
    if signals.ndim not in dimensions or 0 in signals.shape[-2:] or signals.dtype.kind not in "fiub":
        found = f"a signal of shape {signals.shape} and dtype {signals.dtype}"
        raise UserError("EcgByte.encode", found, "numbers (C, L) or (B, C, L), not empty", "check the signal")
    return np.require(signals, np.float32 if signals.dtype == np.float32 else np.float64, ["C", "A"])


def _workers(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise UserError("EcgByte", f"threads = {threads}", "1 or more, or None for all cores", "raise it")
    return cores() if threads is None else threads


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _extension() -> Any:
    """The compiled module. Raises UserError where it is not built."""
    expected = "the module built out of rust_bpe, which the symbolic representation needs"
    fix = "install Rust (https://rustup.rs) and run `pip install .` (or `pip install -e .`) again"
    with refused("elm_jax._bpe", "no usable compiled extension", expected, fix, ImportError):
        return importlib.import_module("elm_jax._bpe")
