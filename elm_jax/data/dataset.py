"""One split, ready to be read: records, rendered to tokens, with their signals."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.config import DataConfig
from elm_jax.data import lengths
from elm_jax.data.batch import Conversation, Shown
from elm_jax.data.ecg_tokens import EcgTokens
from elm_jax.data.packing import LengthIndex
from elm_jax.data.represent import NOISE, SignalSpec
from elm_jax.data.retrieving import Sought
from elm_jax.data.samples import Samples
from elm_jax.data.sources import Record
from elm_jax.errors import UserError, refused
from elm_jax.folders import MOST_JSON, read_regular
from elm_jax.registry import qualified_name
from elm_jax.text.prompts import PROMPTS
from elm_jax.text.render import Rendered, TextSpec, to_prompts, to_tokens
from elm_jax.text.turns import CONVERSATIONS, Words, with_words
from elm_jax.text.vocabulary import Vocabulary, vocabulary

INDEX_VERSION = 3  # of the fingerprint, which checkpoints hold
LOOKED_FOR = 20_000  # records whose recordings are looked for before a run
PLAIN = Samples()


def text_spec(data: DataConfig, family: str, signal_tokens: int, phase: str, compat: tuple[str, ...]) -> TextSpec:
    """What `data.*` says of the text. `data.system_prompt` may be a text, a file, or the name of one of ours."""
    return TextSpec(
        family,
        0 if data.perturb == "only_text" else signal_tokens,
        read_system_prompt(data.system_prompt),
        phase,
        data.explicit_thinking,
        data.max_len,
        compat,
    )


def read_system_prompt(text_or_path: str | None) -> str | None:
    """The prompt itself; a value that ends in .txt or .md names a file, one of `PROMPTS` what is written there.

    Raises:
        UserError: the file is missing.
    """
    if not text_or_path or not text_or_path.endswith((".txt", ".md")):
        return PROMPTS.get(text_or_path or "", text_or_path) or None
    path = Path(text_or_path)
    if not path.is_file():
        raise UserError("data.system_prompt", f"no file {path}", "a text, or a file that exists", "correct the path")
    with refused("data.system_prompt", str(path), "a text file in UTF-8", "convert it", OSError, UnicodeDecodeError):
        return read_regular(path, "a text", "correct the path", MOST_JSON).decode("utf-8-sig").strip()


class Dataset:
    """Records with the tokenizer and the two specs. Picklable, so that worker processes can hold it.

    `augments`: whether ECGs change from epoch to epoch, as `data.augment_*` ask; only training's do. `samples`: what
    of each record is learnt.
    """

    def __init__(
        self, records: Sequence[Record], tokenizer: Any, text: TextSpec, signal: SignalSpec, augments: bool = False,
        samples: Samples = PLAIN,
    ) -> None:  # fmt: skip
        self.records, self.tokenizer, self.text, self.signal = records, tokenizer, text, signal
        self.augments, self.samples = augments, samples

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("words", "_head", "_written")}

    @functools.cached_property
    def words(self) -> Vocabulary:
        """The tokenizer's, which is not asked again how many tokens it has: counting what was added takes as long as
        a conversation."""
        return vocabulary(self.tokenizer)

    def render(
        self, index: int, ecgs: Sequence[Shown] | None = None, length: int | None = None, text: Any = None
    ) -> Rendered:
        """The tokens of one record. Where ECGs are symbols they are written into them: `ecgs`, or those of the files.

        `length`: the most tokens that the record may have, where that is less than `text.max_len`; symbols that
        exceed it are cut. `text`: in place of the record's own.

        Raises:
            UserError: the record has no answer, or does not fit; names the record.
        """
        with self.naming(index) as record:
            record = record if text is None else replace(record, text=text)
            if self.symbols is None:
                return self.rendered(index, record, self.text.max_len)
            shown = self.signals(index) if ecgs is None else ecgs
            written, limit = [ecg[self.signal.view] for ecg in shown], self.text.max_len
            render = functools.partial(self.rendered, index, record)
            return self.symbols.expand(render, written, limit, length, self.varies, self.text.compat)

    @contextlib.contextmanager
    def naming(self, index: int, record: Record | None = None) -> Iterator[Record]:
        """The record; it is named by errors of what is done with it."""
        record = self.records[index] if record is None else record
        try:
            yield record
        except UserError as error:
            raise UserError(f"record {record.id}", error.found, error.expected, error.fix) from error

    def rendered(self, index: int, record: Record, max_len: int | None) -> Rendered:
        """The tokens of a record, with a placeholder where there are symbols. Raises UserError as `render`."""
        ecgs, spec = self._ecgs(record), replace(self.text, max_len=max_len)
        return to_tokens(self._words(index, record, ecgs), self.words, spec, ecgs)

    def _words(self, index: int, record: Record, ecgs: int) -> Any:
        """The record's text, with what views write of its ECGs."""
        if not ecgs or not self.signal.writes:
            return record.text
        drawn = [self.key(index, place) if path == NOISE else 0 for place, path in enumerate(record.ecg_paths)]
        sought = record.sought or record.ecg_paths
        about = frozenset(record.patient.split("+") if self.signal.retrieval else ())
        words = [
            self._written(path, key, repr([self.signal.stamp(one) for one in (path, other)]), other, about)
            for path, key, other in zip(record.ecg_paths, drawn, sought, strict=True)
        ]
        return with_words(record.text, words, self.text.prompt)

    @functools.cached_property
    def _written(self) -> Callable[[str, int, str, str, frozenset[str]], Words]:
        """What views write of the ECG at a path, by what its noise is drawn from, the stamp of its file, and for which
        ECG of which patients others are retrieved: an ECG of many records is measured once."""

        def written(path: str, key: int, _: str, other: str, about: frozenset[str]) -> Words:
            return self.signal.words(path, key, self.signal.sought(other, key, about))

        return functools.lru_cache(LOOKED_FOR)(written)

    @property
    def reads_ecgs(self) -> bool:
        """Whether an ECG decides how long its record is."""
        return self.symbols is not None or bool(self.text.signal_tokens and self.signal.writes)

    @property
    def symbols(self) -> EcgTokens | None:
        """What makes ECGs tokens, where they are such."""
        return self.signal.tokens if self.text.signal_tokens else None

    def prompts(self, index: int) -> list[tuple[Rendered, str]]:
        """For each answer of one record: the prompt up to it, with the true history, and the answer.

        Where ECGs are symbols, one placeholder stands for each: `ecg_tokens.write_prompt` puts them in.
        """
        with self.naming(index) as record:
            ecgs, spec = self._ecgs(record), replace(self.text, max_len=None)
            return to_prompts(self._words(index, record, ecgs), self.words, spec, ecgs)

    def room(self, prompt: Rendered) -> int:
        """The tokens that one of `prompts` may have, whatever its ECGs are: symbols keep `data.min_ecg_tokens`."""
        kept = max(self.symbols.least, 1) if self.symbols is not None else 1
        return len(prompt.ids) + len(prompt.signal_positions) * (kept - 1)

    def _ecgs(self, record: Record) -> int:
        if record.problem is not None:
            raise record.problem
        if isinstance(record.text, str) and self.text.phase != "pretrain":
            found = f"phase {self.text.phase} and text {record.text[:40]!r}, an answer without a question"
            fix = "give it a question, or train on texts with --config.objective=pretrain"
            raise UserError("text", found, CONVERSATIONS, fix)
        return len(record.ecg_paths) if self.text.signal_tokens else 0

    def signals(self, index: int, epoch: int | None = None) -> list[Shown]:
        """The record's ECGs as the model sees them, each by view, in `epoch` where they are augmented.

        Raises:
            UserError: a file is missing, damaged or of the wrong shape; names it.
        """
        if not self.text.signal_tokens:
            return []
        paths, epoch = self.records[index].ecg_paths, epoch if self.augments else None
        return [self.signal.show(path, self.key(index, place), epoch) for place, path in enumerate(paths)]

    def recordings(self) -> Iterator[tuple[str, int]]:
        """The path of each ECG of each record, and the key that goes with it."""
        for index, record in enumerate(self.records if self.text.signal_tokens else ()):
            yield from ((path, self.key(index, place)) for place, path in enumerate(record.ecg_paths))

    def missing(self, max_bad: float) -> UserError | None:
        """What is wrong with the first recording that is not there or may not be read, where more than the fraction
        `max_bad` of all records have such; looks at LOOKED_FOR records at most, evenly spread, and opens none."""
        found: list[tuple[str, UserError]] = []  # the record and the error
        known: dict[str, UserError | None] = {}
        for i in range(0, len(self) if self.text.signal_tokens else 0, -(-len(self) // LOOKED_FOR)):
            record = self.records[i]
            for path in record.ecg_paths:
                if path not in known:
                    known[path] = self._looked_for(path)
            found += [(record.id, error) for path in record.ecg_paths if (error := known[path])][:1]
            if len(found) > max_bad * len(self):
                return self.too_many(found[0][1], max_bad, f"records such as {found[0][0]}")
        return None

    def too_many(self, error: UserError, max_bad: float, such: str = "bad records") -> UserError:
        """The `error` of a record, by which more than the fraction `max_bad` are bad."""
        where, says, expected, fix = error.parts
        many = f"at most {int(max_bad * len(self))} of {len(self)} {such} (data.max_bad_records)"
        return type(error)(where, says, f"{expected}; {many}", fix)

    def _looked_for(self, path: str) -> UserError | None:
        try:
            self.signal.look_for(path)
        except UserError as error:
            return error

    def key(self, index: int, place: int = 0) -> int:
        """What noise in the place of a record's ECG number `place` is drawn from."""
        record = self.records[index]
        return zlib.crc32(f"{self.signal.seed}:{record.ecgs_of or record.id}:{place}".encode())

    def conversations(self, index: int, signals: list[Shown] | None, length: int) -> list[Conversation]:
        """The record's samples, with given signals (None: a bad record); `length` tokens are planned for it.

        Raises:
            UserError: as `conversation`.
        """
        if self.samples.plain:
            return [self.conversation(index, signals, length)]
        return self.samples.conversations(self, index, signals, length)

    def conversation(self, index: int, signals: list[Shown] | None, length: int, text: Any = None) -> Conversation:
        """The record, or the `text` in place of its own, with given signals (None: a bad record, which keeps its place
        of `length` with weight 0).

        Raises:
            UserError: an ECG has other symbols or words than when `length` was measured; names the record.
        """
        nowhere = np.zeros((0, 0), np.int32)
        if signals is None and self.reads_ecgs:
            nothing = np.zeros(length, np.int32)
            return Conversation(index, nothing, nothing.astype(bool), nowhere, None)
        r = self.render(index, signals, length if text is None else None, text)
        if self.reads_ecgs and text is None and len(r.ids) != length and not self.varies:
            found = f"{len(r.ids)} tokens where the run's plan has {length}: its ECG has changed"
            raise UserError(f"record {self.records[index].id}", found, "the ECG as it was", "start the run again")
        if self.symbols is None:
            r = r if signals is None else self.signal.shown.fitted(r, signals)
            return Conversation(index, r.ids, r.supervised, r.signal_positions, signals)
        return Conversation(index, r.ids, r.supervised, nowhere, [])

    def length_index(
        self, share: str, max_bad: float, cache: Path | None = None, progress: bool = False, timeout: float = 0.0,
        neighbours: int = 1,
    ) -> LengthIndex:  # fmt: skip
        """The length index for `data.share`, from the cache where it is there. `neighbours`: processes on this machine
        that measure at the same time.

        Raises:
            UserError: more than the fraction `max_bad` of the records cannot be rendered; names the first.
            Absent: a process that helps was killed, or reads a recording for more than `timeout` seconds (0: never).
        """
        if self.signal.retrieval is not None and cache is not None and self.text.signal_tokens:
            everything = (one for _, one in self.sought(range(len(self))))
            found = self.signal.retrieval.looked_up(everything, cache, progress)
            self.signal = replace(self.signal, retrieval=found)
        return lengths.index_of(self, share, max_bad, cache, progress, timeout, neighbours)

    def sought(self, indices: Iterable[int]) -> Iterator[tuple[Record, Sought]]:
        """The ECGs for which others are retrieved, of these records."""
        for index in indices:
            record = self.records[index]
            about = frozenset(record.patient.split("+"))
            for place, path in enumerate(record.ecg_paths):
                yield record, self.signal.sought(path, self.key(index, place) if path == NOISE else 0, about)

    def check(self, index: int) -> None:
        """Raise UserError, which names the record, where nothing can be learnt of it."""
        if self.samples.plain:
            self.render(index)
        else:
            self.samples.measure(self, index)

    @property
    def varies(self) -> bool:
        """Whether an ECG has other symbols in every epoch."""
        return self.augments and self.signal.augment_ecg and self.symbols is not None

    @functools.cached_property
    def _head(self) -> Any:
        words = self.tokenizer
        ends = () if words is None else (words.bos_token, words.eos_token)
        digest = hashlib.sha256(json.dumps([INDEX_VERSION, asdict(self.text), *ends], sort_keys=True).encode())
        if words is not None:
            digest.update(words.backend_tokenizer.to_str().encode())
        if not self.samples.plain:
            digest.update(self.samples.fingerprint.encode())
        digest.update("".join(repr(spec.ids) for spec in self.signal.views.values() if spec.ids).encode())
        told = replace(self.signal, root=str(Path(self.signal.root).absolute()), tokens=None)
        if self.symbols is not None:
            digest.update(repr((told, self.symbols.fingerprint, self.augments)).encode())
        if self.text.signal_tokens and self.signal.texts:
            writers = {view: qualified_name(text) for view, text in self.signal.texts.items()}
            digest.update(repr((told, writers)).encode())
        if self.text.signal_tokens and self.signal.retrieval is not None:
            digest.update(repr((told, self.signal.retrieval.fingerprint)).encode())
        return digest

    @property
    def head(self) -> Any:
        """A digest of all that decides a length but the records; what follows it is the caller's."""
        return self._head.copy()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with anything that may change a length: records, tokenizer, text spec; signals that are symbols.

        Who measures lengths leaves it here, or finds it beside those that are kept.
        """
        digest, stamp = self.head, functools.lru_cache(LOOKED_FOR)(self.signal.stamp)
        for record in self.records:
            digest.update(self.told(record, repr(record.text), stamp))
        return digest.hexdigest()[:32]

    def told(self, record: Record, text: str, stamp: Callable[[str], Any]) -> bytes:
        """What of a record the fingerprint is made of: its `text`, and the `stamp` of its recordings' files if they
        decide its length."""
        said = [f"({record.id!r}, {record.ecg_paths!r}, {text}, {record.dataset!r})"]
        said += [repr(beside) for beside in (record.rejected, self.samples.beside(record)) if beside is not None]
        if self.reads_ecgs:
            said.append(repr([stamp(path) for path in record.ecg_paths]))
        return "".join(said).encode()
