"""Many prompts through a fixed number of rows: rows that have ended are given to the next prompts.

The answers to a prompt are a group of rows, which begin together. A prefill of one group costs almost as much as one of
several: groups stand idle until that has cost as much as a prefill.

Prompts are read a few ahead. Beginnings that several of these share (the system prompt, an ECG that is asked about
more than once) go through the model once, into a pool of prefixes, and are copied from there. All shapes come from a
few sizes; `Engine.calls` counts them.

All decisions depend on prompts and tokens alone, never on time, so that the processes of a mesh agree.

A groups, B rows that generate, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elm_jax.inference import decoding
from elm_jax.inference.decoding import ENDLESS, NONE, Drawn, Model, Prompts, Rows, Start, empty_rows
from elm_jax.inference.generate import bucket
from elm_jax.inference.prefills import Embed, Prefills, fitting, padded, width
from elm_jax.inference.requests import Event, Request
from elm_jax.inference.sampling import Sampling
from elm_jax.models import hints
from elm_jax.models.decoder import Decoder

AHEAD = 8  # prompts read ahead, in units of the groups
CHUNK = 32  # tokens a row between two looks of the host
PAIRS = 2**22  # of a query and a key in one prefill, for each part of the mesh's rows: bounds its memory
PER_CALL = {"cpu": 64, "": 256}  # by platform ("": any other): tokens that cost what a prefill does whatever its size
ROOM = 64  # the places of a row are a multiple of it: where they grow, programs are compiled anew
SHORT = 512  # tokens of beginnings of which the pool holds twice as many
SCORED = 16  # rows that are scored at a time

log = logging.getLogger(__name__)


class Engine:
    """Generation with one model.

    Args:
        llm: the decoder.
        embed: (pieces, rows, width) -> (rows, width, D): the inputs of the pieces' tokens, padded on the right.
        ends: ids that end an answer.
        placement, ways: the mesh, and into how many parts it divides the rows.
    """

    def __init__(
        self, llm: Decoder, embed: Embed, ends: Sequence[int], placement: hints.Placement | None = None, ways: int = 1
    ) -> None:
        self.vocabulary, self.ways, self.most_pairs = llm.config.vocab_size, ways, PAIRS * ways
        self.per_call = PER_CALL.get(placement.platform if placement else jax.default_backend(), PER_CALL[""])
        self.calls: Counter[str] = Counter()  # of each program with its shapes: as many entries as compilations
        self.model = Model(*nnx.split(llm if llm.scan else llm.unstacked()), placement)
        self.ends, self.end_ids = frozenset(ends), jnp.asarray(tuple(ends), jnp.int32)
        self.prefills = Prefills(self.model, embed, self.most_pairs, self.note)

    def run(
        self, requests: Iterable[Request], rows: int, sampling: Sampling | None = None, chunk: int = CHUNK
    ) -> Iterator[Event]:
        """Tokens as they are drawn, up to and with the token that ends an answer.

        `rows`: how many answers go on at a time; those of one prompt at least, fewer where there are fewer. `sampling`
        None: greedy. `chunk`: the most tokens of an event.
        """
        source = iter(requests)
        ahead = list(islice(source, 1))
        answers = len(ahead[0].draws) if ahead else 1
        groups = self.divisible(max(1, rows // answers))
        waiting = [*ahead, *islice(source, AHEAD * groups - 1)]
        while groups % (2 * self.ways) == 0 and groups >= 2 * len(waiting):
            groups //= 2
        # Two beginnings a group, since questions about one ECG that differ in length do not begin at once; of long ones
        # a single one, for want of memory. Every part of the mesh holds the whole pool, but only its share of the rows.
        longest = max((end for request in waiting for end, _ in request.beginnings), default=0)
        self.prefills.reserve((4 if longest <= SHORT else 2) * groups // (self.ways + 1) + 4)
        run, wanted = _Run(self, groups, answers, sampling or Sampling.of()), Counter[bytes]()
        wanted.update(key for request in waiting for _, key in request.beginnings)
        while waiting or run.busy:
            while waiting and run.free:
                for request in islice(source, AHEAD * groups - len(waiting)):
                    waiting.append(request)
                    wanted.update(key for _, key in request.beginnings)
                chosen = self._choose(waiting, len(run.free), run.sizes, wanted)
                yield from run.prefill(chosen, wanted, [*waiting, *chosen])
                wanted.subtract(key for request in chosen for _, key in request.beginnings)
            yield from run.decode(chunk, self.per_call if waiting else ENDLESS)

    def score(self, requests: Sequence[Request], starts: Sequence[int]) -> np.ndarray:
        """(n,) the log probability of tokens [start, T) of each request behind those before; start > 0."""
        wanted = Counter(key for request in requests for _, key in request.beginnings)
        self.prefills.reserve(SCORED + 4)
        longest = max((len(request.ids) for request in requests), default=1)
        size, found = self.prefills.bounded(longest, sorted({self.ways, self.divisible(SCORED)})), []
        for first in range(0, len(requests), size):
            part = requests[first : first + size]
            prompts, pool, source, pieces = self.prefills.make(part, wanted, [size])
            ids, counted = (np.zeros(prompts.x.shape[:2], kind) for kind in (np.int32, bool))
            for row, (piece, start) in enumerate(zip(pieces, starts[first:], strict=False)):
                ids[row, : len(piece.ids) - 1] = piece.ids[1:]
                counted[row, start - 1 - piece.begin : len(piece.ids) - 1] = True
            self.note("score", prompts, pool)
            found.append(np.asarray(decoding.score(self.model, pool, prompts, source, ids, counted))[: len(part)])
        return np.concatenate(found)

    def divisible(self, rows: int) -> int:
        """At least so many rows, or groups, in equal parts for the mesh."""
        return -(-rows // self.ways) * self.ways

    def note(self, program: str, *arrays: Any) -> None:
        """Count a call of a program on such arrays, and log the first of them, which compiles it."""
        shapes = ", ".join("x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(arrays) if leaf.ndim > 2)
        name = f"{program} ({shapes})"
        self.calls[name] += 1
        if self.calls[name] == 1:
            log.info("generation: compiles %s, program %d", name, len(self.calls))

    def _choose(
        self, waiting: list[Request], free: int, sizes: Sequence[int], wanted: Counter[bytes]
    ) -> list[Request]:
        """Take the prompts that begin next out of `waiting`: the oldest, and others of its length.

        So many of them that the tokens computed, padding and `per_call` included, are the fewest for each that counts.
        """
        lengths = {request: len(request.ids) - self.prefills.likely(request, wanted) for request in waiting}
        # Of one width the oldest come first: questions about one ECG stay together, and find its beginning in the pool.
        order = sorted(waiting, key=lambda request: width(lengths[request]))
        sums = np.cumsum([0, *(lengths[request] for request in order)])
        oldest, best = order.index(waiting[0]), (float("inf"), 0, 0)
        for count in range(1, min(free, len(waiting)) + 1):
            for first in (oldest + 1 - count, oldest):  # the oldest is the longest of them, or the shortest
                first = min(max(first, 0), len(order) - count)
                size, wide = fitting(count, sizes), width(lengths[order[first + count - 1]])
                pairs = size * wide * (wide + self.prefills.places)
                if size < count or (count > self.ways and pairs > self.most_pairs):
                    continue
                cost = (size * wide + self.per_call) / (sums[first + count] - sums[first])
                best = min(best, (cost, first, count))
        chosen = set(order[best[1] : best[1] + best[2]])
        taken = [request for request in waiting if request in chosen]
        waiting[:] = [request for request in waiting if request not in chosen]
        return taken


class _Group(NamedTuple):
    """The answers to a prompt that go on."""

    request: Request
    left: list[int]  # tokens that may still be drawn, of each
    began: float


class _Run:
    """The rows of one call of `Engine.run`: `answers` of each group."""

    def __init__(self, engine: Engine, groups: int, answers: int, sampling: Sampling) -> None:
        self.engine, self.sampling, self.penalised = engine, sampling, float(sampling.penalty) != 1
        self.sizes = sorted({engine.ways, *(engine.divisible(-(-groups * part // 4)) for part in (1, 2, 3, 4))})
        self.groups: list[_Group | None] = [None] * groups
        self.answers = answers
        self.rows: Rows | None = None
        self.dtype: Any = None

    @property
    def free(self) -> list[int]:
        return [slot for slot, group in enumerate(self.groups) if group is None]

    @property
    def busy(self) -> bool:
        return any(group is not None for group in self.groups)

    def prefill(
        self, chosen: Sequence[Request], wanted: Counter[bytes], known: Sequence[Request]
    ) -> Iterator[Event]:
        """Begin these prompts in free groups; `known`: they, and those that wait."""
        began, engine = time.perf_counter(), self.engine
        prompts, pool, source, pieces = engine.prefills.make(chosen, wanted, self.sizes)
        count, wide = prompts.x.shape[:2]
        longest = max(*(piece.begin + wide for piece in pieces), *(len(request.ids) for request in known))
        rows = self._with_room(longest, max(request.new for request in known), prompts)
        free = self.free[: len(chosen)]
        draws = np.array([*(request.draws for request in chosen), *[(0,) * self.answers] * (count - len(chosen))])
        start = Start(
            slot=padded(free, count, len(self.groups)),
            left=padded([request.new for request in chosen], count),
            number=draws.astype(np.int32),
            seen=self._seen(chosen, count) if self.penalised else None,
        )
        engine.note("prefill, penalised" if self.penalised else "prefill", prompts, pool, rows)
        self.rows, first = decoding.prefill_and_sample(
            engine.model, rows, pool, prompts, source, start, self.sampling, engine.end_ids
        )
        for request, slot in zip(chosen, free, strict=True):
            self.groups[slot] = _Group(request, [request.new] * self.answers, began)
        yield from self._events(free, range(len(chosen)), first)

    def decode(self, chunk: int, patience: int) -> Iterator[Event]:
        """Up to `chunk` tokens more of each row, as long as groups have not stood idle for `patience` tokens."""
        going, engine = [slot for slot, group in enumerate(self.groups) if group], self.engine
        if not going or self.rows is None:
            return
        engine.note("decode, penalised" if self.penalised else "decode", self.rows)
        limit = min(chunk, CHUNK, max(max(group.left) for group in self.groups if group))
        self.rows, output = decoding.decode(
            engine.model, self.rows, self.sampling, engine.end_ids, CHUNK, limit, patience, self.dtype
        )
        yield from self._events(going, going, output)

    def _events(self, slots: Sequence[int], places: Sequence[int], drawn: Drawn) -> Iterator[Event]:
        """Of the groups in these slots; what was drawn for them has these places among groups."""
        tokens, log_probs = (np.asarray(x).reshape(len(x) // self.answers, self.answers, -1) for x in drawn)
        for slot, place in zip(slots, places, strict=True):
            group = self.groups[slot]
            assert group is not None
            for answer, left in enumerate(group.left):
                new = tokens[place, answer]
                ids = new[new != NONE].tolist()
                if left:
                    ended = len(ids) == left or (bool(ids) and ids[-1] in self.engine.ends)
                    group.left[answer] = 0 if ended else left - len(ids)
                    seconds = time.perf_counter() - group.began if ended else None
                    probabilities = log_probs[place, answer, : len(ids)].tolist()
                    yield Event(group.request.number, answer, ids, probabilities, seconds)
            if not any(group.left):
                self.groups[slot] = None

    def _with_room(self, places: int, longest: int, prompts: Prompts) -> Rows:
        """Rows with room for prompts of so many places and answers of `longest` tokens; made at the first prompt."""
        model, groups = self.engine.model, len(self.groups)
        sizes = [(groups, bucket(places, ROOM)), (groups * self.answers, bucket(max(longest - 1, 1), CHUNK))]
        if self.rows is None:
            self.dtype = prompts.x.dtype
            known, new = (decoding.make_cache(model, *size, self.dtype, "batch") for size in sizes)
            return empty_rows(known, new, self.engine.vocabulary if self.penalised else None)
        larger = [
            decoding.enlarge_cache(model, cache, room, "batch") if room > cache.places else cache
            for cache, (_, room) in zip((self.rows.prompts, self.rows.answers), sizes, strict=True)
        ]
        return self.rows._replace(prompts=larger[0], answers=larger[1])

    def _seen(self, chosen: Sequence[Request], count: int) -> np.ndarray:
        seen = np.zeros((count, self.engine.vocabulary), bool)
        for row, request in enumerate(chosen):
            seen[row, request.ids] = True
        return seen
