"""Several processes as one program: they find each other, check that they see the same devices, and stop together."""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.errors import UserError
from elm_jax.runtime import launchers, lifeline
from elm_jax.runtime.launchers import Place
from elm_jax.runtime.lifeline import Facts, Lifeline

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOCAL_IDS = "JAX_LOCAL_DEVICE_IDS"  # JAX's own: which devices a process takes of those that it sees
BOOT = Path("/proc/sys/kernel/random/boot_id")  # one for all containers of a machine, whatever they are called


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """`start`, and at the end, or when an error passes, tell the other processes."""
    with start() or contextlib.nullcontext():
        yield


def start() -> Lifeline | None:
    """Join the processes that the environment describes (`launchers.find`). Call before any array is made.

    Returns the connection with them, which ends this process when another one is gone; None where it works alone.

    Raises:
        UserError: a variable is missing or wrong, a process does not come, or the devices seen are not those that
            the launcher says, or not the same everywhere.
    """
    environment = os.environ
    place = launchers.find(environment)
    if place is None:
        _check_devices(launchers.expected_devices(environment), 0)
        return None
    if LOCAL_IDS in environment:
        own = [int(i) for i in environment[LOCAL_IDS].split(",") if i.isdigit()]
    else:
        own = device_share(place, gpus(environment))
    claimed = claims(environment, own)
    facts = {
        "gpus": len(claimed), "claims": claimed, "visible": environment.get(VISIBLE),
        "expected": place.devices, "jax": metadata.version("jax"),
    }  # fmt: skip
    line = lifeline.join(place, facts, judge)
    try:
        _initialize(place, own)
        _check_devices(place.devices, place.index)
    except BaseException as error:
        line.leave(error)
        raise
    return line


def gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs JAX will see here; told without starting it."""
    asked = environment.get("JAX_PLATFORMS", "")
    plugins = {entry.name for entry in metadata.entry_points(group="jax_plugins")}
    if (asked and not {"cuda", "gpu"} & set(asked.split(","))) or not any("cuda" in name for name in plugins):
        return 0
    visible = environment.get(VISIBLE)
    if visible is not None:
        return 0 if visible.strip() in ("", "-1", "NoDevFiles") else len(visible.split(","))
    return len(_files(devices))


def _files(devices: Path) -> list[str]:
    """The GPUs' files that this process may open: a container or SLURM may keep others from it."""
    names = [path.name for path in devices.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK)]
    return sorted(name for name in names if name.removeprefix("nvidia").isdigit())


def device_share(place: Place, seen: int) -> list[int] | None:
    """Which of the `seen` GPUs this process takes: its share where all processes of the node see the same ones.

    None: all of them, as where each process sees its own only, works alone on its node, or there are none.
    """
    number, processes = place.on_node
    share = place.devices[0] if place.devices else seen // processes
    if processes == 1 or share == 0 or seen != share * processes:
        return None
    return list(range(number * share, (number + 1) * share))


def claims(environment: Mapping[str, str], own: list[int] | None, devices: Path = Path("/dev")) -> list[str]:
    """A name for each GPU that this process will take: its `own` of those that it sees, or all.

    Equal names are one GPU. Numbers count among the files that a process may open, so these belong to the name.
    """
    seen = gpus(environment, devices)
    visible = environment[VISIBLE].split(",") if VISIBLE in environment else [str(i) for i in range(seen)]
    among = ",".join(_files(devices))
    return [f"{_machine()} {among} {visible[i].strip()}" for i in (range(seen) if own is None else own) if i < seen]


def _machine() -> str:
    return BOOT.read_text().strip() if BOOT.exists() else socket.gethostname()


