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

LATER = 1.25  # times: who reads steps ahead sees a stuck read before, and ends with the record's name
WRITING_SECONDS = 10.0  # for the file: its disk may be what is waited for


class Watchdog:
    """While entered, a thread ends the process, and its peers, where nothing comes to an end for `seconds`
    (`train.timeout`), or a recording is being read for more than `reading` seconds (`data.timeout`).

    What is done, and when something of it has ended, is what `stopping.doing` was told. The stacks of all threads go
    to stderr and into `folder/stacks-<process>-<time>.txt`. Time in which the whole process was stopped does not count.

    Args:
        seconds, reading: 0 does not watch it.
    """

    def __init__(self, folder: Path, seconds: float, reading: float = 0.0) -> None:
        self.folder, self.seconds, self.reading = folder, seconds, reading
        self._left = threading.Event()

    def __enter__(self) -> Self:
        if self.seconds or self.reading:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        tick = min(1.0, *(seconds / 10 for seconds in (self.seconds, self.reading) if seconds))
        seen, quiet = 0.0, 0.0
        read, sticks = stopping.oldest_read(), 0.0
        while not self._left.wait(tick):
            last, what = stopping.progress()
            quiet = quiet + tick if last == seen else 0.0
            seen = last
            before, read = read, stopping.oldest_read()
            sticks = sticks + tick if read is not None and read == before else 0.0
            again = "run the same command to go on"
            if read is not None and 0 < LATER * self.reading <= sticks:
                limit = f"at most data.timeout={self.reading:g} s"
                self._end(read[0], f"being read for {sticks:.0f} s", limit, f"{again} when its file system answers")
            if 0 < self.seconds <= quiet:
                fix = f"{again}, with a higher --config.train.timeout if it was slow"
                self._end(what, f"no progress for {self.seconds:g} s", "some within train.timeout", fix)

    def _end(self, where: str, found: str, expected: str, fix: str) -> None:
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
        error = Absent(where, found, expected, f"{fix}, or see in {path} what each thread waited for")
        stopping.end_now(f"error: {error}", error.status)

    def _write(self, path: Path) -> None:
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
