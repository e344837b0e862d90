"""Text -> token ids, where only we decide what is a special token.

A `Vocabulary` is made once per tokenizer (about half a second for 150k tokens) and kept as long as it lives.
It encodes with its own copies of the backend: the switch that tells special tokens from text is state of the
backend, and loader threads share the user's tokenizer.
"""

import base64
import contextlib
import copy
import functools
import json
import re
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from elm_jax.errors import UserError, one_line, refused
from elm_jax.folders import check_regular, read_regular
from elm_jax.json_text import parse_json

SIGNAL_TOKEN = "<signal>"
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_TEMPLATES = "additional_chat_templates/*.jinja"
_TABLE = "precompiled_charsmap"  # of a normalizer: text -> text
_MOST_BYTES, _MOST_GROWTH = 256 << 20, 1000  # of tokenizer.json; characters for one, where it replaces some
_MOST_IDS, _WITH_IDS = 1 << 22, ("tokenizer.json", "vocab.json", "added_tokens.json")
THINK_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

_CACHED_TEXTS = 1024  # headers and system prompts always; questions and answers as often as they repeat
_FORM_FIX = 'use the family of the model, or "plain" for a base model (it needs an eos token)'
_ECG_TOKEN = re.compile(r"signal_\d+")  # of the symbolic representation: in a message it is text
_KNOWN: weakref.WeakKeyDictionary[Any, "Vocabulary"] = weakref.WeakKeyDictionary()


def load_tokenizer(source: str | Path, where: str = "llm.name", **options: Any) -> Any:
    """The transformers tokenizer in a local folder (or, with `options` that say so, of a name); the one place that
    loads them: code that comes with a tokenizer is never run.

    Raises:
        UserError: none is there, it cannot be read, or it is nothing without its own code; names `where`.
    """
    from transformers import AutoTokenizer

    _check_files(Path(source))
    found = f"{source} without a tokenizer that can be read"
    with refused_panics(where, found, "tokenizer.json and its config", "give a folder that has them"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def _check_files(folder: Path) -> None:
    """Raise UserError for files of a local tokenizer that would be waited for, or whose text would have no end."""
    for file in (file for pattern in (*TOKENIZER_FILES, _TEMPLATES) for file in folder.glob(pattern)):
        check_regular(file, "a file of a tokenizer")
    for file in (folder / name for name in _WITH_IDS):
        if not file.is_file():
            continue
        data = read_regular(file, "a tokenizer", "give the model's own", _MOST_BYTES)
        with refused(file, "", "a tokenizer", "give the model's own"):
            spec = parse_json(data)
        for part in ("normalizer", "decoder"):
            growth = _growth(spec.get(part)) if isinstance(spec, dict) else 1
            if growth > _MOST_GROWTH:
                found = f"a {part} that writes {growth} characters for one"
                raise UserError(file, found, f"at most {_MOST_GROWTH}", "give the model's own tokenizer")
        largest = max(_ids(spec), default=0)
        if largest >= _MOST_IDS:
            fix = "give the model's own tokenizer"
            raise UserError(file, f"a token with the id {largest}", f"ids below {_MOST_IDS}", fix)


def _ids(spec: Any) -> Iterator[int]:
    """The ids that a tokenizer's file gives its tokens: tokenizer.json, or one of nothing but {token: id}.

    The library walks from 0 to the largest, and takes memory for each that is missing, until the process is aborted.
    """
    parts = spec if isinstance(spec, dict) else {}
    model, added = parts.get("model"), parts.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    named = [*parts.values(), *(vocabulary.values() if isinstance(vocabulary, dict) else ())]
    named += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    yield from (found for found in named if isinstance(found, int))


def _growth(part: Any) -> int:
    """Characters that a part of a tokenizer may write for one that it reads; above the bound it counts no further.

    Replacements multiply where one may find what another has written.
    """
    most, others = 1, 1  # at all; of characters that are not in `written`
    written: dict[str, int] = {}
    for step in _steps(part):
        pattern, longest = step.get("pattern"), _longest(step)
        literal = pattern.get("String") if step.get("type") == "Replace" and isinstance(pattern, dict) else None
        content = step.get("content")
        if isinstance(literal, str) and literal and isinstance(content, str):
            grown = longest * max(written.get(c, others) for c in literal)
            written.update({c: max(grown, written.get(c, others)) for c in set(content)})
            most = max(most, grown)
        else:
            most = others = longest * most
            written = {}
        if most > _MOST_GROWTH:
            break
    return most


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """What a normalizer or a decoder does, one after another."""
    if isinstance(part, dict):
        yield part
        part = [value for name, value in part.items() if name != "pattern"]
    for inner in part if isinstance(part, list) else ():
        yield from _steps(inner)


def _longest(step: dict[str, Any]) -> int:
    """The length of the longest text that a step may write, at least 1."""
    texts = [text for name, text in step.items() if isinstance(text, str) and name not in ("type", "pattern", _TABLE)]
    table = b""  # of SentencePiece: the size of an index, the index, texts that end with 0
    with contextlib.suppress(TypeError, ValueError):  # which is refused where it is read
        table = base64.b64decode(step.get(_TABLE, ""))
    return max(1, *map(len, texts), *map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))


