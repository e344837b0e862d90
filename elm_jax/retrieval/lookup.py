"""From an ECG to what is written of the recordings of an index that are most like it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elm_jax import compat as behaviours
from elm_jax import stopping
from elm_jax.config import Config
from elm_jax.data.retrieving import Sought
from elm_jax.ecg.features import NAMES, ecg_features
from elm_jax.ecg.recording import LEADS
from elm_jax.errors import UserError
from elm_jax.folders import another, keep, kept
from elm_jax.retrieval.index import DECIDING, KEY, Entry, deciding, hash_of, opened, study_of
from elm_jax.retrieval.nearest import MODES, Found, nearest, the_faiss
from elm_jax.text.forms import CHAT_FORMS
from elm_jax.text.retrieved import VERSION, Retrieved, block, own_numbers, version_of, without_marks
from elm_jax.text.turns import Words
from elm_jax.weights.safetensors import Safetensors, save_safetensors

_AT_ONCE, _READERS = 256, 4  # recordings that are looked up together, and read
_BLOCK = 4096  # of which what was found is kept together
_COPIES = 8  # entries beyond k that are found at first, in whose place others come where they are the ECG itself
_TABLE, _NO_ROW = ".safetensors", -1
_SMALL, _MOST_SMALL, _LEAST = 1e-3, 0.5, 0.5  # of the reference's rule for entries that say nothing


@dataclass(frozen=True)
class Retriever:
    """What a configuration's `retrieval` asks for; see `keys.RetrievalConfig`. Picklable: an index is opened where it
    is used. `leads` are places in the canonical order; dashes: nothing of what is found can be read, as a control."""

    folder: str
    k: int
    mode: str
    scaling: str
    content: str
    place: str
    search: str
    leads: tuple[int, ...]
    sampling_rate: float
    compat: tuple[str, ...] = ()
    dashes: bool = False
    tables: tuple[str, ...] = field(default=(), repr=False)  # of what was looked up before
    sent: bool = field(default=False, repr=False)  # to another process, in which nothing is looked up

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sent": True}

    @property
    def fingerprint(self) -> str:
        """Changes with what is found, and with what is written of it."""
        return repr((VERSION, opened(self.folder).fingerprint, replace(self, folder="")))

    @property
    def protocol(self) -> bool:
        """Whether retrieval goes by the reference's rules."""
        return behaviours.enabled("rag_protocol", self.compat)

    def words(self, sought: Sought) -> Words:
        """What is written of the recordings most like the ECG that is `sought`, in its place."""
        rows = self._known(sought)
        if rows is None:
            rows = [row for row, _ in self.found(sought)]
        index = opened(self.folder)
        found = [Retrieved(entry.report, self._shown(entry)) for entry in map(index.entry, rows)]
        text = block(found, self.content, [LEADS[lead] for lead in self.leads], self.compat, self.dashes)
        if self.place == "system":
            return Words(system=text)
        if version_of(self.compat):
            own = version_of(self.compat) == "rag_92bff32" and self.content == "combined"
            text = (own_numbers(self._features(sought.signal())) if own else "") + text + "\n"
        return Words(without_marks(text))

    def found(self, sought: Sought) -> list[tuple[int, float]]:
        """The rows of the index that are most like the ECG, and their distances, the nearest first. Raises UserError
        for an ECG that cannot be read."""
        query = self._query(sought)
        if self.sent:  # to the loader, or to measure lengths: what they read was looked up before
            expected, fix = "the file as it was", "start the run again"
            raise UserError(sought.path, "a recording that was not looked up, or has changed", expected, fix)
        return self._nearest([(query, sought)])[0]

    def looked_up(self, everything: Iterable[Sought], cache: Path, progress: bool) -> Retriever:
        """The same with all these ECGs looked up, each once; what is kept in `cache` is not looked up again: some
        thousand ECGs at a time are. An ECG that cannot be read is left out: who asks for it is told, and the next time
        it is tried again."""
        wanted = {one.name: one for one in everything}
        names = np.array(sorted(wanted), np.uint64)
        told, tables = self.fingerprint.encode(), list[str]()
        bar = tqdm(total=len(names), desc="retrieving", unit="ECG", disable=not progress, mininterval=1, delay=1)
        with bar, ThreadPoolExecutor(_READERS) as pool:
            for block in np.split(names, range(_BLOCK, len(names), _BLOCK)):
                stem = cache / "retrieved" / hashlib.sha256(told + block.tobytes()).hexdigest()[:32]
                table = kept(stem, _TABLE)
                known = dict(zip(*map(np.ndarray.tolist, _table((str(table),))), strict=True)) if table else {}
                lacking = [wanted[name] for name in block.tolist() if name not in known]
                bar.update(len(block) - len(lacking))
                new = dict[int, list[int]]()
                for first in range(0, len(lacking), _AT_ONCE):
                    part = lacking[first : first + _AT_ONCE]
                    new |= self._rows(part, pool)
                    bar.update(len(part))
                    stopping.doing("retrieving")
                if new or table is None:
                    table = _keep(stem, known | new, self.k)
                tables.append(str(table))
        return replace(self, tables=tuple(tables))

    def entries(self, sought: Sought) -> list[tuple[Entry, float]]:
        """What was found, for a report."""
        return [(opened(self.folder).entry(row), distance) for row, distance in self.found(sought)]

    def owners(self, sought: Sought) -> set[int]:
        """Whom entries must not be about: the patients and studies of the record, and whom the index has of these
        studies. A record that names no patient is about its recordings, by their paths."""
        index = opened(self.folder)
        patients = {hash_of("patient", patient) for patient in sought.about}
        studies = {hash_of("study", study_of(one)) for one in (sought.path, *sought.about)}
        return patients | studies | index.about(index.owned(studies))

    def _known(self, sought: Sought) -> list[int] | None:
        if not self.tables:
            return None
        names, rows = _table(self.tables)
        place = int(np.searchsorted(names, np.uint64(sought.name)))
        if place == len(names) or int(names[place]) != sought.name:
            return None
        return [int(row) for row in rows[place] if row != _NO_ROW]

    def _rows(self, part: Sequence[Sought], pool: Executor) -> dict[int, list[int]]:
        """By name the rows that are found for those that can be read."""
        read = [(query, one) for query, one in zip(pool.map(self._read, part), part, strict=True) if query is not None]
        found = self._nearest(read) if read else []
        return {one.name: [row for row, _ in rows] for (_, one), rows in zip(read, found, strict=True)}

    def _read(self, sought: Sought) -> np.ndarray | None:
        try:
            return self._query(sought)
        except UserError:
            return None

    def _features(self, signal: np.ndarray) -> np.ndarray:
        return ecg_features(signal, self.sampling_rate, self.compat)

    def _query(self, sought: Sought) -> np.ndarray:
        signal = sought.signal()
        if len(signal) != len(self.leads):
            found, expected = f"{len(signal)} of the leads", f"all {len(self.leads)} of data.leads, which are compared"
            raise UserError(sought.path, found, expected, "leave the record out, or set data.leads to what it has")
        of = {"features": self._features, "signals": lambda x: x.reshape(-1)}
        return np.concatenate([of[name](signal) for name in MODES[self.mode]]).astype(np.float32)

    def _nearest(self, asked: Sequence[tuple[np.ndarray, Sought]]) -> list[list[tuple[int, float]]]:
        index = opened(self.folder)
        search = nearest(self.folder, self.mode, self.scaling, self.search, self.leads)
        queries = np.stack([query for query, _ in asked])
        none = np.zeros(0, np.int64)
        if self.protocol:
            return [self.by_protocol(*self.padded(*one)) for one in search(queries, self.k, [none] * len(asked))]
        excluded = [index.owned(self.owners(sought)) for _, sought in asked]
        found, more = [], _COPIES
        while len(found) < len(asked):
            rest = slice(len(found), None)
            for rows, distances in search(queries[rest], self.k + more, excluded[rest]):
                others = distances > search.vectors.same
                if others.sum() < self.k and len(rows) == self.k + more:
                    break  # more copies than there was room for
                found.append(list(zip(rows[others].tolist(), distances[others].tolist(), strict=True))[: self.k])
            more *= 8
        return found

    def padded(self, rows: np.ndarray, distances: np.ndarray) -> Found:
        """k of them: FAISS has -1 for what is not there, which the reference takes for the last entry."""
        lacking = self.k - len(rows)
        rows = np.append(rows, np.full(lacking, len(opened(self.folder)) - 1))
        return rows, np.append(distances, np.full(lacking, np.finfo(np.float32).max, np.float32))

    def by_protocol(self, rows: np.ndarray, distances: np.ndarray) -> list[tuple[int, float]]:
        """The reference's filter: what is left of what was found, with nothing in the place of what is not."""
        sizes = np.abs(opened(self.folder).rows("features", rows))
        says = ((sizes < _SMALL).mean(1) <= _MOST_SMALL) & (sizes.sum(1) >= _LEAST)
        return list(zip(rows[says].tolist(), distances[says].tolist(), strict=True))

    def _shown(self, entry: Entry) -> np.ndarray:
        each = entry.features.reshape(-1, len(NAMES))
        return each[list(self.leads)].reshape(-1)


