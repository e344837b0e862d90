"""What this process does now, and what a signal that asks it to end means meanwhile.

SIGTERM, SIGINT and SIGUSR1 (which SLURM may send before a job's time is up) end a command at once, with a line that
says where it was and status 143, or 130 for SIGINT: by an exception in the main thread, so that nothing half-written
stays; by another thread where the main one waits in a library and does not hear for GRACE seconds. Training that has
taken a step is asked to stop and to save instead (`StopAfterStep`), in several processes after the same step, as is
what they save by the clock (`Agreement`). What the process does (`doing`) is what these lines tell, and what
`runtime.watchdog` waits for.
Imports no jax.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn, Protocol, Self, TypeVar

from elm_jax.errors import printable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT  # exit status
_SOON = 0.05  # seconds between attempts to raise a stop that was lost
GRACE = 10.0  # seconds in which the main thread may end by itself
TELLING_SECONDS = 10.0  # for the last words
T = TypeVar("T")


class Stopped(SystemExit):
    """A signal ends this process; `text` is its last line."""

    status = STOPPED

    def __init__(self, text: str) -> None:
        super().__init__(self.status)
        self.text = text


class Interrupted(KeyboardInterrupt):
    """SIGINT, as `Stopped`. A command may catch it and go on, as with any KeyboardInterrupt."""

    status = INTERRUPTED

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Peers(Protocol):
    """The other processes of this run."""

    agreement: Agreement

    def end(self, text: str, status: int, /) -> None:
        """Tell them that this process ends now, so that they do, too."""
        ...


peers: Peers | None = None

# -- what is done ---------------------------------------------------------------------------------------------

_now: dict[int, tuple[str, float]] = {}  # thread -> what it does, since when (time.monotonic)


def doing(what: str) -> None:
    """From now on this thread does `what` (nothing, if it is empty): what it did before has come to its end."""
    _now[threading.get_ident()] = what, time.monotonic()


def goes_on() -> None:
    """A part of what this thread does has come to its end."""
    doing(_doing())


def forget() -> None:
    """This thread ends."""
    _now.pop(threading.get_ident(), None)


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Within, this thread does `what`, as a part of what it did before."""
    before = _doing()
    doing(f"{what}, {before}" if before else what)
    try:
        yield
    finally:
        doing(before)


def each(items: Iterable[T], what: str, first: int = 0) -> Iterator[T]:
    """The items. To read one is something that this thread does, and so is what happens to it; `first` are behind."""
    number, before = first, _doing()
    doing(f"reading {what} {number + 1}")
    for item in items:
        number += 1
        doing(f"{what} {number}")
        yield item
        doing(f"reading {what} {number + 1}")
    doing(before)


def _doing(thread: int | None = None) -> str:
    return _now.get(thread or threading.get_ident(), ("", 0.0))[0]


def progress() -> tuple[float, str]:
    """When any thread last came to the end of something, and what has been done for the longest time since."""
    now = list(_now.values())
    waiting = [(since, what) for what, since in now if what]
    return max((since for _, since in now), default=0.0), min(waiting, default=(0.0, "nothing"))[1]


