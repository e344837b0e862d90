"""Steps streamed by Grain, ahead of who takes them, in a thread or in processes, and watched: one that ends, stops or
sticks is named. No jax here.

Grain's own threads and processes cannot be watched so: each of its streams runs in a reader of ours. A process sends a
step through a socket: a pickle, and behind it the bytes of the arrays, received where they stay.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, MutableSequence
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from elm_jax import stopping
from elm_jax.errors import Absent, UserError

if TYPE_CHECKING:  # it imports this module
    from elm_jax.data.loader import Loaded, StepSource

AHEAD, AHEAD_OF_PROCESS = 4, 2  # steps that are there before they are asked for; a process has one more at hand
LOOK = 1.0  # seconds from one look at the readers to the next
SILENT = 6.0  # seconds without a sign of life after which a process counts as stuck
START = 300.0  # in which a process has its data, and gives the first
END = 1.0  # seconds in which a reader ends
NOTHING = -1  # the number of no record
GO_ON = "the same command goes on from the last checkpoint"


class Closed(Exception):
    """Nobody waits for what is being read."""


class Reading:
    """What a reader is at, for others to see. Seconds are those of `time.monotonic`, one clock for all processes."""

    def __init__(self, shared: MutableSequence[float] | None = None) -> None:
        self._shared = [0.0] * 3 if shared is None else shared
        # Since when; which record; the last sign of life or, below 0 and until there is one, the start.
        self._shared[:] = 0.0, NOTHING, -time.monotonic()
        self.closed = False

    def at(self, record: int) -> None:
        """The reader begins with a record, or with NOTHING. Raises Closed where it need not."""
        if self.closed:
            raise Closed
        self._shared[0], self._shared[1] = time.monotonic(), record

    def live(self) -> None:
        """The reader's process runs."""
        self._shared[2] = time.monotonic()

    @property
    def record(self) -> tuple[int, float]:
        """The record that is being read, or NOTHING, and for how many seconds."""
        return int(self._shared[1]), time.monotonic() - self._shared[0]

    @property
    def silence(self) -> tuple[bool, float]:
        """Whether there was a sign of life, and the seconds since then or, before the first, since the start."""
        return self._shared[2] > 0, time.monotonic() - abs(self._shared[2])


