"""A stop signal lets the step finish; a second one ends the process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elm_jax.runtime import distributed
from elm_jax.runtime.faults import StopSignal

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", StopSignal.SIGNALS, ids=lambda s: s.name)
def test_a_signal_asks_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before


def test_in_a_thread_it_does_nothing() -> None:
    seen: list[bool] = []

    def enter() -> None:
        with StopSignal() as stop:
            seen.append(stop.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


def test_the_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "from elm_jax.runtime.faults import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.asked, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ended.returncode == -signal.SIGTERM and ended.stdout.split() == ["True"]


def test_among_several_processes_sigterm_ends_one_but_while_they_train() -> None:
    """There JAX listens, so that all of them stop after the same step; before and after nothing would look."""
    code = (
        "import os, signal, sys, time, jax\n"
        "from elm_jax.runtime import distributed\n"
        "from elm_jax.runtime.faults import StopSignal\n"
        "from elm_jax.runtime.launchers import Place\n"
        "from jax.experimental.multihost_utils import reached_preemption_sync_point\n"
        "when, address = sys.argv[1:]\n"
        "distributed._initialize(Place('one', address, 1, 0), None)\n"
        "if when == 'before':\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "with StopSignal(together=True):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    step = 0\n"
        "    while not reached_preemption_sync_point(step):\n"
        "        step += 1\n"
        "        time.sleep(0.1)\n"
        "    print('agreed', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('not reached', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for when, printed in (("before", []), ("after", ["agreed"])):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-c", code, when, address]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert ended.returncode == -signal.SIGTERM and ended.stdout.split() == printed, ended.stderr


def test_among_several_processes_sigusr1_becomes_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which JAX listens to."""
    terminated: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    monkeypatch.setattr(distributed, "listen_to_sigterm", lambda: None)
    try:
        with StopSignal(together=True) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert terminated == [signal.SIGTERM] and not stop.asked
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
