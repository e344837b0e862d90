"""Who this process is among several, read from what started it: plain variables, torchrun, MPI, SLURM or Kubernetes.

Reads environment variables only, and imports no jax: what it says can be tested anywhere.
"""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from elm_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DEVICES = "ELM_JAX_DEVICES_PER_PROCESS"  # how many each process must see; no launcher but SLURM says so itself
PORT = 8476  # of the coordinator where only its host is known
FIRST_PORT, PORTS = 61000, 4000  # above Linux's ephemeral ports; a job takes two of them
ALONE = f"or set {COUNT}=1 for a run of this process alone"


@dataclass(frozen=True)
class Place:
    """This process among `count`, numbered from 0.

    address: host:port of process 0; the port above it must be free there too. names: the variables that gave
    address, count and index. on_node: this process's number among those of its node, and how many these are.
    devices: how many this process must see, and the variable that says so.
    """

    launcher: str
    address: str
    count: int
    index: int
    names: tuple[str, str, str] = (ADDRESS, COUNT, INDEX)
    on_node: tuple[int, int] = (0, 1)
    devices: tuple[int, str] | None = None


@dataclass(frozen=True)
class _Launcher:
    """What a launcher sets. `present`: any of these gives it away; on_node: the variables of `Place.on_node`."""

    name: str
    present: tuple[str, ...]
    count: str
    index: str
    on_node: tuple[str, str] | None = None


ELASTIC = _Launcher(
    "torchrun", ("TORCHELASTIC_RUN_ID",), "WORLD_SIZE", "RANK", ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
)
MPI = _Launcher(
    "Open MPI", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)  # fmt: skip
