"""Files of ECG-Byte tokenizers: our JSON, and the reference's pickle, read without executing anything."""

import hashlib
import json
import pickle
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple, NoReturn

from elm_jax.ecg.pickled import read_pickle
from elm_jax.errors import UserError
from elm_jax.folders import read_regular, write_atomic
from elm_jax.json_text import parse_json

BYTES = 256  # ids below are single bytes
VERSION = 1
ENDINGS = (".json", ".pkl")  # ours, the reference's
MOST_BYTES = 256 << 20  # of a file: far above a vocabulary of a language model's size
_EXPECTED = "an ECG-Byte tokenizer (our .json or the reference's .pkl)"


class TokenizerFile(NamedTuple):
    """What a file holds: merge i is what id 256+i spells, `symbols` has the letter of each level, `order` is the order
    of the ids in the file's vocabulary (None: sorted), `settings` say what it was made with."""

    merges: tuple[bytes, ...]
    symbols: str
    order: tuple[int, ...] | None
    settings: dict[str, Any]


def read(path: str | Path) -> TokenizerFile:
    """The tokenizer in a .json (ours) or .pkl (the reference's). Raises UserError for whatever is none."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        _refuse(path, f"a file that ends with {path.suffix!r}", "give a .json or .pkl file")
    data = read_regular(path, _EXPECTED, "check data.ecg_tokenizer", MOST_BYTES)
    return (_from_json if path.suffix == ".json" else _from_pickle)(path, data)


def write(file: TokenizerFile, path: str | Path) -> None:
    """Write a .json (ours, with a checksum) or a .pkl (the reference's, which has no settings).

    Raises UserError for another name, and for symbols other than a to z in a .pkl.
    """
    path = Path(path)
    check_ending(path)
    data = (_to_json if path.suffix == ".json" else _to_pickle)(path, file)
    write_atomic(path, lambda out: out.write(data))


def check_ending(path: Path) -> None:
    """Raise UserError for a name that `write` does not write."""
    if path.suffix not in ENDINGS:
        fix = "give a name that ends with .json or .pkl"
        raise UserError(str(path), f"a name that ends with {path.suffix!r}", "a .json or .pkl file to write", fix)


def _to_json(path: Path, file: TokenizerFile) -> bytes:
    contents: dict[str, Any] = {
        "version": VERSION,
        "symbols": file.symbols,
        "merges": [merge.decode("latin-1") for merge in file.merges],
        "order": file.order,
        "settings": file.settings,
    }
    contents = json.loads(json.dumps(contents))  # as it will be read: keys are texts there
    return (json.dumps({**contents, "sha256": checksum(contents)}) + "\n").encode("ascii")


def _to_pickle(path: Path, file: TokenizerFile) -> bytes:
    if file.symbols != ascii_lowercase:
        fix = "convert to .json"
        raise UserError(str(path), f"a tokenizer of the symbols {file.symbols!r}", f"{ascii_lowercase!r}", fix)
    order = file.order or range(BYTES + len(file.merges))
    spelled = [*(bytes([i]) for i in range(BYTES)), *file.merges]
    vocabulary = {i: _text(spelled[i]) for i in order}
    return pickle.dumps((vocabulary, [(list(merge), BYTES + i) for i, merge in enumerate(file.merges)]), protocol=4)


def _text(spelled: bytes) -> str:
    """As the reference's vocabulary writes what an id spells."""
    return "".join(chr(byte) if byte < 128 else f"<{byte}>" for byte in spelled)


def _from_json(path: Path, data: bytes) -> TokenizerFile:
    try:
        contents = parse_json(data)
    except ValueError as error:
        _refuse(path, f"text that is not JSON ({error})")
    if not isinstance(contents, dict) or contents.get("version") != VERSION:
        _refuse(path, "JSON without our version", "convert a .pkl file, or train one")
    if contents.pop("sha256", None) != checksum(contents):
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


def _from_pickle(path: Path, data: bytes) -> TokenizerFile:
    """The reference's file: (dict id -> text, list of (list of bytes, id)), merges numbered from 256."""
    try:
        contents = read_pickle(data)
    except ValueError as error:
        _refuse(path, f"a pickle that is not a tokenizer ({error})")
    try:
        vocabulary, pairs = contents
        order = list(vocabulary.keys())
        if not all(isinstance(merge, (list, tuple, bytes)) for merge, _ in pairs):
            raise TypeError("a merge that is no list of bytes")  # of a number, bytes() makes so many zeros
        merges, ids = [bytes(merge) for merge, _ in pairs], [i for _, i in pairs]
    except (TypeError, ValueError, AttributeError) as error:
        _refuse(path, f"a pickle of another structure ({error})")
    if not _are_ints(ids) or ids != list(range(BYTES, BYTES + len(ids))):
        _refuse(path, "merges whose ids do not count up from 256")
    source = {"source_sha256": hashlib.sha256(data).hexdigest()}
    return _checked(path, merges, ascii_lowercase, order, source)


def _checked(path: Path, merges: list[bytes], symbols: str, order: Any, settings: dict[str, Any]) -> TokenizerFile:
    """The tokenizer of a file whose parts have the right types; UserError where they do not fit together."""
    if not all(merges):
        _refuse(path, "an empty merge")
    if not 2 <= len(symbols) <= BYTES or len(set(symbols)) != len(symbols):
        _refuse(path, f"symbols {symbols!r} that are not distinct letters")
    every = list(range(BYTES + len(merges)))
    if order is not None and not (isinstance(order, list) and _are_ints(order) and sorted(order) == every):
        _refuse(path, f"a vocabulary that does not list each id of 0 to {every[-1]} once")
    return TokenizerFile(tuple(merges), symbols, None if order is None else tuple(order), settings)


def _are_ints(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def checksum(contents: dict[str, Any]) -> str:
    """What a .json of ours says of its contents, without the key `sha256`."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _refuse(path: Path, found: str, fix: str = "get the file again, or train one") -> NoReturn:
    raise UserError(str(path), found, _EXPECTED, fix) from None