def judge(processes: list[Facts]) -> UserError | None:
    """What is wrong with processes that bring these facts: other devices than expected, other than the first's, or
    those of another process."""
    first, taken = processes[0], {}
    for one in processes:
        where = f"process {one['index']} on {one['host']}"
        sees = _sees(one)
        if one["jax"] != first["jax"]:
            return UserError(
                "jax", f"{one['jax']} in {where}, {first['jax']} in process 0 on {first['host']}",
                "one version everywhere", "install the same environment on every host",
            )  # fmt: skip
        count, name = one["expected"] or (one["gpus"], "")
        if name == "SLURM_GPUS_ON_NODE" and one["gpus"] != count:
            return _not_expected(name, f"{sees} in {where}", count)
        if one["gpus"] != first["gpus"]:
            return UserError(
                VISIBLE, f"{sees} in {where}, {_sees(first)} in process 0 on {first['host']}",
                "the same number in every process", "check how the launcher gives out GPUs, and python -m"
                " elm_jax.doctor there",
            )  # fmt: skip
        for gpu in one["claims"]:
            other = taken.setdefault(gpu, one)
            if other is not one:
                return UserError(
                    VISIBLE, f"{sees} in {where}, of which process {other['index']} on {other['host']} takes some too",
                    "each GPU in one process", f"set {VISIBLE} for each process to GPUs of its own, or start one"
                    " process a host",
                )  # fmt: skip
    return None


def _sees(facts: Facts) -> str:
    visible = f" ({VISIBLE}={facts['visible']})" if facts["visible"] is not None else ""
    return f"{facts['gpus']} GPUs{visible}"


def _not_expected(name: str, found: str, count: int) -> UserError:
    if name == launchers.DEVICES:
        fix = f"correct {name}, or what the process may see"
        return UserError(name, found, f"{count} devices in each process", fix)
    return UserError(
        name, found, f"{count} GPUs in each process", f"leave {VISIBLE} to SLURM, set --ntasks-per-node to 1 or to the"
        " GPUs of a node, and run python -m elm_jax.doctor there; or set JAX_PLATFORMS=cpu",
    )  # fmt: skip


def _initialize(place: Place, own: list[int] | None) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its service would catch SIGTERM, of which it tells nobody: see `stopping`.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own detection is off: under SLURM it would give each process one GPU, however many it has.
    jax.distributed.initialize(
        place.address, place.count, place.index, own, "deactivate", initialization_timeout=300
    )


def _check_devices(expected: tuple[int, str] | None, index: int) -> None:
    """Raise UserError unless JAX sees as many devices as expected: GPUs, where the launcher counts these."""
    if expected is None:
        return
    import jax

    devices, (count, name) = jax.local_devices(), expected
    platform = devices[0].platform
    if len(devices) != count or (name != launchers.DEVICES and platform == "cpu"):
        raise _not_expected(name, f"{len(devices)} of platform {platform} in process {index}", count)


def gather(value: Any) -> list[Any]:
    """The JSON values that the processes bring, in their order. All of them must call it together."""
    import jax
    from jax.experimental.multihost_utils import process_allgather

    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.asarray(len(own), np.int32)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def neighbours() -> int:
    """The processes of this run on this machine, with this one. All of them must call it together."""
    return gather(_machine()).count(_machine())


def broadcast(value: Any, source: int) -> Any:
    """The JSON value that the process number `source` brings; the others' is not looked at. All call it together."""
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    if jax.process_count() == 1:
        return value
    brings = jax.process_index() == source
    own = np.frombuffer(json.dumps(value if brings else None).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.asarray(len(own), np.int32), brings))
    return json.loads(np.asarray(broadcast_one_to_all(np.resize(own, size), brings)).tobytes())


def exchange(key: str, value: str) -> list[str]:
    """As `gather`, without the devices: for a thread beside the one that trains. No two calls have the same `key`.

    A value is a problem, or empty; who brings one waits for nobody.
    """
    import jax
    from jax._src import distributed

    if jax.process_count() == 1:
        return [value]
    client = distributed.global_state.client
    assert client is not None
    client.key_value_set(f"elm_jax/{key}/{jax.process_index()}", value)
    if value:
        return [value]
    # Whoever does not come is gone, and `lifeline` ends this process then, or is slow.
    return [client.blocking_key_value_get(f"elm_jax/{key}/{i}", 2**31 - 1) for i in range(jax.process_count())]


def writers(folder: Path, content: str) -> list[int]:
    """For each process the number of the one that writes to its `folder`: the first that sees the same folder and
    means to write the same `content`. All call it together.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".{uuid.uuid4().hex}"
    token.touch()
    try:
        tokens = gather([token.name, content])  # every process has left its own by now
        first = next(i for i, (name, of) in enumerate(tokens) if of == content and (folder / name).exists())
        return gather(first)  # all have looked by now
    finally:
        token.unlink()
