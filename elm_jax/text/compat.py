"""The reference's way of labelling and truncating what is rendered, for `compat` (oddities 1-4, 34, 35).

It tokenises the finished prompt and then searches the ids; nothing here is used by default.
Plain lists of ids in, lists of bool and of kept indices out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from elm_jax.errors import UserError

_FIX = "leave the name out of compat or raise data.max_len"


@dataclass(frozen=True)
class Watched:
    """The ids that the reference looks for: `start` opens a response, `end` ends it, `final` is also learnt.

    `skip` is jumped over at the start of a response (the fixed prefix of explicit thinking, or empty).
    """

    bos: int
    start: tuple[int, ...]
    end: int
    final: int | None
    skip: tuple[int, ...]


def chat_labels(ids: Sequence[int], watched: Watched) -> list[bool]:
    """Which tokens are learnt: after each occurrence of `start` up to and including the next `end`."""
    ids = list(ids)
    learn = [False] * len(ids)
    at = _first(ids, watched.bos) + 1
    while at < len(ids):
        if not _begins(ids, at, watched.start):
            learn[at] = ids[at] == watched.final
            at += 1
            continue
        at += len(watched.start)
        at += len(watched.skip) if _begins(ids, at, watched.skip) else 0
        stop = next((i for i in range(at, len(ids)) if ids[i] == watched.end), len(ids) - 1) + 1
        learn[at:stop] = [True] * (stop - at)
        at = stop
    return learn


def pretrain_labels(ids: Sequence[int], bos: int, signal: int | None) -> list[bool]:
    """Which tokens are learnt: all from the second after the last signal (one token is the newline)."""
    ids = list(ids)
    _first(ids, bos)
    last = max((i for i, token in enumerate(ids) if token == signal), default=None)
    start = _first(ids, bos) + 1 if last is None else last + 2
    return [i >= start for i in range(len(ids))]


def kept(ids: Sequence[int], learn: Sequence[int], signal: int | None, bos: int, limit: int) -> list[int]:
    """The indices that stay when single tokens are dropped.

    First go those after the first signal that are not learnt, then those that are learnt, then those before
    the first signal, each in order; then all but the last `limit` of the rest.
    """
    first = next((i for i, token in enumerate(ids) if token == signal), 0)

    def rank(i: int) -> int:
        return 1 if learn[i] else 0 if i > first else 2

    droppable = [i for i, token in enumerate(ids) if token not in (signal, bos)]
    droppable.sort(key=rank)
    dropped = set(droppable[: max(0, len(ids) - limit)])
    return [i for i in range(len(ids)) if i not in dropped][-limit:]


def _first(ids: list[int], bos: int) -> int:
    if bos not in ids:
        raise UserError("data.max_len", "a truncated prompt without its first token", "room for it", _FIX)
    return ids.index(bos)


def _begins(ids: list[int], at: int, pattern: tuple[int, ...]) -> bool:
    return tuple(ids[at : at + len(pattern)]) == pattern
