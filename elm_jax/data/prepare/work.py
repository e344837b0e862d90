"""Many items on many processes: results in the order of the items, whoever made them."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from elm_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_CHUNK = 16  # items that a process is given at a time
_AHEAD = 3  # chunks for each process that wait for it, or whose results wait for others: what bounds the memory
_PR_SET_PDEATHSIG = 1
_function: Callable[[Any], Any]


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of each item, in their order; with one worker in this process.

    Raises UserError where a process ended by force, as one does for which there is no memory.
    """
    if workers == 1:
        yield from map(function, items)
        return
    left = iter(items)
    waiting: deque[Future[list[Result]]] = deque()
    # Forked, so that a dataset that a user's own file registers is known to them.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (function, os.getpid()))
    try:
        while chunk := list(islice(left, _CHUNK)):
            waiting.append(pool.submit(_run, chunk))
            if len(waiting) > _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        found = "a process that was ended by force, perhaps for want of memory"
        raise UserError("--workers", found, "all of them to stay", "lower it, and give the command again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    """Signals are the parent's affair, and without it there is nothing to do."""
    global _function
    _function = function
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _run(chunk: list[Any]) -> list[Any]:
    return [_function(item) for item in chunk]