def retriever_of(config: Config, family: str) -> Retriever | None:
    """What `config.retrieval` asks for, None where it names no index.

    Raises:
        UserError: no index there, or one of other segments, features, or without what is asked for; or a place that
            the chat form of `family` does not have.
    """
    asked, data, compat = config.retrieval, config.data, config.compat
    if asked.index is None:
        return None
    if asked.search == "faiss":
        the_faiss()
    folder = str(Path(asked.index).absolute())
    facts = opened(folder).facts
    ours = deciding(compat)
    for key, own, theirs in (
        ("data.sampling_rate", data.sampling_rate, facts.sampling_rate),
        ("data.segment_len", data.segment_len, facts.length),
        *((f"compat {name}", name in ours, name in facts.compat) for name in DECIDING),
    ):
        if own != theirs:
            found = f"{asked.index}, an index with {key} {theirs:g}"
            raise UserError(KEY, found, f"{key} {own:g}, as the run has it", "build one for it, or change the key")
    version = version_of(compat)
    if asked.content != "feature" and not opened(folder).reports:
        fix = "build it of a table with reports, or set --config.retrieval.content=feature"
        raise UserError(KEY, f"{asked.index}, an index without reports", f"one for content={asked.content}", fix)
    if asked.place == "system" and CHAT_FORMS[family].system is None and not version:
        fix = "set --config.retrieval.place=question"
        raise UserError("retrieval.place", "system", f"a chat form with a system prompt, which {family} has not", fix)
    if asked.place == "system" and behaviours.enabled("response_by_ids", compat):
        found, expected = "system with compat response_by_ids", "question: it takes each turn but the user's for learnt"
        raise UserError("retrieval.place", found, expected, "set --config.retrieval.place=question")
    if version == "rag_92bff32" and asked.place == "question" and asked.content == "feature":
        found, expected = "feature with place=question", "report or combined: that version then loses the ECG"
        raise UserError("retrieval.content", found, expected, "leave rag_92bff32 out, or change one of them")
    leads = tuple(LEADS.index(lead) for lead in data.leads)
    retriever = Retriever(
        folder, asked.k, asked.mode, asked.scaling, asked.content, asked.place, asked.search, leads,
        data.sampling_rate, compat,
    )  # fmt: skip
    if asked.mode != "feature" and not facts.signals:
        nearest(folder, asked.mode, asked.scaling, asked.search, leads)  # says so
    return retriever


def _keep(stem: Path, found: dict[int, list[int]], k: int) -> Path:
    """Leave in a table what was found: names (n,), sorted, and up to k rows of each (n, k)."""
    rows = np.full((len(found), k), _NO_ROW, np.int64)
    for place, (_, one) in enumerate(sorted(found.items())):
        rows[place, : len(one)] = one
    known = {"names": np.array(sorted(found), np.uint64), "rows": rows}
    stem.parent.mkdir(parents=True, exist_ok=True)
    return keep(stem, _TABLE, lambda file: save_safetensors(another(file), known))


@lru_cache(4)
def _table(paths: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    found = list(map(Safetensors, paths))
    return np.concatenate([one["names"] for one in found]), np.concatenate([one["rows"] for one in found])
