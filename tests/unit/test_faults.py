"""A stop signal lets the step finish; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

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


def test_inactive_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(active=False) as stop:
        assert signal.getsignal(signal.SIGTERM) is before
    assert not stop.asked


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


def test_among_several_processes_sigusr1_becomes_sigterm() -> None:
    """Which JAX listens to, so that all of them stop after the same step."""
    terminated: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    try:
        with StopSignal(active=False) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert terminated == [signal.SIGTERM] and not stop.asked
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
