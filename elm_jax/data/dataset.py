"""One split, ready to be read: records, rendered to tokens, with their signals; and its length index."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from elm_jax.config import DataConfig
from elm_jax.data.batch import Conversation
from elm_jax.data.chat import Rendered, render, render_prompts
from elm_jax.data.ecg import LEADS
from elm_jax.data.plan import LengthIndex
from elm_jax.data.represent import load_raw, load_signal
from elm_jax.data.sources import Record
from elm_jax.errors import UserError

INDEX_VERSION = 1


@dataclass(frozen=True)
class TextSpec:
    """All that decides how a record becomes tokens."""

    family: str
    signal_tokens: int
    system_prompt: str | None = None
    phase: str = "sft"
    explicit_thinking: bool = False
    max_len: int | None = None
    compat: tuple[str, ...] = ()


@dataclass(frozen=True)
class SignalSpec:
    """All that decides how an ECG path becomes an array (C, L)."""

    root: str
    leads: tuple[int, ...]
    length: int
    sampling_rate: float
    norm_eps: float
    perturb: str | None
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """(C, L)."""
        return len(self.leads), self.length

    def load(self, path: str, key: int) -> np.ndarray:
        """The ECG as the model sees it, (C, L) float32; `key` seeds noise. See `represent.load_signal`."""
        return load_signal(
            path,
            root=self.root,
            leads=self.leads,
            length=self.length,
            sampling_rate=self.sampling_rate,
            norm_eps=self.norm_eps,
            perturb=self.perturb,
            key=key,
        )

    def load_raw(self, path: str, key: int) -> np.ndarray:
        """The ECG before normalisation, all 12 leads, for pictures."""
        return load_raw(path, root=self.root, length=self.length, sampling_rate=self.sampling_rate, key=key)


def signal_spec(data: DataConfig, seed: int) -> SignalSpec:
    """What `data.*` says of the signals."""
    leads = tuple(LEADS.index(lead) if isinstance(lead, str) else lead for lead in data.leads)
    return SignalSpec(
        data.root, leads, data.segment_len, data.sampling_rate, data.norm_eps, data.perturb, seed
    )


def text_spec(
    data: DataConfig, family: str, signal_tokens: int, phase: str, compat: tuple[str, ...]
) -> TextSpec:
    """What `data.*` says of the text. `data.system_prompt` may be a text or a file."""
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
    """The prompt itself; a value that ends in .txt or .md names a file.

    Raises:
        UserError: the file is missing.
    """
    if not text_or_path or not text_or_path.endswith((".txt", ".md")):
        return text_or_path or None
    path = Path(text_or_path)
    if not path.is_file():
        raise UserError(
            "data.system_prompt", f"no file {path}", "a text, or a file that exists", "correct the path"
        )
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("data.system_prompt", f"{path}: {error}", "a text file in UTF-8", "convert it") from error


class Dataset:
    """Records with the tokenizer and the two specs. Picklable, so that worker processes can hold it."""

    def __init__(self, records: Sequence[Record], tokenizer: Any, text: TextSpec, signal: SignalSpec) -> None:
        self.records, self.tokenizer, self.text, self.signal = records, tokenizer, text, signal

    def __len__(self) -> int:
        return len(self.records)

    def render(self, index: int) -> Rendered:
        """The tokens of one record.

        Raises:
            UserError: the record has no answer, or does not fit; names the record.
        """
        record = self.records[index]
        try:
            return render(record.text, self.tokenizer, n_ecgs=self._ecgs(record), **asdict(self.text))
        except UserError as error:
            raise UserError(f"record {record.id}", error.found, error.expected, error.fix) from error

    def prompts(self, index: int) -> list[tuple[Rendered, str]]:
        """For each answer of one record: the prompt up to it, with the true history, and the answer."""
        record, spec = self.records[index], asdict(replace(self.text, max_len=None))
        try:
            return render_prompts(record.text, self.tokenizer, n_ecgs=self._ecgs(record), **spec)
        except UserError as error:
            raise UserError(f"record {record.id}", error.found, error.expected, error.fix) from error

    def _ecgs(self, record: Record) -> int:
        return len(record.ecg_paths) if self.text.signal_tokens else 0

    def signals(self, index: int) -> list[np.ndarray]:
        """The record's ECGs, each (C, L) float32.

        Raises:
            UserError: a file is missing, damaged or of the wrong shape; names it.
        """
        if not self.text.signal_tokens:
            return []
        paths = self.records[index].ecg_paths
        return [self.signal.load(path, self.key(index, place)) for place, path in enumerate(paths)]

    def key(self, index: int, place: int = 0) -> int:
        """What noise in the place of a record's ECG number `place` is drawn from."""
        return zlib.crc32(f"{self.signal.seed}:{self.records[index].id}:{place}".encode())

    def conversation(self, index: int, signals: list[np.ndarray] | None) -> Conversation:
        """The record with given signals (None: a bad record, which keeps its place with weight 0)."""
        r = self.render(index)
        return Conversation(index, r.ids, r.supervised, r.signal_positions, signals)

    def length_index(
        self, share: str, max_bad: float, cache: Path | None = None, progress: bool = False
    ) -> LengthIndex:
        """The length index for `data.share`, from the cache where it is there.

        Raises:
            UserError: more than the fraction `max_bad` of the records cannot be rendered; names the first.
        """
        path = cache / f"{self.fingerprint}.parquet" if cache else None
        if path and path.is_file():
            table = pq.read_table(path)
            columns = {name: table[name].to_numpy() for name in table.column_names}
            for i in np.flatnonzero(columns["length"] == 0)[int(max_bad * len(self)) :]:
                self.render(int(i))  # says what is wrong with the first that is too many
        else:
            columns = self._measure(max_bad, progress)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
                pq.write_table(pa.table(columns), temporary)
                temporary.replace(path)
        return _for_share(columns, share)

    def _measure(self, max_bad: float, progress: bool) -> dict[str, np.ndarray]:
        names = (
            "length",
            "targets",
            "ecgs",
            "system_end",
            "signal_end",
            "system_key",
            "signal_key",
            "dataset",
        )
        columns = {n: np.zeros(len(self), np.uint64 if n.endswith("key") else np.int32) for n in names}
        bad: list[UserError] = []
        for i in tqdm(
            range(len(self)), desc="measuring conversations", disable=not progress, mininterval=1.0
        ):
            record = self.records[i]
            columns["dataset"][i] = record.dataset
            try:
                rendered = self.render(i)
            except UserError as error:
                bad.append(error)
                if len(bad) > max_bad * len(self):
                    raise
                continue
            _fill(columns, i, rendered, record)
        return columns

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with anything that may change a length: records, tokenizer, text spec."""
        digest = hashlib.sha256(json.dumps([INDEX_VERSION, asdict(self.text)], sort_keys=True).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        for record in self.records:
            digest.update(repr((record.id, record.ecg_paths, record.text, record.dataset)).encode())
        return digest.hexdigest()[:32]


def _fill(columns: dict[str, np.ndarray], i: int, rendered: Rendered, record: Record) -> None:
    columns["length"][i] = len(rendered.ids)
    columns["targets"][i] = int(rendered.supervised.sum())
    columns["ecgs"][i] = len(rendered.signal_positions)
    first = int(np.argmax(rendered.supervised))
    # A prefix holds nothing supervised: its tokens stand once for many conversations.
    columns["system_end"][i] = rendered.system_end if rendered.system_end <= first else 0
    columns["signal_end"][i] = rendered.signal_end if rendered.signal_end <= first else 0
    columns["system_key"][i] = _key(rendered.ids[: rendered.system_end])
    columns["signal_key"][i] = _key(rendered.ids[: rendered.signal_end], *_recordings(record))


def _recordings(record: Record) -> tuple[str, ...]:
    """What tells recordings apart. Each record's `noise` is its own; so is its place in the batch."""
    return tuple(f"{p}:{record.id}" if p in ("noise", "flatline") else p for p in record.ecg_paths)


def _key(ids: np.ndarray, *parts: str) -> int:
    digest = hashlib.blake2b(ids.astype(np.int32).tobytes() + "\0".join(parts).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _for_share(columns: dict[str, np.ndarray], share: str) -> LengthIndex:
    nothing = np.zeros_like(columns["length"])
    with_ecg = (columns["signal_end"] > 0) & (share == "ecg")
    prefix = nothing if share == "none" else np.where(with_ecg, columns["signal_end"], columns["system_end"])
    return LengthIndex(
        length=columns["length"],
        targets=columns["targets"],
        ecgs=columns["ecgs"],
        prefix=prefix,
        key=np.where(with_ecg, columns["signal_key"], columns["system_key"]),
        prefix_ecgs=np.where(with_ecg, columns["ecgs"], nothing),
        dataset=columns["dataset"],
    )