def streamed(source: StepSource, steps: range, reading: Reading) -> Iterator[Loaded]:
    """These steps of the source, each read when it is asked for."""
    numbers = grain.MapDataset.range(steps.start, steps.stop, steps.step)
    read = numbers.map(lambda step: source.read(int(step), reading))
    return iter(read.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


class _Reader(threading.Thread):
    """Reads some steps of a source, one after another, a few ahead."""

    def __init__(self, source: StepSource, steps: range, ahead: int = AHEAD) -> None:
        super().__init__(daemon=True, name="reader")
        self.source, self.steps, self.step, self.reading = source, steps, steps.start, Reading()
        self._stream: Iterator[Loaded] | None = None
        self._stuck = False  # at the last look
        self._room, self._found = threading.Semaphore(ahead), queue.SimpleQueue[Any]()

    def run(self) -> None:
        try:
            for step in self.steps:
                self.step = step
                self._room.acquire()
                self._found.put(self.read())
        except Closed:
            pass
        except BaseException as error:  # for the one who takes
            self._found.put(error)

    def read(self) -> Loaded:
        """The step `self.step`, the next of the stream."""
        self._stream = self._stream or streamed(self.source, self.steps, self.reading)
        return next(self._stream)

    def take(self, seconds: float) -> Loaded | None:
        """The next step, or None where it does not come within so many seconds. Raises what reading has raised."""
        try:
            found = self._found.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        self._room.release()
        return found

    def check(self, timeout: float) -> None:
        """Raise Absent where it sticks, as it did at the last look: the whole run may have been stopped before one."""
        problem = self.sticks(timeout)
        if problem is not None and self._stuck:
            raise problem
        self._stuck = problem is not None

    def sticks(self, timeout: float) -> Absent | None:
        """What is wrong where a record is being read for more than `timeout` seconds, if that is not 0."""
        record, seconds = self.reading.record
        if not timeout or record == NOTHING or seconds <= timeout:
            return None
        known = self.source.dataset.records[record]
        paths = ", ".join(known.ecg_paths)
        return Absent(
            f"record {known.id}", f"{paths} being read for {seconds:.0f} s, for step {self.step + 1}",
            f"at most data.timeout={timeout:g} s", f"see whether its file system answers: {GO_ON}",
        )  # fmt: skip

    def close(self) -> None:
        self.reading.closed = True
        self._room.release()
        if self.is_alive():
            self.join(END)  # it ends at the next record, if it does not stick in one


class _Worker(_Reader):
    """A process that reads; the thread receives."""

    def __init__(self, source: StepSource, sent: bytes, steps: range, name: str) -> None:
        super().__init__(source, steps, AHEAD_OF_PROCESS)
        spawn = multiprocessing.get_context("spawn")
        self.reading = Reading(spawn.RawArray("d", 3))
        self._line, theirs = socket.socketpair()
        arguments = sent, steps, theirs, self.reading
        self.process = spawn.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.called = f"{name} (process {self.process.pid})"
        atexit.register(self.close)  # before multiprocessing, which would wait for it: it does not hear SIGTERM

    def read(self) -> Loaded:
        try:
            found = _receive(self._line)
        except OSError:
            if self.reading.closed:
                raise Closed from None
            self.process.join(END)
            raise self._absent(self._end()) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def sticks(self, timeout: float) -> Absent | None:
        """Also where the process is silent. Raises Absent where it has ended too early."""
        status = self.process.exitcode
        if status:
            raise self._absent(self._end())
        (has_begun, silence), stopped = self.reading.silence, _is_stopped(self.process.pid)
        if status is None and silence > (SILENT if has_begun or stopped else START):
            return self._absent(f"{'stopped' if stopped else 'without a sign of life'} for {silence:.0f} s")
        return super().sticks(timeout)

    def _end(self) -> str:
        status = self.process.exitcode
        if status is None or status >= 0:
            return f"ended with status {status}"
        memory = " (as the system does where memory runs out)" if -status == signal.SIGKILL else ""
        return f"killed by signal {-status}{memory}"

    def _absent(self, found: str) -> Absent:
        return Absent(
            "data.workers", f"{self.called}, which was to bring step {self.step + 1}, {found}", "a process that reads",
            f"{GO_ON}; data.workers=0 reads without further processes",
        )  # fmt: skip

    def close(self) -> None:
        atexit.unregister(self.close)
        self.reading.closed = True
        self.process.kill()
        self.process.join(END)
        super().close()
        self._line.close()


def steps_from(source: StepSource, first: int, workers: int = 0, timeout: float = 0.0) -> Iterator[Loaded]:
    """The steps from `first` on, in order, read ahead by a thread (or by `workers` processes).

    Raises:
        Absent: a process was killed, or does not run; or a record is being read for more than `timeout` seconds (0:
            as long as it takes).
        UserError: the source cannot be sent to processes.
    """
    steps = range(first, len(source))
    if not steps:
        return
    readers = _start_workers(source, steps, workers) if workers else [_Reader(source, steps)]
    try:
        for reader in readers:
            reader.start()
        looked = time.monotonic()
        for number in range(len(steps)):
            loaded = None
            while loaded is None:
                loaded = readers[number % len(readers)].take(LOOK)
                if time.monotonic() - looked >= LOOK:
                    for reader in readers:
                        reader.check(timeout)
                    looked = time.monotonic()
            yield loaded
    finally:
        for reader in readers:
            reader.close()


def _start_workers(source: StepSource, steps: range, workers: int) -> list[_Worker]:
    try:
        sent = pickle.dumps(source)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            "data.workers", f"{workers}, to whose processes the data cannot be sent ({error})",
            "functions that a module has by their names", "define them in a file for --register, or set data.workers=0",
        ) from error  # fmt: skip
    with _stop_signals_blocked():
        return [
            _Worker(source, sent, steps[n::workers], f"worker {n + 1} of {workers}")
            for n in range(min(workers, len(steps)))
        ]


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Processes started in here never see the signals that stop a run, from their first moment on.

    Such a signal may be sent to all processes of the run, which still reads up to its last step.
    """
    resource_tracker.ensure_running()  # it would start with the first worker, and then unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(sent: bytes, steps: range, line: socket.socket, reading: Reading) -> None:
    """What the process of a worker does."""
    source: StepSource = pickle.loads(sent)
    threading.Thread(target=_live, args=(reading,), daemon=True).start()
    try:
        for loaded in streamed(source, steps, reading):
            _send(line, loaded)
    except Exception as error:
        _send(line, _sendable(error))


def _live(reading: Reading) -> None:
    """Say that this process runs, as long as the one that reads from it does, in whatever way that may end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    reading.live()
    while not connection.wait([parent.sentinel], LOOK):
        reading.live()
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _is_stopped(pid: int | None) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _send(line: socket.socket, thing: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(thing, 5, buffer_callback=buffers.append)
    parts = [memoryview(data), *(buffer.raw() for buffer in buffers)]
    line.sendall(struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        line.sendall(part)


def _receive(line: socket.socket) -> Any:
    """What `_send` was given. Raises OSError where the other end is gone."""
    (count,) = struct.unpack("<Q", _exactly(line, 8))
    sizes = struct.unpack(f"<{count}Q", _exactly(line, 8 * count))
    data, *buffers = (_exactly(line, size) for size in sizes)
    return pickle.loads(data, buffers=buffers)


def _exactly(line: socket.socket, size: int) -> memoryview:
    """So many bytes, in memory that is not cleared before."""
    received = rest = np.empty(size, np.uint8).data
    while rest:
        count = line.recv_into(rest, 0, socket.MSG_WAITALL)
        if not count:
            raise ConnectionResetError("closed")
        rest = rest[count:]
    return received
