"""A connection between process 0 and each of the others, from before JAX starts until the end.

First a roll call: every process says where it is and what it sees, so that one that is missing or unlike the others
is named at once. Then a thread watches the connections: the kernel closes them when a process ends in whatever way,
and one that is stopped, or whose host is, no longer sends its heartbeats. So the others can say which one it was and
stop, where JAX would let them wait or end without a word.
Imports no jax.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from elm_jax import stopping
from elm_jax.errors import Absent, UserError
from elm_jax.json_text import parse_json
from elm_jax.runtime.launchers import Place

JOIN_TIMEOUT = "ELM_JAX_JOIN_TIMEOUT"  # seconds in which all processes must have come
JOIN_SECONDS = 300.0
PEER_TIMEOUT = "ELM_JAX_PEER_TIMEOUT"  # seconds of silence after which a process counts as gone
PEER_SECONDS = 60.0
BEATS = 10  # in these seconds
GRACE_SECONDS = 10.0  # in which process 0 may end by itself when it hears that another has failed; others: a quarter
LOST, FAILED = Absent.status, 1  # exit status: another process is gone (try again); one has failed (as Python's own)

Facts = dict[str, Any]
Judge = Callable[[list[Facts]], UserError | None]


class Lifeline:
    """The connections of one process: to process 0 or, in process 0, to all others. See `join`."""

    def __init__(self, place: Place, peers: Mapping[int, _Line], hosts: list[str]) -> None:
        self.place, self.hosts = place, hosts
        self._peers = dict(peers)
        self._finished: set[int] = set()
        self._leaving = threading.Event()
        self._timeout = _seconds(PEER_TIMEOUT, PEER_SECONDS)
        self.agreement = stopping.Agreement(place.index, place.count, self._tell)
        stopping.peers = self
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None = None) -> None:
        """Say that this process ends, in order or by `error`; after an error it ends soon, whatever waits for others;
        where a signal has stopped it, now.

        Where the error may come of another process being gone, this one first waits for word of it.
        """
        if isinstance(error, stopping.Stopped | stopping.Interrupted):
            stopping.end_now(error.text, error.status)  # JAX would wait for the others
        if isinstance(error, SystemExit):
            error = None
        if error is not None and not isinstance(error, UserError):
            time.sleep(GRACE_SECONDS / 4)  # the watching thread ends the process if another one is gone
        self._leaving.set()
        stopping.peers = None
        if error is None:
            self._tell({"left": self.place.index})
            return
        status = error.status if isinstance(error, UserError) else FAILED
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:300]}"
        self._tell({"failed": self.place.index, "text": text, "status": status})
        _end_in(GRACE_SECONDS / 2, status)

    def end(self, text: str, status: int) -> None:
        """Say that this process ends now, and why, so that the others end as well, with the same status."""
        self._leaving.set()
        who = f"process {self.place.index} of {self.place.count}, on {self.hosts[self.place.index]}, ends"
        self._tell({"gone": self.place.index, "text": f"{who}, and so do the others: {text}", "status": status})

    def _tell(self, message: Mapping[str, Any], but: int = -1) -> None:
        for index, line in self._peers.items():
            if index != but:
                line.send(message)

    def _watch(self) -> None:
        for index, line in self._peers.items():
            for message in line.unheard:
                self._hear(index, message)
        beat, beaten, looked = self._timeout / BEATS, 0.0, time.monotonic()
        heard = dict.fromkeys(self._peers, looked)
        with selectors.DefaultSelector() as selector:
            for index, line in self._peers.items():
                selector.register(line.socket, selectors.EVENT_READ, index)
            while heard:
                ready, now = selector.select(beat), time.monotonic()
                if now - looked > self._timeout / 2:  # stopped itself: what was sent is still to be read
                    heard = dict.fromkeys(heard, now)
                looked = now
                if now - beaten >= beat:
                    beaten = now
                    for line in self._peers.values():
                        line.beat()
                for key, _ in ready:
                    heard[key.data] = now
                    messages, is_open = self._peers[key.data].receive()
                    for message in messages:
                        self._hear(key.data, message)
                    if not is_open:
                        selector.unregister(key.fileobj)
                        del heard[key.data]
                        self._lost(key.data, "is gone")
                for index, when in heard.items():
                    if now - when > self._timeout:
                        self._lost(index, f"has not been heard of for {now - when:.0f} s (stopped, or out of reach)")

    def _hear(self, sender: int, message: Mapping[str, Any]) -> None:
        if "left" in message:
            self._finished.add(sender)
        elif "gone" in message:
            if self.place.index == 0:
                self._tell(message, but=sender)
            self._stop(message["text"], message["status"])
        elif "failed" in message:
            self._finished.add(sender)
            if self.place.index == 0:
                self._tell(message, but=sender)
            if not self._leaving.is_set():
                self._leaving.set()  # the others end about now, too
                status, index = message["status"], message["failed"]
                who = "error:" if status != FAILED else f"process {index} on {self.hosts[index]} has failed:"
                # Process 0 is the last: without it JAX ends the others, in its own words.
                seconds = GRACE_SECONDS / 4 if self.place.index else GRACE_SECONDS
                _end_in(seconds, status, f"{who} {message['text']}")
        else:
            self.agreement.hear(sender, message)

    def _lost(self, index: int, how: str) -> None:
        if index in self._finished or self._leaving.is_set():
            return
        text = (
            f"process {index} of {self.place.count}, on {self.hosts[index]}, {how}: the others stop;"
            " the same command goes on from the last checkpoint"
        )
        self._tell({"gone": index, "text": text, "status": LOST}, but=index)
        self._stop(text, LOST)

    def _stop(self, text: str, status: int) -> None:
        if not self._leaving.is_set():
            stopping.end_now(text, status, tell=False)


def join(place: Place, facts: Facts, judge: Judge) -> Lifeline:
    """Wait for all processes, and let process 0 judge what they say of themselves.

    facts: JSON values of this process; `host` is added. judge: what is wrong with the facts of all, in order.

    Raises:
        UserError: in every process that came, the same one: another is missing (Absent), or what `judge` returned.
    """
    seconds = _seconds(JOIN_TIMEOUT, JOIN_SECONDS)
    own = {**facts, "host": socket.gethostname(), "index": place.index, "count": place.count}
    deadline = time.monotonic() + seconds
    if place.index == 0:
        return Lifeline(place, *_receive_all(place, own, judge, deadline, seconds))
    return Lifeline(place, *_report(place, own, deadline, seconds))


def _seconds(name: str, default: float) -> float:
    """What the environment says."""
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise UserError(name, repr(text), "a positive number of seconds", f"unset it for {default:g}")


def _port(place: Place) -> tuple[str, int]:
    host, _, port = place.address.rpartition(":")
    return host.strip("[]"), int(port) + 1


def _receive_all(
    place: Place, own: Facts, judge: Judge, deadline: float, seconds: float
) -> tuple[dict[int, _Line], list[str]]:
    lines: dict[int, _Line] = {}
    known = {0: own}
    problem: UserError | None = None
    with _listen(place) as server:
        while len(known) < place.count and problem is None:
            try:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                line = _Line(server.accept()[0])
            except TimeoutError:
                missing = [str(i) for i in range(place.count) if i not in known]
                problem = Absent(
                    place.names[1], f"{len(known)} of {place.count} processes within {seconds:g} s, without number "
                    f"{', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}", "all of them",
                    f"see what the missing ones printed, or raise {JOIN_TIMEOUT}",
                )  # fmt: skip
                break
            said = line.read(10.0)
            if said is None or not isinstance(said.get("index"), int):
                continue  # not one of us
            if said["index"] in known or said["index"] >= place.count or said["count"] != place.count:
                other = known.get(said["index"], own)
                problem = UserError(
                    place.names[2], f"{said['index']} of {said['count']} on {said['host']}, and {other['index']} of "
                    f"{other['count']} on {other['host']}", "each number from 0 once, and one count",
                    f"give every process its own {place.names[2]} and the same {place.names[1]}",
                )  # fmt: skip
                line.send(_wrong(problem))
            else:
                known[said["index"]], lines[said["index"]] = said, line
    processes = [known[i] for i in sorted(known)]
    problem = problem or judge(processes)
    hosts = [process["host"] for process in processes]
    for line in lines.values():
        line.send({"hosts": hosts} if problem is None else _wrong(problem))
    if problem is not None:
        raise problem
    return lines, hosts


def _wrong(problem: UserError) -> dict[str, Any]:
    return {"error": [problem.where, problem.found, problem.expected, problem.fix], "status": problem.status}


def _listen(place: Place) -> socket.socket:
    port = _port(place)[1]
    for number in (port - 1, port):  # the lower one is JAX's own, which would end the process without a word
        try:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            server = socket.create_server(
                ("", number), family=family, backlog=4096, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError as error:
            raise UserError(
                place.names[0], f"port {number} of {socket.gethostname()}: {error.strerror}",
                "a free port for process 0, and the one above it", "choose another port, or end what listens there",
            ) from error  # fmt: skip
        if number < port:
            server.close()
    return server


def _report(
    place: Place, own: Facts, deadline: float, seconds: float
) -> tuple[dict[int, _Line], list[str]]:
    where = _port(place)
    while True:
        try:
            line = _Line(socket.create_connection(where, timeout=max(0.1, min(10.0, deadline - time.monotonic()))))
            break
        except OSError as error:  # process 0 may start later, and its name may be known later
            if time.monotonic() > deadline:
                raise Absent(
                    place.names[0], f"no answer of process 0 at {where[0]}:{where[1]} within {seconds:g} s"
                    f" ({error.strerror or error})", "process 0 listening there",
                    f"see what process 0 printed, check the address, or raise {JOIN_TIMEOUT}",
                ) from None  # fmt: skip
        time.sleep(0.2)
    line.send(own)
    said = line.read(max(1.0, deadline - time.monotonic()) + 10.0)  # process 0 is the one to say who is missing
    if said is None:
        raise Absent(
            place.names[0], f"no answer of process 0 at {where[0]}:{where[1]}", "its roll call",
            "see what process 0 printed, and whether another program listens there",
        )  # fmt: skip
    if "error" in said:
        raise (Absent if said["status"] == LOST else UserError)(*said["error"])
    return {0: line}, said["hosts"]


class _Line:
    """JSON objects over a socket, one a line."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.unheard: list[dict[str, Any]] = []  # what came together with the object that `read` returned
        self._rest = b""
        self._sending = threading.Lock()
        connected.settimeout(None)

    def beat(self) -> None:
        """Send a sign of life: an empty line, which is no object."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(b"\n")

    def send(self, message: Mapping[str, Any]) -> None:
        """Send an object; one that is gone hears nothing."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The objects that have come, and whether more may; waits for the first bytes."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return [], False
        *whole, self._rest = (self._rest + data).split(b"\n")
        found: list[Any] = []
        for text in whole:
            with contextlib.suppress(ValueError):
                found.append(parse_json(text))
        return [message for message in found if isinstance(message, dict)], bool(data)

    def read(self, seconds: float) -> dict[str, Any] | None:
        """The first object; None where none comes."""
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                self.socket.settimeout(max(0.01, deadline - time.monotonic()))
                messages, is_open = self.receive()
                self.unheard += messages[1:]
                if messages or not is_open:
                    return messages[0] if messages else None
            return None
        finally:
            self.socket.settimeout(None)


def _end_in(seconds: float, status: int, text: str = "") -> None:
    timer = threading.Timer(seconds, stopping.end_now, (text, status, False))
    timer.daemon = True
    timer.start()
