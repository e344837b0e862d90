"""The ECG-Byte tokenizer: an ECG as letters, one per sample, and runs of letters as ids.

Ids 0..255 are the bytes, id 256+i is merge i. They are ids of the tokenizer's file, not of an LLM.
"""

import hashlib
import importlib
import json
import pickle
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from elm_jax.compat import check, enabled
from elm_jax.errors import UserError

if TYPE_CHECKING:
    from elm_jax._bpe import Encoder

BYTES = 256
VERSION = 1
NORM_EPS = 1e-6


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
        path = Path(path)
        readers = {".json": _from_json, ".pkl": _from_pickle}
        if path.suffix not in readers:
            _refuse(path, f"a file that ends with {path.suffix!r}", "give a .json or .pkl file")
        try:
            data = path.read_bytes()
        except OSError as error:
            _refuse(path, f"no readable file ({error.strerror})", "check data.ecg_tokenizer")
        return readers[path.suffix](path, data)

    @classmethod
    def train(cls, symbols: Sequence[bytes], num_merges: int, across_records: bool = False) -> "EcgByte":
        """A tokenizer with up to `num_merges` merges learnt from records of symbols; fewer where no pair is left.

        Byte-pair training: the commonest pair of neighbours becomes a new symbol, again and again; pairs are counted
        as windows ("aaaa" has three), and of equally common ones the smallest ids win. `across_records` lets a pair
        reach from one record into the next, as the reference does. Ctrl-C keeps what has been learnt.
        Raises UserError for a number below 0 and when the extension is not built.
        """
        if num_merges < 0:
            raise UserError("EcgByte.train", f"num_merges = {num_merges}", "0 or more", "raise it")
        spelled, _, _ = _extension().train(list(symbols), num_merges, across_records)
        return cls(spelled, settings={"records": len(symbols), "across_records": across_records})

    def save(self, path: str | Path) -> None:
        """Write our JSON format, with a checksum of its contents; `path` must end with .json."""
        path = Path(path)
        if path.suffix != ".json":
            fix = "give a name that ends with .json"
            raise UserError(str(path), f"a name that ends with {path.suffix!r}", "a .json file to write", fix)
        contents = {
            "version": VERSION,
            "symbols": self.symbols,
            "merges": [merge.decode("latin-1") for merge in self.merges],
            "order": None if self.order == tuple(range(len(self))) else self.order,
            "settings": self.settings,
        }
        path.write_text(json.dumps({**contents, "sha256": _checksum(contents)}) + "\n", encoding="ascii")

    def encode(self, signals: np.ndarray, method: str = "longest") -> np.ndarray | list[np.ndarray]:
        """The ids of one recording (C, L) as int32 (N,), or a list of such for (B, C, L).

        Amplitudes are taken relative to the minimum and maximum over all leads of a recording, so units do
        not matter. `method` "longest" takes the longest entry that matches at each place, left to right.
        Raises UserError for another method, another shape, and samples that are not finite.
        """
        if method != "longest":
            raise UserError("EcgByte.encode", f"method {method!r}", "'longest'", "leave method out")
        signals = np.asarray(signals)
        if signals.ndim == 3:
            return [self.encode_symbols(self.to_symbols(signal)) for signal in signals]
        return self.encode_symbols(self.to_symbols(signals))

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

    def to_symbols(self, signal: np.ndarray) -> bytes:
        """The letters of one recording (C, L), lead after lead: min-max normalised, then cut into levels."""
        signal = np.asarray(signal, np.float64)
        if signal.ndim != 2 or signal.size == 0:
            found = f"a signal of shape {signal.shape}"
            raise UserError("EcgByte.encode", found, "(C, L) or (B, C, L), not empty", "check the signal")
        if not np.isfinite(signal).all():
            found = f"{np.count_nonzero(~np.isfinite(signal))} samples that are not finite"
            raise UserError("EcgByte.encode", found, "finite samples", "mend the recording or leave it out")
        low, high = signal.min(), signal.max()
        return self._spelt((signal - low) / (high - low + NORM_EPS))

    def encode_unit(self, unit: np.ndarray) -> np.ndarray:
        """The ids int32 (N,) of a signal (C, L) that is scaled to [0, 1] already. See `encode`."""
        return self.encode_symbols(self._spelt(unit))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the symbols and the merges."""
        return hashlib.sha256(b"\0".join((self.symbols.encode(), *self.merges))).hexdigest()[:32]

    def _spelt(self, unit: np.ndarray) -> bytes:
        return self._byte_of_level[self.quantize(unit)].tobytes()

    def quantize(self, unit: np.ndarray) -> np.ndarray:
        """Levels (int64, shape of `unit`) of amplitudes in [0, 1]; those outside count as the nearer edge."""
        count = len(self.symbols)
        return np.minimum(np.floor(np.clip(unit, 0.0, 1.0) * count).astype(np.int64), count - 1)

    def encode_symbols(self, symbols: bytes) -> np.ndarray:
        """The ids int32 (N,) of a byte string. Raises UserError when the extension is not built."""
        return np.frombuffer(self._encoder.encode(symbols), "<u4").astype(np.int32)

    def spell(self, ids: np.ndarray | Sequence[int]) -> bytes:
        """The byte string of `ids` (N,): the inverse of encode_symbols. Raises UserError for unknown ids."""
        known: list[int] = np.asarray(ids, np.int64).tolist()
        for i in known:
            if not 0 <= i < len(self):
                found, expected = f"id {i}", f"ids from 0 to {len(self) - 1}"
                raise UserError("EcgByte.decode", found, expected, "use the tokenizer that made the ids")
        return b"".join(self._pieces[i] for i in known)

    @cached_property
    def _pieces(self) -> tuple[bytes, ...]:
        return (*(bytes([i]) for i in range(BYTES)), *self.merges)

    @cached_property
    def _byte_of_level(self) -> np.ndarray:
        return np.frombuffer(self.symbols.encode("latin-1"), np.uint8)

    @cached_property
    def _level_of_byte(self) -> np.ndarray:
        levels = np.full(BYTES, -1, np.int64)
        levels[self._byte_of_level] = np.arange(len(self.symbols))
        return levels

    @cached_property
    def _encoder(self) -> "Encoder":
        return _extension().Encoder([(merge, BYTES + i) for i, merge in enumerate(self.merges)])


def _extension() -> Any:
    """The compiled module. Raises UserError where it is not built."""
    try:
        return importlib.import_module("elm_jax._bpe")
    except ImportError as error:
        raise UserError(
            "elm_jax._bpe",
            f"no usable compiled extension ({error})",
            "the module built out of rust_bpe, which the symbolic representation needs",
            "install Rust (https://rustup.rs) and run `pip install .` (or `pip install -e .`) again",
        ) from None


def _from_json(path: Path, data: bytes) -> EcgByte:
    try:
        contents = json.loads(data)
    except ValueError as error:
        _refuse(path, f"text that is not JSON ({error})")
    if not isinstance(contents, dict) or contents.get("version") != VERSION:
        _refuse(path, "JSON without our version", "convert a .pkl file, or train one")
    checksum = contents.pop("sha256", None)
    if checksum != _checksum(contents):
        _refuse(path, "contents that do not fit their checksum", "get the file again: it was changed or cut")
    symbols, merges, settings = contents.get("symbols"), contents.get("merges"), contents.get("settings")
    if not (isinstance(symbols, str) and isinstance(merges, list) and isinstance(settings, dict)):
        _refuse(path, "symbols, merges or settings of another type")
    try:
        symbols.encode("latin-1")
        spelt = [merge.encode("latin-1") for merge in merges]
    except (UnicodeEncodeError, AttributeError):
        _refuse(path, "a symbol or merge that is not made of bytes")
    return _checked(path, spelt, symbols, contents.get("order"), settings)


class _OnlyContainers(pickle.Unpickler):
    """Reads dicts, lists, tuples, numbers and strings; a pickle that names anything else is refused.

    A pickle can call only what it names, and all names pass through the two methods here.
    """

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside the file")


def _from_pickle(path: Path, data: bytes) -> EcgByte:
    """The reference's file: (dict id -> text, list of (list of bytes, id)), merges numbered from 256."""
    try:
        contents = _OnlyContainers(BytesIO(data)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        _refuse(path, f"a pickle that is not a tokenizer ({error})")
    try:
        vocabulary, pairs = contents
        order = list(vocabulary.keys())
        merges, ids = [bytes(merge) for merge, _ in pairs], [i for _, i in pairs]
    except (TypeError, ValueError, AttributeError) as error:
        _refuse(path, f"a pickle of another structure ({error})")
    if ids != list(range(BYTES, BYTES + len(ids))):
        _refuse(path, "merges whose ids do not count up from 256")
    source = {"source_sha256": hashlib.sha256(data).hexdigest()}
    return _checked(path, merges, ascii_lowercase, order, source)


def _checked(path: Path, merges: list[bytes], symbols: str, order: Any, settings: dict[str, Any]) -> EcgByte:
    """The tokenizer of a file whose parts have the right types; UserError where they do not fit together."""
    if not all(merges):
        _refuse(path, "an empty merge")
    if len(symbols) < 2 or len(set(symbols)) != len(symbols):
        _refuse(path, f"symbols {symbols!r} that are not distinct letters")
    every = list(range(BYTES + len(merges)))
    if order is not None and not (isinstance(order, list) and _are_ints(order) and sorted(order) == every):
        _refuse(path, f"a vocabulary that does not list each id of 0 to {every[-1]} once")
    return EcgByte(merges, symbols, order, settings)


def _are_ints(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _checksum(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _refuse(path: Path, found: str, fix: str = "get the file again, or train one") -> NoReturn:
    expected = "an ECG-Byte tokenizer (our .json or the reference's .pkl)"
    raise UserError(str(path), found, expected, fix) from None
