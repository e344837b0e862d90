"""The end of a run that has stopped making progress: all stacks, a sentence, and a status that launchers try again."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import Self

from elm_jax import stopping
from elm_jax.errors import Absent

WRITING_SECONDS = 10.0  # for the file: its disk may be what is waited for


class Watchdog:
    """While entered, a thread ends the process, and its peers, where nothing comes to an end for `seconds`.

    What is done, and when something of it has ended, is what `stopping.doing` was told. The stacks of all threads go
    to stderr and into `folder/stacks-<process>-<time>.txt`. Time in which the whole process was stopped does not count.

    Args:
        seconds: 0 watches nothing.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._left = threading.Event()

    def __enter__(self) -> Self:
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 10)
        seen, quiet = 0.0, 0.0
        while not self._left.wait(tick):
            last, what = stopping.progress()
            quiet = quiet + tick if last == seen else 0.0
            seen = last
            if quiet >= self.seconds:
                self._end(what)

    def _end(self, what: str) -> None:
        with contextlib.suppress(OSError):  # all threads wait while stacks are written, and nobody may read
            os.set_blocking(2, False)
        faulthandler.dump_traceback(2, all_threads=True)
        with contextlib.suppress(OSError):
            os.set_blocking(2, True)
        process = 0 if stopping.peers is None else stopping.peers.agreement.index
        path = self.folder / f"stacks-{process}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        writing = threading.Thread(target=self._write, args=(path,), daemon=True)
        writing.start()
        writing.join(WRITING_SECONDS)
        fix = (
            "run the same command to go on, with a higher --config.train.timeout if it was slow, "
            f"or see in {path} what each thread waited for"
        )
        error = Absent(what, f"no progress for {self.seconds:g} s", "some within train.timeout", fix)
        stopping.end_now(f"error: {error}", error.status)

    def _write(self, path: Path) -> None:
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
