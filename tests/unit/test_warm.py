"""A warm Python is to a test what a cold one is: arguments, environment, files, status, and signals both ways."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import warm

PROGRAM = """
import os, signal, sys, time
print(sys.argv[1:], os.environ.get("ASKED"), os.getcwd(), "jax" in sys.modules, __name__)
print("told", file=sys.stderr)
line = sys.stdin.readline().strip()
if line == "fail":
    raise ValueError("as asked")
if line == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
    print("waiting", flush=True)
    time.sleep(30)
if line.isdigit():
    os.kill(os.getpid(), int(line))
sys.exit(3)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(python: tuple[str, ...], program: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python, str(program), "a b", ""], input=text, capture_output=True, text=True, cwd=program.parent,
        env=os.environ | environment, timeout=100,
    )  # fmt: skip


def test_it_gives_what_a_cold_one_gives(program: Path) -> None:
    warmly, coldly = (run(python, program, "\n", ASKED="ü") for python in (warm.python(), (sys.executable,)))
    assert warmly.returncode == coldly.returncode == 3
    assert warmly.stdout == coldly.stdout.replace("False", "True") and warmly.stderr == coldly.stderr == "told\n"


def test_an_exception_is_a_traceback_and_status_1(program: Path) -> None:
    done = run(warm.python(), program, "fail\n")
    assert done.returncode == 1 and done.stderr.endswith("ValueError: as asked\n") and "Traceback" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_by_the_signal_that_ended_the_command(program: Path, number: int) -> None:
    assert run(warm.python(), program, f"{int(number)}\n").returncode == -number


def test_another_environment_at_start_up_starts_it_cold(program: Path) -> None:
    assert "True" not in run(warm.python(), program, "\n", PYTHONHASHSEED="1").stdout


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGUSR1, 7), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_reaches_the_command(program: Path, sent: int, status: int) -> None:
    with subprocess.Popen([*warm.python(), str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"wait\n")
        process.stdin.flush()
        while process.stdout.readline() != b"waiting\n":
            pass
        process.send_signal(sent)
        assert process.stdout.read() == b""  # the command has ended, too
    assert process.returncode == status


@pytest.mark.parametrize("said", [b"", b"!", b'!{"arguments": ['])
def test_a_client_that_is_killed_while_it_asks_leaves_the_server_to_others(program: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(warm.python()[-1])
        if said:
            client.sendall(said)
    assert run(warm.python(), program, "\n").returncode == 3
