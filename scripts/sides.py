"""Ways of doing the same, each in a process of its own, so that none has another's threads or memory; all asked in
turn within one run, so that what else the machine does meets them alike."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Acts = Mapping[str, Callable[..., Any]]


class Done(NamedTuple):
    """What an act has given, the seconds that it took, and those of the processors."""

    given: Any
    seconds: float
    work: float


class Side:
    """A process that begins with `build(*args)`, a function of a script that gives its acts by name, and does these
    one at a time, as it is asked."""

    def __init__(self, build: Callable[..., Acts], *args: Any, platforms: str = "cpu") -> None:
        os.environ["JAX_PLATFORMS"] = platforms
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._name = build.__name__
        context.Process(target=_serve, args=(theirs, build, *args), daemon=True).start()
        theirs.close()

    def __call__(self, act: str, *args: Any) -> Done:
        """Have it done. Ends the program where the side has ended."""
        try:
            self._pipe.send((act, args))
            return Done(*self._pipe.recv())
        except (EOFError, OSError):
            raise SystemExit(f"error: {self._name} has ended, asked for {act}") from None


def _serve(pipe: Any, build: Callable[..., Acts], *args: Any) -> None:
    acts = build(*args)
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            return
        begun, worked = time.perf_counter(), time.process_time()
        found = acts[name](*given)
        pipe.send((found, time.perf_counter() - begun, time.process_time() - worked))
