"""Processes that join, end in order, fail or are killed: the others say which one, and stop. Without jax."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time
from elm_jax.errors import UserError
from elm_jax.runtime import launchers, lifeline

lifeline.GRACE_SECONDS = 1.0
how = sys.argv[1]
place = launchers.find(os.environ)
judge = lambda all: UserError("facts", "odd ones", "even ones", "mend") if any(f["odd"] for f in all) else None
try:
    line = lifeline.join(place, {"odd": how == "odd"}, judge)
except UserError as error:
    sys.exit(f"error: {error}")
print("joined", *line.hosts, flush=True)
if how == "wait":
    time.sleep(600)
error = {"wrong": UserError("file", "a", "b", "c"), "fault": ValueError("a fault")}.get(how)
line.leave(error)
if error:
    time.sleep(600)  # as the end of JAX waits for the others
"""


def free_port() -> int:
    """A port of which the next is free, too."""
    while True:
        with socket.socket() as one, socket.socket() as next_one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Group:
    """Processes that belong together; `how` of each is what it does when it has joined."""

    def __init__(
        self, *how: str, count: int | None = None, numbers: list[int] | None = None, seconds: int = 20,
        peer_seconds: int = 60,
    ) -> None:
        together = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count or len(how)),
            "PYTHONPATH": str(ROOT), "ELM_JAX_JOIN_TIMEOUT": str(seconds),
            "ELM_JAX_PEER_TIMEOUT": str(peer_seconds),
        }  # fmt: skip
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, what], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, **together, "JAX_PROCESS_ID": str((numbers or range(99))[i])},
            )
            for i, what in enumerate(how)
        ]  # fmt: skip

    def wait_until_joined(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("joined")

    def end(self) -> list[tuple[int, str]]:
        """(status, stderr) of each."""
        try:
            told = [process.communicate(timeout=120)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, text) for process, text in zip(self.processes, told, strict=True)]


def test_they_join_and_end_in_order() -> None:
    assert Group("leave", "leave", "leave").end() == [(0, "")] * 3


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_is_named_and_the_others_stop(victim: int) -> None:
    group = Group("wait", "wait", "wait")
    group.wait_until_joined()
    os.kill(group.processes[victim].pid, signal.SIGKILL)
    ended = group.end()
    for index, (status, text) in enumerate(ended):
        if index == victim:
            assert status == -signal.SIGKILL
        else:
            assert status == 75 and f"process {victim} of 3, on {socket.gethostname()}, is gone" in text


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_stopped_is_named_and_the_others_stop(victim: int) -> None:
    group = Group("wait", "wait", "wait", peer_seconds=3)
    group.wait_until_joined()
    os.kill(group.processes[victim].pid, signal.SIGSTOP)
    for index in {0, 1, 2} - {victim}:
        group.processes[index].wait(120)
    group.processes[victim].kill()
    for index, (status, text) in enumerate(group.end()):
        if index != victim:
            words = f"process {victim} of 3, on {socket.gethostname()}, has not been heard of for "
            assert status == 75 and words in text and "the same command goes on" in text


def test_the_error_of_one_is_that_of_all() -> None:
    ended = Group("wait", "wrong", "wait").end()
    assert [status for status, _ in ended] == [2, 2, 2]
    for index in (0, 2):
        assert ended[index][1] == "error: file: found a; expected b; c\n"


def test_a_fault_of_one_is_told_to_all() -> None:
    ended = Group("fault", "wait").end()
    assert [status for status, _ in ended] == [1, 1]
    assert f"process 0 on {socket.gethostname()} has failed: ValueError: a fault" in ended[1][1]


def test_one_that_does_not_come_is_named() -> None:
    ended = Group("wait", "wait", count=4, numbers=[0, 2], seconds=6).end()
    for status, text in ended:
        assert status == 1 and "JAX_NUM_PROCESSES: found 2 of 4 processes within 6 s, without number 1, 3" in text


def test_without_process_0_the_address_is_named() -> None:
    ((status, text),) = Group("wait", count=2, numbers=[1], seconds=2).end()
    assert status == 1 and "JAX_COORDINATOR_ADDRESS: found no answer of process 0 at 127.0.0.1" in text


def test_two_with_one_number_are_named() -> None:
    ended = Group("wait", "wait", "wait", count=3, numbers=[0, 1, 1]).end()
    for status, text in ended:
        assert status == 1 and "JAX_PROCESS_ID: found 1 of 3 on" in text


def test_what_is_wrong_with_one_is_told_to_all() -> None:
    ended = Group("wait", "odd", "wait").end()
    for status, text in ended:
        assert status == 1 and "error: facts: found odd ones; expected even ones; mend" in text


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", free_port())) as taken:
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{taken.getsockname()[1]}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "wait"], env=environment, capture_output=True, text=True, timeout=120
        )
    assert "JAX_COORDINATOR_ADDRESS: found port" in done.stderr and "a free port" in done.stderr


@pytest.mark.parametrize("seconds", ["soon", "inf", "-1"])
def test_a_timeout_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    from elm_jax.errors import UserError
    from elm_jax.runtime import lifeline
    from elm_jax.runtime.launchers import Place

    monkeypatch.setenv("ELM_JAX_JOIN_TIMEOUT", seconds)
    with pytest.raises(UserError, match=f"ELM_JAX_JOIN_TIMEOUT: found '{seconds}'"):
        lifeline.join(Place("x", "h:1", 2, 1), {}, lambda _: None)
