"""Signals that ask a run to stop: it finishes its step, saves and leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 set `asked` instead of ending the process; a second one ends it.

    Not where several processes run (`active=False`): they must agree on the step, which the checkpoint manager
    arranges (`Checkpoints.reached_preemption`) on SIGTERM; SIGUSR1, which SLURM may send instead, becomes that.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, active: bool = True) -> None:
        self.asked, self.active = False, active
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            handlers = dict.fromkeys(self.SIGNALS, self._ask) if self.active else {signal.SIGUSR1: _terminate}
            self._before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True


def _terminate(_: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
