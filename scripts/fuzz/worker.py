"""A process that tries inputs, one after the other, under limits: processor time, memory, and what it may touch."""

import contextlib
import faulthandler
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import traceback
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.fuzz.targets import TARGETS, Target, ended, made, place

SECONDS = 1.0  # of processor time for one input
WAIT = 120.0  # seconds by the clock: who waits for something uses no processor
MEMORY = 1 << 30  # bytes of address space that an input may add to what the worker has at its start
TMPFS = "/dev/shm" if Path("/dev/shm").is_dir() else None
ENCODINGS = ("latin-1", *(f"utf-{bits}" for bits in ("8", "8-sig", "16", "16-le", "16-be", "32", "32-le", "32-be")))
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill", "os.putenv", "pty."),
    *("subprocess.", "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "ctypes.dlopen", "pickle.find_class"),
    *("webbrowser.", "code.", "marshal.load", "shelve.", "sqlite3.", "import", "exec"),
)
CHANGES = (
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "shutil."),
)


class Touched(BaseException):
    """An input had something run, fetched or opened that is none of its business."""


class Watch:
    """Notes, while an input is tried, code that runs, imported modules (but `imports`), and files outside `folder`."""

    def __init__(self, folder: Path, imports: tuple[str, ...]) -> None:
        self.folder, self.imports, self.on, self.seen = os.path.realpath(folder), imports, False, ""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and (event.startswith(FORBIDDEN) or event == "open" or event.startswith(CHANGES)):
            if event == "exec" and sys._getframe(1).f_code.co_filename == typing.__file__:
                return  # annotations of our own
            inside = all(map(self._inside, args[: 2 if event == "os.rename" else 1]))
            if (event.startswith(FORBIDDEN) or not inside) and not self._imports(event, args):
                self.on = False
                self.seen = f"{event} {args!r:.300}"
                raise Touched(self.seen)

    def _imports(self, event: str, args: tuple[Any, ...]) -> bool:
        """Whether it is the import of an allowed package, or part of one."""
        names, frame = [args[0]] if event == "import" else [], sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                names.append(frame.f_locals.get("name", ""))
            frame = frame.f_back
        return any(str(name).partition(".")[0] in self.imports for name in names)

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int) or path == os.devnull:  # a number: of a file that is open already
            return True
        with contextlib.suppress(TypeError, ValueError):
            return os.path.realpath(os.fsdecode(path)).startswith(self.folder)
        return True  # what no file can be called

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.on, self.seen = True, ""
        try:
            yield
        finally:
            self.on = False
        if self.seen:  # a reader may have taken it for a fault of the file
            raise Touched(self.seen)


def work(name: str, seed: int, first: int, count: int, progress: Path) -> None:
    """Try inputs `first` and on, each in a folder beside the file `progress`, which says the number of the last one; a
    line of JSON for each finding, and for all at the end."""
    warnings.simplefilter("ignore")
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    for number in (signal.SIGPROF, signal.SIGALRM):
        faulthandler.register(number, chain=True)  # says where it is, then ends the process: no Python is needed for it
    for encoding in ENCODINGS:
        "".encode(encoding)
    base = progress.parent
    target = TARGETS[name]
    watch = Watch(base, target.imports)
    with progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as at:
        for files in target.seeds:  # this imports what readers import late; each must be read as it is
            assert try_one(target, files, base) == "read", f"a seed is refused: {list(files)}"
        made(seed, first, name)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        counts: Counter[str] = Counter()
        for number in range(first, first + count):
            at[:8] = number.to_bytes(8, "little")
            files = made(seed, number, name)
            try:
                counts[try_one(target, files, base, watch)] += 1
            except BaseException:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                counts["found"] += 1
                said = {"found": number, "said": traceback.format_exc()[-3000:]}
                print(json.dumps(said), file=report, flush=True)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0])  # kB resident; getrusage tells the parent's where that was larger
        print(json.dumps({"counts": counts, "peak": peak}), file=report, flush=True)


def try_one(target: Target, files: dict[str, bytes], base: Path, watch: Watch | None = None) -> str:
    """How an input ended; with `watch`, under the limits."""
    at: Any = next(iter(files.values()))
    folder = base / "input"
    if not target.in_memory:
        folder.mkdir()
        at = place(files, folder)
    try:
        if watch is None:
            return ended(target, at)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with watch.watching():
            found = ended(target, at)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return found
    finally:
        if not target.in_memory:
            shutil.rmtree(folder, ignore_errors=True)
