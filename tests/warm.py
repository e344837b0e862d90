"""`warm.python()`: a Python for tests' commands that has the imports of elm_jax behind it.

A command of a test spends as long on imports (jax, transformers, orbax: four seconds) as on its tiny run. A server does
them once for all tests of a process, starts no JAX backend, and forks for each command. What a test starts is a small
client that hands its arguments, environment, folder and standard files to the server, passes signals on, and ends as
the command ends, by the same status or signal; when it is killed the command is. To a test it looks like
`sys.executable`, with two limits: `-m module` or a script is warm, and the command is in the server's process group.

A command whose environment differs in what is read at start-up or at import is started cold, by the client itself.
`cli/test_train.py` and others start `sys.executable`, as a user does.
"""

import array
import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Read before any command begins, but for those that are read when processes join, and one that commands set themselves.
EARLY = ("PYTHON", "LD_", "MALLOC_", "OMP_", "OPENBLAS_", "MKL_", "JAX_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "MPL")
LATE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
PATH = {"PYTHONPATH": str(ROOT)}
EXECUTABLE = "TEST_EXECUTABLE"  # what `sys.executable` is to be in a command
CLIENT = (sys.executable, "-S", "-E", __file__, "run")
STOPPING = (signal.SIGTERM, signal.SIGINT)
COLLECTED = (5_000, 20, 50)  # `gc.set_threshold`: tracing makes much, and little of it is garbage
PASSED_ON = (*STOPPING, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def python(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The beginning of a command line, in the place of `sys.executable`; the first call starts a server.

    Commands of one server share their hash seed; processes that must agree (`environment` has JAX_PROCESS_ID) are of
    two servers.
    """
    return *CLIENT, _server(int(environment.get("JAX_PROCESS_ID", "0")) % 2)


def executable(folder: Path, environment: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """A program in `folder` that is `python` for a program that starts `sys.executable` itself, and the environment in
    which it does, with a server of its own: for what begins in `environment`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {shlex.join([*CLIENT, _server(0, json.dumps(dict(environment)))])} "$@"\n')
    path.chmod(0o755)
    return path, {**environment, EXECUTABLE: str(path)}


@functools.cache
def _server(index: int, own: str = "{}") -> str:
    """The socket of a server, with variables of its `own`; it ends when this process does, for its stdin closes."""
    folder = tempfile.TemporaryDirectory(prefix="warm")  # sockets' paths are short
    atexit.register(folder.cleanup)
    path = f"{folder.name}/socket"
    environment = os.environ | json.loads(own) | PATH
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", path], env=environment, cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin and server.stdout
    assert server.stdout.readline() == b"ready\n", "the server of warm processes did not start"
    atexit.register(lambda: (server.stdin.close(), server.wait()))  # type: ignore[union-attr]
    return path


def early(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that a process must have from its start."""
    given = PATH | environment  # a command in the project's folder finds it without
    given["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(given["PYTHONPATH"].split(os.pathsep)))
    return {name: value for name, value in given.items() if name.startswith(EARLY) and name not in LATE}


def run(path: str, arguments: list[str]) -> None:
    """The client: have the server run `arguments`, and end as it ends."""
    environment = dict(os.environ)
    if not arguments or (arguments[0] != "-m" and not arguments[0].endswith(".py")):
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        asked = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
        files = array.array("i", [0, 1, 2])
        server.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        answers = server.makefile("rw", encoding="utf-8", errors="surrogateescape")
        answers.write(json.dumps(asked) + "\n")
        answers.flush()
        # Until its number is known a signal waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        number = json.loads(answers.readline())
        if number is None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)  # or the command would never see them
            os.execve(sys.executable, [sys.executable, *arguments], environment)
        for name in PASSED_ON:
            signal.signal(name, lambda got, _: os.kill(number, got))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status = json.loads(answers.readline())
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(path: str) -> None:
    """The server: import, then fork for each client that connects, until stdin closes."""
    import datasets  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401  # and with it nltk: half a second each of scores
    import transformers.models.auto.tokenization_auto  # noqa: F401  # and with it torch, where there is one

    import elm_jax.analyze
    import elm_jax.chat
    import elm_jax.evaluation.evaluator
    import elm_jax.evaluation.report
    import elm_jax.exchange.bring_in
    import elm_jax.exchange.export
    import elm_jax.export
    import elm_jax.import_weights
    import elm_jax.inference.session
    import elm_jax.train
    import elm_jax.training.loop  # noqa: F401

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    mine = early(dict(os.environ))
    running: dict[int, tuple[int, Any]] = {}  # pidfd -> process, connection
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    for name in STOPPING:  # sent to all processes of the tests: this one ends by its stdin
        signal.signal(name, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTED)
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fd == 0:
                for number, _connection in running.values():
                    os.kill(number, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listening:
                connection, asked, files = _receive(listening)
                if asked is None:  # its client was killed while it asked
                    connection.close()
                    for file in files:
                        os.close(file)
                    continue
                if early(asked["environment"]) != mine:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"null\n")
                    connection.close()
                    for file in files:
                        os.close(file)
                    continue
                number = os.fork()
                if number == 0:
                    waiting.close()
                    listening.close()
                    connection.close()
                    return _become(asked, files)
                for file in files:
                    os.close(file)
                with contextlib.suppress(OSError):
                    connection.sendall(f"{number}\n".encode())
                handle = os.pidfd_open(number)
                running[handle] = number, connection
                waiting.register(handle, selectors.EVENT_READ)
                waiting.register(connection, selectors.EVENT_READ, handle)
            elif key.data is not None:  # its client is gone, so is the command
                if key.fileobj.fileno() < 0:  # type: ignore[union-attr]  # closed in this same round
                    continue
                waiting.unregister(key.fileobj)
                if key.data in running:
                    os.kill(running[key.data][0], signal.SIGKILL)
            else:
                number, connection = running.pop(key.fd)
                waiting.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(number, 0)
                with contextlib.suppress(KeyError):
                    waiting.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()


def _receive(listening: socket.socket) -> tuple[socket.socket, dict[str, Any] | None, list[int]]:
    """The connection of a client, what it asks for (None: it is gone before it has), and its standard files."""
    connection, _ = listening.accept()
    files, data = array.array("i"), b""
    with contextlib.suppress(ConnectionError):
        _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_LEN(3 * 4))
        for _, _, content in ancillary:
            files.frombytes(content)
        while not data.endswith(b"\n") and (more := connection.recv(1 << 16)):
            data += more
    asked = json.loads(data.decode(errors="surrogateescape")) if data.endswith(b"\n") else None
    return connection, asked, list(files)


def _become(asked: dict[str, Any], files: list[int]) -> None:
    """What the forked process does: to be the command that was asked for."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.executable = os.environ.get(EXECUTABLE, sys.executable)
    first, *rest = asked["arguments"]
    status: Any = 0
    try:
        if first == "-m":
            sys.path[0] = asked["folder"]
            sys.argv = rest
            sys.modules.pop(rest[0], None)
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(first).parent)
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
        if not isinstance(status, int):
            raise
    # An interpreter ends by taking apart all that was imported, for half a second: what else it does is done here.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        run(sys.argv[2], sys.argv[3:])
