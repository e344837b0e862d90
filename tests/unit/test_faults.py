"""What a signal means in each phase of a command, and what a run that makes no progress comes to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from elm_jax import cli, stopping
from elm_jax.stopping import Agreement, StopAfterStep

ROOT = Path(__file__).resolve().parents[2]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def program(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program that uses `stopping`, to its end."""
    command = [sys.executable, "-c", f"import os, signal, sys, time\nfrom elm_jax import cli, stopping\n{code}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=120, cwd=ROOT
    )


# -- a signal ends a command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)], ids=lambda x: str(x)
)
def test_it_ends_a_command_in_a_line(number: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """And everything is put away, and what signals meant before they mean again."""
    left: list[str] = []
    before = signal.signal(number, signal.default_int_handler)

    def command(_: Any) -> None:
        try:
            stopping.doing("reading records")
            send(number)
            left.append("not reached")
        finally:
            left.append("put away")

    try:
        assert cli.guard(command, []) == status and left == ["put away"]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"stopped by {name} (reading records); run the same command to go on\n"


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As SIGINT is in a job that a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.guard(lambda _: send(signal.SIGINT), []) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_may_be_caught_and_the_command_goes_on() -> None:
    def command(_: Any) -> int:
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            return 7
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.guard(command, []) == 7
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_ends_a_process_whose_main_thread_hears_nothing() -> None:
    """As in a library that compiles, or waits for another process."""
    code = (
        "import ctypes, threading\n"
        "stopping.GRACE = 0.1\n"
        "def command(_):\n"
        "    stopping.doing('compiling')\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    ctypes.CDLL(None).sleep(100)\n"
        "sys.exit(cli.guard(command, []))\n"
    )
    ended = program(code)
    assert ended.returncode == 143, ended.stderr
    assert ended.stderr == "stopped by SIGTERM (compiling); run the same command to go on\n"


@pytest.mark.parametrize("waits", ["time.sleep(100)", "threading.Thread(target=time.sleep, args=(100,)).start()"])
def test_it_ends_a_process_that_does_not_come_to_its_end(waits: str) -> None:
    code = (
        "import threading\n"
        "stopping.GRACE = 0.5\n"
        "def command(_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        f"        {waits}\n"
        "sys.exit(cli.guard(command, []))\n"
    )
    ended = program(code)
    assert ended.returncode == 143, ended.stderr
    assert ended.stderr == "stopped by SIGTERM (starting); run the same command to go on\n"


def test_a_stop_within_a_callback_where_nothing_can_be_raised_comes_after_it() -> None:
    """As in JAX's, of the garbage collector."""
    code = (
        "import gc, time\n"
        "def command(_):\n"
        "    gc.callbacks.append(lambda *_: gc.callbacks.clear() or os.kill(os.getpid(), signal.SIGTERM))\n"
        "    gc.collect()\n"
        "    time.sleep(100)\n"
        "stopping.GRACE = 60\n"
        "sys.exit(cli.guard(command, []))\n"
    )
    ended = program(code)
    assert ended.returncode == 143, ended.stderr
    assert ended.stderr == "stopped by SIGTERM (starting); run the same command to go on\n"


# -- or asks training to stop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=lambda s: s.name)
def test_training_stops_after_its_step_however_many_signals_come(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), StopAfterStep() as stop:
        assert stop.after(1) is None and stop.after(2, due=True) == ""
        for _ in range(4):
            send(number)
        assert stop.after(3, due=True) == number.name
        raise SystemExit
    again = f"{number.name} again: the step ends and its checkpoint is written; SIGKILL would lose it\n"
    assert capfd.readouterr().err == again


def test_before_its_first_step_a_signal_ends_it() -> None:
    with pytest.raises(stopping.Stopped), StopAfterStep():
        send(signal.SIGTERM)


def test_after_its_last_step_a_signal_ends_it() -> None:
    with pytest.raises(stopping.Stopped), StopAfterStep() as stop:
        assert not stop.after(1)
        send(signal.SIGTERM)


def test_on_a_terminal_the_third_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(os, "isatty", lambda _: True)
    monkeypatch.setattr(stopping, "_say", said.append)
    monkeypatch.setattr(stopping, "end_now", lambda text, status: said.append(f"{status}: {text}"))
    with pytest.raises(SystemExit), StopAfterStep() as stop:
        assert not stop.after(1)
        for _ in range(3):
            send(signal.SIGINT)
        raise SystemExit
    assert "twice more" in said[0] and "once more" in said[1] and said[2].startswith("130: stopped by SIGINT")


# -- in several processes, after one step ---------------------------------------------------------------------


def group(passed: Sequence[int]) -> list[Agreement]:
    """Processes that have passed so many steps each."""
    members: list[Agreement] = []

    def sends(index: int) -> Any:
        return lambda message: [
            other.hear(index, message) for i, other in enumerate(members) if (i == 0) != (index == 0)
        ]

    members.extend(Agreement(index, len(passed), sends(index)) for index in range(len(passed)))
    for index, last in enumerate(passed):
        assert not any(members[index].after(step, due=index > 0) for step in range(1, last + 1))
    return members


def test_processes_stop_after_the_step_behind_the_latest() -> None:
    """Whoever is asked, and though each is at another step."""
    members = group((4, 7, 5))
    members[2].ask("SIGUSR1")
    members[1].ask("SIGTERM")  # a second one changes nothing
    for index, last in enumerate((4, 7, 5)):
        answers = [members[index].after(step) for step in range(last + 1, 9)]
        assert answers == [*[None] * (7 - last), "SIGUSR1 in process 2"]


def test_processes_save_after_one_step_by_the_clock_of_the_first() -> None:
    members = group((4, 7, 5))
    assert members[0].after(5, due=True) is None  # the others are further
    members[1].ask("SIGTERM")  # meanwhile, and after the same step
    for index, last in enumerate((5, 7, 5)):
        assert [members[index].after(step, True) for step in range(last + 1, 8)] == [None] * (7 - last)
        assert members[index].after(8, True) == "SIGTERM in process 1"
    members = group((4, 7, 5))
    assert [members[0].after(step, True) for step in range(5, 9)] == [None, None, None, ""]
    assert [members[2].after(step) for step in range(6, 9)] == [None, None, ""] and members[1].after(8) == ""
    assert [one.after(9, True) for one in members] == [""] * 3  # all at the same step
    assert not any(one.after(10) == "" for one in members)


def test_who_is_asked_before_its_first_step_asks_after_it() -> None:
    sent: list[Any] = []
    one = Agreement(1, 2, sent.append)
    asking = threading.Thread(target=one.ask, args=("SIGTERM",))
    asking.start()
    assert not sent and not one.after(1)
    asking.join(60)
    assert sent == [{"stop": "SIGTERM in process 1"}]


def test_it_ends_though_nobody_reads_what_it_says() -> None:
    read, write = os.pipe()
    code = (
        "os.set_blocking(2, False)\n"
        "try:\n"
        "    while True: os.write(2, b'x' * 4096)\n"
        "except BlockingIOError: pass\n"
        "os.set_blocking(2, True)\n"
        "stopping.TELLING_SECONDS = 0.1\n"
        "stopping.end_now('the end ' * 1000, 75)\n"
    )
    command = [sys.executable, "-c", f"import os\nfrom elm_jax import stopping\n{code}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, stderr=write, env=environment, timeout=120).returncode == 75
    os.close(read)
    os.close(write)


def test_a_process_waits_before_its_next_step_until_all_have_agreed() -> None:
    sent: list[Any] = []
    one = Agreement(1, 2, sent.append)
    assert not one.after(3)
    one.hear(0, {"count": True})
    assert sent == [{"passed": 3}]
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.extend(one.after(step) for step in (4, 5)))
    thread.start()
    time.sleep(0.05)
    assert not found
    one.hear(0, {"last": 5, "why": "SIGTERM in process 0"})
    thread.join(60)
    assert found == [None, "SIGTERM in process 0"]


# -- a run that makes no progress -----------------------------------------------------------------------------

HANGS = """
from pathlib import Path
import threading
from elm_jax.runtime.watchdog import Watchdog

began = threading.Event()

def devices():
    stopping.doing("step 41 on the devices")
    began.set()
    threading.Event().wait()

with Watchdog(Path(sys.argv[1]), *map(float, sys.argv[2].split(","))):
    for _ in range(5):
        stopping.doing("reading step 41")
        time.sleep(0.02)
    if sys.argv[3] == "devices":
        threading.Thread(target=devices, daemon=True).start()
        began.wait()
        stopping.doing("step 42")
    if sys.argv[3] == "recording":
        with stopping.reading("a.npy"):
            while True:
                stopping.doing("reading others")
                time.sleep(0.01)
    time.sleep(float(sys.argv[4]))
"""


@pytest.mark.parametrize(("where", "told"), [("devices", "step 41 on the devices"), ("reader", "reading step 41")])
def test_it_ends_with_the_stacks_and_what_it_waited_for(tmp_path: Path, where: str, told: str) -> None:
    ended = program(HANGS, str(tmp_path), "0.5", where, "600")
    assert ended.returncode == 75, ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f"error: {told}: found no progress for 0.5 s")
    stacks = next(tmp_path.glob("stacks-0-*.txt"))
    assert str(stacks) in line and 'File "<string>"' in stacks.read_text() and 'File "<string>"' in ended.stderr


def test_it_ends_where_one_recording_sticks(tmp_path: Path) -> None:
    ended = program(HANGS, str(tmp_path), "0,0.4", "recording", "600")
    line = ended.stderr.splitlines()[-1]
    assert ended.returncode == 75 and line.startswith("error: a.npy: found being read for "), ended.stderr
    assert "at most data.timeout=0.4 s" in line and next(tmp_path.glob("stacks-0-*.txt"))


def test_zero_watches_nothing(tmp_path: Path) -> None:
    ended = program(HANGS, str(tmp_path), "0", "reader", "0.3")
    assert ended.returncode == 0 and not list(tmp_path.iterdir()), ended.stderr
