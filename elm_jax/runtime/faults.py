"""Signals that ask a run to stop: it finishes its step, saves and leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from elm_jax.runtime import distributed


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 set `asked` instead of ending the process; a second one ends it.

    Several processes (`together`) must agree on the step instead: JAX listens to SIGTERM while this is entered, and
    `Checkpoints.reached_preemption` tells; SIGUSR1, which SLURM may send instead, becomes SIGTERM. It can be entered
    once in a process.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, together: bool = False) -> None:
        self.asked, self.together = False, together
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        handlers = {signal.SIGUSR1: _terminate} if self.together else dict.fromkeys(self.SIGNALS, self._ask)
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.getsignal(s) for s in self.SIGNALS}
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.together:
            distributed.listen_to_sigterm()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})  # it is blocked while workers of the loader start
            signal.raise_signal(number)
        self.asked = True


def _terminate(_: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