@contextlib.contextmanager
def refused_panics(where: str, found: str, expected: str, fix: str) -> Iterator[None]:
    """`errors.refused`, of whatever the libraries of tokenizers raise, bare Exceptions and panics among it."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which nobody can import
            raise
        raise UserError(where, f"{found} ({one_line(str(error))[:160]})", expected, fix) from error


def _broken(content: str | list[int]) -> contextlib.AbstractContextManager[None]:
    found = f"a tokenizer that fails at {content[:40]!r}"
    return refused_panics("llm.name", found, "one that has ids for every text", "give the model's own, whole tokenizer")


def vocabulary(tokenizer: Any) -> "Vocabulary":
    """The Vocabulary of a fast transformers tokenizer, made anew when tokens were added to it since; one is its own."""
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    known = _KNOWN.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _KNOWN[tokenizer] = Vocabulary(tokenizer)
    return known


class Vocabulary:
    """`bos`, `eos`: the tokenizer's own, None where it has none; `size`: how many tokens it had.

    `spaces_runs`: whether it puts a space before every run of text, as Llama 2's does.

    Raises UserError for a tokenizer without a `tokenizers` backend, and where the backend fails at a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = backend_of(tokenizer)
        self.size = len(tokenizer)
        self.bos: str | None = tokenizer.bos_token
        self.eos: str | None = tokenizer.eos_token
        spec = json.loads(backend.to_str())
        for token in spec["added_tokens"]:
            # Qwen3 has <think> as an ordinary added token; in a user's message it is text all the same.
            content = token["content"]
            token["special"] |= content in (SIGNAL_TOKEN, *THINK_TOKENS) or bool(_ECG_TOKEN.fullmatch(content))
        spec["truncation"] = spec["padding"] = None
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._plain.encode_special_tokens = True
        added = self._plain.get_added_tokens_decoder().items()
        special = {token.content: i for i, token in added if token.special}
        special.pop(tokenizer.unk_token, None)
        self._control_ids = frozenset(special.values())
        self._controls = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        with _broken("a"):
            first = self._plain.encode("a", add_special_tokens=False).tokens
        self.spaces_runs = "".join(first).startswith("\u2581")
        ids = {tag: self.id(tag) for tag in THINK_TOKENS}
        self.tags = {tag: token for tag, token in ids.items() if token is not None}
        self.encode = functools.lru_cache(_CACHED_TEXTS)(self._encode)
        self.template = functools.lru_cache(_CACHED_TEXTS)(self._template)

    @functools.cached_property
    def _special(self) -> tokenizers.Tokenizer:
        backend = copy.deepcopy(self._plain)
        backend.encode_special_tokens = False
        return backend

    def id(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        return self._plain.token_to_id(token)

    def require(self, token: str, needed_for: str, fix: str) -> int:
        """The id of a token; UserError if there is no such token."""
        found = self.id(token)
        if found is None:
            raise UserError("llm.name", f"a tokenizer without {token}", f"the tokens of {needed_for}", fix)
        return found

    def tagged(self, text: str) -> list[tuple[str, int | None]]:
        """The text cut around the think and answer tags that are tokens here, each with its id or None."""
        if not self.tags or "<" not in text:
            return [(text, None)]
        pieces = re.split(f"({'|'.join(map(re.escape, self.tags))})", text)
        return [(piece, self.tags.get(piece)) for piece in pieces]

    def text(self, ids: list[int]) -> str:
        """The string of some ids, special tokens written out."""
        with _broken(ids):
            return self._plain.decode(ids, skip_special_tokens=False)

    def _template(self, text: str, tokens: tuple[str, ...]) -> tuple[tuple[str, int | None], ...]:
        """The text cut around some special tokens, each piece with its id, or None where it is plain text.

        The tokens "{bos}" and "{eos}" stand for the tokenizer's own; without a bos nothing is written for it.
        """
        pieces: list[tuple[str, int | None]] = []
        for piece in re.split(f"({'|'.join(map(re.escape, tokens))})", text):
            if piece not in tokens:
                pieces += [(piece, None)] if piece else []
                continue
            token = {"{bos}": self.bos or "", "{eos}": self.eos or "an eos token"}.get(piece, piece)
            if token:
                pieces.append((token, self.require(token, "the chat form", _FORM_FIX)))
        return tuple(pieces)

    def _encode(self, text: str, specials: bool = False) -> tuple[int, ...]:
        """The ids of a text; special tokens written in it are read as such only with `specials`."""
        try:
            backend = self._special if specials else self._plain
            ids = tuple(backend.encode(text, add_special_tokens=False).ids)
            return ids if specials or self._control_ids.isdisjoint(ids) else self._spelled(text)
        except BaseException:
            with _broken(text):  # whose making costs a tenth of the ids
                raise

    def _spelled(self, text: str) -> tuple[int, ...]:
        """The ids of a text whose ordinary merges make up a special token: cut inside that token's name."""
        cuts = [0, *(name.start() + 1 for name in self._controls.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        return tuple(i for piece in pieces for i in self._plain.encode(piece, add_special_tokens=False).ids)


def backend_of(tokenizer: Any) -> tokenizers.Tokenizer:
    """The `tokenizers` backend of a transformers tokenizer; UserError for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        found = f"a {type(tokenizer).__name__} without a fast backend"
        raise UserError("llm.name", found, "a fast tokenizer", "use a folder that has tokenizer.json")
    return backend