_reads: dict[int, tuple[str, float]] = {}  # thread -> the recording that it reads, since when


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Within, this thread reads a recording, which should not take long."""
    _reads[threading.get_ident()] = path, time.monotonic()
    try:
        yield
    finally:
        del _reads[threading.get_ident()]


def oldest_read() -> tuple[str, float] | None:
    """The recording that a thread has been reading for the longest time, and since when."""
    return min(list(_reads.values()), key=lambda read: read[1], default=None)


# -- signals --------------------------------------------------------------------------------------------------

_training: StopAfterStep | None = None  # what a signal asks to stop, instead of ending the process
_listener: listening | None = None


class listening:
    """While entered, in the main thread, signals mean what this module says. One that was ignored before stays so."""

    def __enter__(self) -> Self:
        global _listener
        self._before: dict[int, Any] = {}
        if _listener is not None or threading.current_thread() is not threading.main_thread():
            return self
        _listener = self
        self._ending: threading.Timer | None = None
        self._lost: BaseException | None = None
        self._raised: BaseException | None = None  # what was lost, by now
        self._left = threading.Event()
        self._ear, self._mouth = socket.socketpair()
        for end in (self._ear, self._mouth):
            end.setblocking(False)
        self._before = {n: old for n in SIGNALS if (old := signal.getsignal(n)) is not signal.SIG_IGN}
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._hear_of_lost
        self._fd_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, self._hear)
        self._watch = threading.Thread(target=self._watch_main, daemon=True, name="signals")
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _listener
        if _listener is not self:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._fd_before)
        sys.unraisablehook = self._hook_before
        self._left.set()
        with contextlib.suppress(BlockingIOError):
            self._mouth.send(b"\0")  # wakes it
        self._watch.join()
        self._ear.close()
        self._mouth.close()
        _listener = None

    def _hear(self, number: int, _: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)  # so that `_watch_main` sees it heard
        if self._lost is not None:
            self._raised, self._lost = self._lost, None
            raise self._raised
        if _training is not None:
            _training.hear(number)
        elif number == signal.SIGINT:
            raise Interrupted(_stopped_by(number))
        elif self._ending is None:
            stop = Stopped(_stopped_by(number))
            self._ending = threading.Timer(GRACE, self._end, (stop,))
            self._ending.daemon = True
            self._ending.start()
            raise stop

    def _hear_of_lost(self, unraisable: Any) -> None:
        """Raise a stop again that came where nothing can be raised: in a callback of the garbage collector, which
        JAX has, or while an object is deleted."""
        if not isinstance(unraisable.exc_value, Stopped | Interrupted):
            self._hook_before(unraisable)
            return
        lost, self._raised = unraisable.exc_value, None
        threading.Thread(target=self._send_again, args=(lost,), daemon=True, name="stop again").start()
        self._lost = lost  # last: from here on a signal raises it, and in this hook that would be lost, too

    def _send_again(self, lost: BaseException) -> None:
        main, number = threading.main_thread().ident, next(iter(self._before))
        while not self._left.wait(_SOON) and self._raised is not lost:
            if self._lost is lost and main is not None:
                signal.pthread_kill(main, number)

    def _end(self, stop: Stopped) -> None:
        """The main thread does not end, or after it another one."""
        if _listener is self:
            end_now(stop.text, stop.status)
        if not threading.main_thread().is_alive():  # else a program that has called us goes on
            os._exit(stop.status)

    def _watch_main(self) -> None:
        """End the process where the main thread does not hear a signal: the system wakes this one, too."""
        while True:
            select.select([self._ear], [], [])
            if self._left.wait(GRACE):
                return
            if _training is None and select.select([self._ear], [], [], 0)[0]:
                number = self._ear.recv(1)[0]
                if number in SIGNALS:
                    end_now(_stopped_by(number), INTERRUPTED if number == signal.SIGINT else STOPPED)


class StopAfterStep:
    """While entered, and once a first step was taken, a signal asks training to stop after a step and to save.

    Further signals of any kind change nothing, and are answered once. On a terminal the third Ctrl-C ends the process
    at once.
    """

    def __init__(self) -> None:
        self._heard: list[int] = []
        self._listening = listening()

    def __enter__(self) -> Self:
        self._listening.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _training
        _training = None
        self._listening.__exit__()
        if kind is None and self._heard:  # it came when the last step was behind us
            raise Stopped(_stopped_by(self._heard[0]))

    def after(self, step: int, due: bool = False) -> str | None:
        """What is to be done after this step: None nothing; "" a checkpoint, which is `due` by the clock; else why
        training stops, with a checkpoint: which signal came. Several processes do it after the same step, and wait
        until they have agreed which; the clock is that of process 0."""
        global _training
        _training = self  # there is something to save
        if peers is not None:
            return peers.agreement.after(step, due)
        return signal.Signals(self._heard[0]).name if self._heard else "" if due else None

    def hear(self, number: int) -> None:
        """A signal has come."""
        self._heard.append(number)
        name, terminal = signal.Signals(number).name, number == signal.SIGINT and os.isatty(2)
        if len(self._heard) == 1:
            if peers is not None:  # in a thread: this may have interrupted one that sends
                threading.Thread(target=peers.agreement.ask, args=(name,), daemon=True).start()
            if terminal:
                _say("SIGINT: stops after this step, with a checkpoint; Ctrl-C twice more: at once, without it")
        elif terminal and self._heard.count(number) == 3:
            end_now(_stopped_by(number), INTERRUPTED)
        elif len(self._heard) == 2:
            gives_up = "Ctrl-C once more ends at once, without it" if terminal else "SIGKILL would lose it"
            _say(f"{name} again: the step ends and its checkpoint is written; {gives_up}")


class Agreement:
    """After which step processes that take the same steps save, or stop.

    Each has its own pace: one may have handed steps over to its devices that another has not read yet. Who is asked
    to stop tells process 0; whose clock says when a checkpoint is due. It has all of them say which step they have
    passed, and wait before they pass another; the one after the latest of these is that after which it is done.

    Args:
        send: sends a message to process 0, or from there to all others, whose `hear` gets it.
    """

    def __init__(self, index: int, count: int, send: Callable[[Mapping[str, Any]], None]) -> None:
        self.index, self._count, self._send = index, count, send
        self._turn = threading.Condition()
        self._passed, self._waits = -1, False
        self._agreed: dict[int, str] = {}  # step -> what is done after it: "" is a checkpoint, else why all stop
        # Of process 0: what is asked for, the first of which is being agreed on; what each has passed.
        self._asked: list[str] = []
        self._all: dict[int, int] = {}

    def ask(self, why: str) -> None:
        """Have all processes stop after a step; waits until this one has passed a first."""
        with self._turn:
            self._turn.wait_for(lambda: self._passed >= 0)
        message = {"stop": f"{why} in process {self.index}"}
        if self.index:
            self._send(message)
        else:
            self.hear(0, message)

    def after(self, step: int, due: bool = False) -> str | None:
        """What all processes do after this step: None where they go on, "" where they save, else why they stop."""
        with self._turn:
            if due and self.index == 0 and self._passed >= 0 and not self._asked and not self._agreed:
                self._ask_all("")
            self._turn.wait_for(lambda: not self._waits)
            self._passed = step
            self._turn.notify_all()
            return self._agreed.pop(step, None)

    def hear(self, sender: int, message: Mapping[str, Any]) -> None:
        """Take a message of another process; what is none of these is passed over."""
        with self._turn:
            if "stop" in message:
                if not any([*self._asked, *self._agreed.values()]):  # they stop once
                    self._ask_all(message["stop"])
            elif "count" in message:
                self._waits = True
                self._send({"passed": self._passed})
            elif "passed" in message:
                self._all[sender] = message["passed"]
                if len(self._all) == self._count:
                    last, why = max(self._all.values()) + 1, self._asked.pop(0)
                    self._send({"last": last, "why": why})
                    self._settle(last, why)
                    if self._asked:
                        self._ask_all()
            elif "last" in message:
                self._settle(message["last"], message["why"])

    def _ask_all(self, *why: str) -> None:
        """Ask which step each has passed, for what is asked for first, once that before it is agreed on."""
        self._asked += why
        if not self._waits:
            self._waits, self._all = True, {0: self._passed}
            self._send({"count": True})

    def _settle(self, last: int, why: str) -> None:
        self._agreed[last] = why or self._agreed.get(last, "")
        self._waits = False
        self._turn.notify_all()


def end_now(text: str, status: int, tell: bool = True) -> NoReturn:
    """End this process, whatever its threads wait for, and its peers unless they need not be told. `text` is its last
    line, if any."""
    timer = threading.Timer(TELLING_SECONDS, os._exit, (status,))  # nobody may read what is written
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no threads any more
        timer.start()
    if tell and peers is not None:
        peers.end(text, status)
    if text:
        _say(text)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(status)


def _stopped_by(number: int) -> str:
    what = _doing(threading.main_thread().ident)
    return f"stopped by {signal.Signals(number).name}{f' ({what})' if what else ''}; run the same command to go on"


def _say(text: str) -> None:
    """A line on stderr, from a signal's handler, too: `print` cannot be interrupted by itself."""
    with contextlib.suppress(OSError):
        os.write(2, f"{printable(text)}\n".encode())