MVAPICH = _Launcher(
    "MVAPICH", ("MV2_COMM_WORLD_RANK",), "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK",
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)  # fmt: skip
PMI = _Launcher("PMI", ("PMI_RANK",), "PMI_SIZE", "PMI_RANK", ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"))
SLURM = _Launcher("SLURM", ("SLURM_STEP_NODELIST",), "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
TORCH = _Launcher(
    "PyTorch's variables", ("WORLD_SIZE", "RANK"), "WORLD_SIZE", "RANK", ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
)
KUBERNETES = _Launcher("Kubernetes", ("JOB_COMPLETION_INDEX",), COUNT, "JOB_COMPLETION_INDEX")
PLAIN = _Launcher("the environment", (ADDRESS,), COUNT, INDEX)
PMIX = _Launcher("PMIx", ("PMIX_RANK",), COUNT, "PMIX_RANK")
# torchrun and mpirun inside a SLURM job are started by srun, once a node: there SLURM's own variables mean something
# else. Those of PyTorch may be left over from a shell or a script, so that SLURM goes before them.
LAUNCHERS = (ELASTIC, MPI, MVAPICH, PMI, SLURM, TORCH, KUBERNETES, PLAIN, PMIX)


def find(environment: Mapping[str, str]) -> Place | None:
    """The place of this process; None where it works alone.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID go before what a launcher says, each
    on its own; JAX_NUM_PROCESSES=1 alone makes any process work alone.

    Raises:
        UserError: a variable is missing or wrong; names it.
    """
    if _alone(environment):
        return None
    launcher = _launcher(environment)
    told = environment.get("SLURM_JOB_NUM_NODES", "")
    nodes = int(told) if told.isdigit() else 1  # of SLURM's job, all of which must have a process
    if launcher is None:
        if nodes > 1:
            raise UserError(
                SLURM.present[0], f"nothing, in a job of {nodes} nodes", "a process on each node, started by srun",
                f"write srun before python, {ALONE}",
            )  # fmt: skip
        for name in (COUNT, INDEX):
            if name in environment:
                raise UserError(ADDRESS, "nothing", f"host:port of process 0, beside {name}", f"set it, {ALONE}")
        return None
    count_name = COUNT if COUNT in environment else launcher.count
    index_name = INDEX if INDEX in environment else launcher.index
    if launcher is SLURM and count_name == SLURM.count:
        _check_one_count(environment)
    count, index = (_number(environment, name, launcher) for name in (count_name, index_name))
    if count == 1 and nodes > 1:
        by_slurm = count_name == SLURM.count
        more = "set --ntasks-per-node (1, or the number of GPUs of a node)" if by_slurm else "start more"
        raise UserError(
            count_name, f"1 process in a job of {nodes} nodes", "at least one process a node", f"{more}, {ALONE}"
        )
    if count == 1:
        return None
    if index >= count:
        raise UserError(
            index_name, str(index), f"a number below {count_name}={count}", f"number the processes from 0, {ALONE}"
        )
    given = ADDRESS in environment
    address = environment[ADDRESS] if given else _address(launcher, environment, index)
    on_node = _on_node(launcher, environment)
    said_by = ADDRESS if given else "MASTER_ADDR" if launcher in (ELASTIC, TORCH) else launcher.present[0]
    return Place(
        launcher.name, _checked_address(address), count, index, (said_by, count_name, index_name),
        on_node, expected_devices(environment, on_node),
    )  # fmt: skip


def _launcher(environment: Mapping[str, str]) -> _Launcher | None:
    """The one that started this process. One that has started one process only says nothing of others."""
    there = [known for known in LAUNCHERS if any(name in environment for name in known.present)]
    if SLURM in there and environment.get(PMI.count) == environment.get(SLURM.count):
        there = [known for known in there if known is not PMI]  # srun sets these, too
    if len(there) > 1:
        there = [known for known in there if known is not PMIX]  # it does not say how many there are
    several = [known for known in there if environment.get(known.count) != "1"]
    return next(iter(several or there), None)


def expected_devices(environment: Mapping[str, str], on_node: tuple[int, int] = (0, 1)) -> tuple[int, str] | None:
    """How many devices a process must see, and the variable that says so; None where nothing says it.

    Raises:
        UserError: a node's GPUs cannot be divided among its processes.
    """
    if DEVICES in environment:
        return _number(environment, DEVICES, PLAIN), DEVICES
    name = "SLURM_GPUS_ON_NODE"
    gpus = environment.get(name, "")
    if SLURM.present[0] not in environment or not gpus.isdigit() or gpus == "0":
        return None
    if _alone(environment):
        return None  # the tasks of a sweep share out their node's GPUs as they like
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return None  # the user wants no GPU
    if int(gpus) % on_node[1]:
        raise UserError(
            "SLURM_STEP_TASKS_PER_NODE", f"{on_node[1]} processes on a node with {name}={gpus}",
            "one process a node, or as many as divide its GPUs", "set --ntasks-per-node",
        )  # fmt: skip
    return int(gpus) // on_node[1], name


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether the user wants this process to work alone, whatever started it."""
    return environment.get(COUNT) == "1" and environment.get(INDEX, "0") == "0"


def _number(environment: Mapping[str, str], name: str, launcher: _Launcher) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise UserError(
            name, repr(value) if value else "nothing", f"a whole number, started by {launcher.name}",
            f"set it in every process, {ALONE}",
        )  # fmt: skip
    return int(value)


def _checked_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16 - 1:
        raise UserError(ADDRESS, repr(address), "host:port of process 0", f"set it to something like host-0:{PORT}")
    return address


def _check_one_count(environment: Mapping[str, str]) -> None:
    """Tasks of SLURM that start processes of their own, each with PyTorch's variables, are not those processes."""
    ours, theirs = environment.get(SLURM.count), environment.get(TORCH.count)
    if TORCH.index in environment and theirs not in (None, ours):
        raise UserError(
            TORCH.count, f"{theirs}, beside {SLURM.count}={ours}", "one number of processes",
            f"start every process with srun and unset {TORCH.count} and {TORCH.index}, or use torchrun, {ALONE}",
        )  # fmt: skip


def _on_node(launcher: _Launcher, environment: Mapping[str, str]) -> tuple[int, int]:
    if launcher.on_node is not None:
        local, size = (environment.get(name, "") for name in launcher.on_node)
        return (int(local), int(size)) if local.isdigit() and size.isdigit() else (0, 1)
    if launcher is not SLURM:
        return 0, 1
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node, local = (environment.get(f"SLURM_{what}", "0") for what in ("NODEID", "LOCALID"))
    if not (node.isdigit() and local.isdigit() and int(node) < len(per_node)):
        return 0, 1
    return int(local), per_node[int(node)]


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]: how SLURM writes the number of tasks of each node."""
    found = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return found


def first_node(nodes: str) -> str:
    """The first of a SLURM node list such as `gpu[001-004,007],login` -> `gpu001`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(SLURM.present[0], repr(nodes), "a list of nodes", f"set {ADDRESS} to host:port of process 0")
    return "".join(part or "" for part in match.groups())


def _address(launcher: _Launcher, environment: Mapping[str, str], index: int) -> str:
    """host:port of process 0, as all processes of the job work it out for themselves."""
    if launcher is SLURM:
        name = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
        return f"{first_node(environment[SLURM.present[0]])}:{_port(name)}"
    if launcher is MPI:
        return _mpi_address(environment)
    if launcher is KUBERNETES:
        return f"{_first_pod(index)}:{PORT}"
    if launcher in (ELASTIC, TORCH):
        return _torch_address(launcher, environment)
    raise UserError(
        ADDRESS, "nothing", f"host:port of process 0, which {launcher.name} does not say",
        f"give it to every process, as mpiexec -genv {ADDRESS} HOST:{PORT} does, {ALONE}",
    )  # fmt: skip


def _torch_address(launcher: _Launcher, environment: Mapping[str, str]) -> str:
    host, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT", launcher)
    if not host:
        raise UserError(
            "MASTER_ADDR", "nothing", f"the host of process 0, beside {launcher.count}",
            f"set it in every process, {ALONE}",
        )  # fmt: skip
    if not 0 < port < 2**16 - 1:
        raise UserError(
            "MASTER_PORT", str(port), f"a port from 1 to {2**16 - 2}, free on the host of process 0, as is the next",
            f"set it in every process, {ALONE}",
        )  # fmt: skip
    if launcher is ELASTIC:  # torchrun itself listens at this port
        port = _port(f"{port} {environment[ELASTIC.present[0]]}")
    return f"{host}:{port}"


def _mpi_address(environment: Mapping[str, str]) -> str:
    port = _port(environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_orte_hnp_uri", "").split(".")[0])
    local, size = (environment.get(f"OMPI_COMM_WORLD_{what}") for what in ("LOCAL_SIZE", "SIZE"))
    if local == size:
        return f"127.0.0.1:{port}"
    if "SLURM_JOB_NODELIST" in environment:
        return f"{first_node(environment['SLURM_JOB_NODELIST'])}:{port}"
    # Where mpirun runs: Open MPI puts process 0 there, unless that is a login node.
    launched_from = re.search(r"tcp://([^,:;]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if launched_from is None:
        raise UserError(
            ADDRESS, "nothing", "host:port of process 0: this Open MPI does not say where it runs",
            f"start with mpirun -x {ADDRESS}=HOST:{PORT}",
        )  # fmt: skip
    return f"{launched_from[1]}:{port}"


def _first_pod(index: int) -> str:
    """The name in the cluster of the Job's pod 0: pods of an Indexed Job are NAME-INDEX.SUBDOMAIN."""
    name, _, domain = socket.getfqdn().partition(".")
    if not name.endswith(f"-{index}") or not domain:
        raise UserError(
            ADDRESS, f"nothing, in a pod called {name!r}", "host:port of process 0",
            "give the Job's pods a subdomain and a headless service (a JobSet does), or set it",
        )  # fmt: skip
    return f"{name.removesuffix(str(index))}0.{domain}"


def _port(job: str) -> int:
    return FIRST_PORT + 2 * (zlib.crc32(job.encode()) % (PORTS // 2))
