"""Who a process is, from the variables of each launcher; and what is wrong with them, by name."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from elm_jax.errors import UserError
from elm_jax.runtime import distributed, launchers
from elm_jax.runtime.launchers import Place, find, first_node, tasks_per_node

PLAIN = {"JAX_COORDINATOR_ADDRESS": "host-0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip
TORCH = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}
TORCHRUN = {**TORCH, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
WHERE = {"JAX_COORDINATOR_ADDRESS": "node-0:99"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "4"}
Patch = pytest.MonkeyPatch


def found(environment: dict[str, str]) -> Place:
    place = find(environment)
    assert place is not None
    return place


def test_alone() -> None:
    assert find({}) is None
    assert find({**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    assert find({**SLURM, "JAX_NUM_PROCESSES": "1"}) is None  # each task of a step a run of its own
    one_node = {**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find(one_node) is None
    assert launchers.expected_devices(one_node) == (8, "SLURM_GPUS_ON_NODE")


def test_a_task_that_is_a_run_of_its_own_sees_what_it_is_given() -> None:
    """A sweep: eight tasks of a node, each told to work alone on one of its GPUs."""
    task = {
        **SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_TASKS_PER_NODE": "8",
        "JAX_NUM_PROCESSES": "1", "CUDA_VISIBLE_DEVICES": "3",
    }  # fmt: skip
    assert find(task) is None and launchers.expected_devices(task) is None
    told = {**task, launchers.DEVICES: "1"}
    assert launchers.expected_devices(told) == (1, launchers.DEVICES)


def test_plain_variables() -> None:
    assert found(PLAIN) == Place("the environment", "host-0:1234", 4, 3)
    assert found({**PLAIN, "ELM_JAX_DEVICES_PER_PROCESS": "8"}).devices == (8, "ELM_JAX_DEVICES_PER_PROCESS")


def test_open_mpi() -> None:
    place = found(MPI)
    assert (place.launcher, place.count, place.index, place.on_node) == ("Open MPI", 8, 5, (1, 4))
    host, port = place.address.split(":")
    assert host == "10.96.0.1" and 61000 <= int(port) < 65000
    on_one_host = {**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert found(on_one_host).address == f"127.0.0.1:{port}"
    in_slurm = {**MPI, **SLURM, "SLURM_JOB_NODELIST": "gpu[003-004]"}  # as mpirun in a job of SLURM sets them
    assert found(in_slurm).launcher == "Open MPI" and found(in_slurm).address.startswith("gpu003:")
    given = {**MPI, "JAX_COORDINATOR_ADDRESS": "node-1:99"}
    assert found(given).address == "node-1:99" and found(given).index == 5


def test_slurm() -> None:
    place = found(SLURM)
    assert (place.launcher, place.count, place.index, place.on_node) == ("SLURM", 2, 1, (0, 1))
    assert place.devices == (8, "SLURM_GPUS_ON_NODE") and place.address.startswith("gpu007:")
    first = found({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert first.address == place.address
    assert found({**SLURM, "SLURM_STEP_ID": "1"}).address != place.address
    each_gpu = {**SLURM, "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}
    assert found(each_gpu).on_node == (3, 8) and found(each_gpu).devices == (1, "SLURM_GPUS_ON_NODE")
    assert found({**each_gpu, "JAX_PLATFORMS": "cpu"}).devices is None


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu7", "gpu7"), ("gpu7,gpu9", "gpu7"), ("gpu[007-015],login", "gpu007"), ("a[1,3-4]-ib,b", "a1-ib")],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


def test_kubernetes(monkeypatch: Patch) -> None:
    monkeypatch.setattr(launchers.socket, "getfqdn", lambda: "train-workers-0-2.train.default.svc.cluster.local")
    place = found(KUBERNETES)
    assert (place.launcher, place.count, place.index) == ("Kubernetes", 4, 2)
    assert place.address == "train-workers-0-0.train.default.svc.cluster.local:8476"
    assert found({**KUBERNETES, "JAX_COORDINATOR_ADDRESS": "train-workers-0-0.train:8476"}).index == 2


def test_pytorchs_variables() -> None:
    place = found(TORCH)
    assert (place.launcher, place.address, place.count, place.index) == ("PyTorch's variables", "node-0:29500", 4, 3)
    assert place.names == ("MASTER_ADDR", "WORLD_SIZE", "RANK") and place.on_node == (0, 1)
    assert found({**TORCH, **WHERE}).address == "node-0:99"


def test_torchrun_keeps_its_own_port() -> None:
    """Its agent listens at MASTER_PORT; every process works out the same other one."""
    place = found(TORCHRUN)
    host, port = place.address.split(":")
    assert (place.launcher, place.count, place.index, place.on_node) == ("torchrun", 4, 3, (1, 2))
    assert host == "node-0" and 61000 <= int(port) < 65000
    assert found({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).address == place.address
    assert found({**TORCHRUN, "MASTER_PORT": "29501"}).address != place.address
    in_slurm = found({**SLURM, **TORCHRUN, "LOCAL_WORLD_SIZE": "8"})  # srun started it, once a node
    assert (in_slurm.launcher, in_slurm.index) == ("torchrun", 3) and in_slurm.devices == (1, "SLURM_GPUS_ON_NODE")


@pytest.mark.parametrize("started, name", [(PMI, "PMI"), (MVAPICH, "MVAPICH")])
def test_other_mpis_are_understood_but_for_the_address(started: dict[str, str], name: str) -> None:
    place = found({**started, **WHERE})
    assert (place.launcher, place.address, place.count, place.index) == (name, "node-0:99", 4, 3)
    assert place.on_node == (1, 2)
    with pytest.raises(UserError, match=f"JAX_COORDINATOR_ADDRESS: .*which {name} does not say; .*-genv"):
        find(started)


def test_of_two_launchers_the_one_that_started_the_process_counts() -> None:
    """SLURM sets PMI's variables, too; PyTorch's may be left over, or be made of SLURM's."""
    assert found({**SLURM, "PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_RANK": "1"}).launcher == "SLURM"
    assert found({**SLURM, **PMI, **WHERE}).launcher == "PMI"  # mpiexec, which srun started once a node
    for left in ({"WORLD_SIZE": "9"}, {"MASTER_ADDR": "x", "MASTER_PORT": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}):
        place = found({**SLURM, **left})
        assert (place.launcher, place.count, place.index) == ("SLURM", 2, 1)
    assert found({**MPI, **TORCH}).launcher == "Open MPI"
    # In a shell that srun started, as one task, more may be started by hand.
    shell = {**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMIX_RANK": "0"}
    assert find(shell) is None
    assert found({**shell, **TORCH}).launcher == "PyTorch's variables"
    assert (found({**shell, **PLAIN}).launcher, found({**shell, **PLAIN}).index) == ("the environment", 3)


def test_what_is_left_over_in_a_shell_does_not_make_several_processes_of_one() -> None:
    assert find({"MASTER_ADDR": "node-0", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}) is None
    assert find({**TORCH, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert find({"PMI_RANK": "0", "PMI_SIZE": "1"}) is None
    for started in (TORCH, TORCHRUN, PMI, MVAPICH, {"PMIX_RANK": "1"}, {"RANK": "1"}, {"WORLD_SIZE": "2"}):
        assert find({**started, "JAX_NUM_PROCESSES": "1"}) is None


@pytest.mark.parametrize(
    "environment, named, told",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS", "host:port"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES", "'x'"),
        ({**PLAIN, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID", "below JAX_NUM_PROCESSES=4"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS", "host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID", "nothing"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JAX_NUM_PROCESSES", "Kubernetes"),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4"}, "SLURM_STEP_NODELIST", "srun"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, "SLURM_STEP_NUM_TASKS", "--ntasks-per-node"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, "SLURM_STEP_TASKS_PER_NODE", "divide its GPUs"),
        ({"WORLD_SIZE": "2"}, "RANK", "JAX_NUM_PROCESSES=1"),
        ({"RANK": "1"}, "WORLD_SIZE", "JAX_NUM_PROCESSES=1"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500"}, "MASTER_ADDR", "process 0"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node-0"}, "MASTER_PORT", "nothing"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT", "70000"),
        ({**TORCH, "WORLD_SIZE": "\N{SUPERSCRIPT TWO}"}, "WORLD_SIZE", "a whole number"),
        ({**TORCH, "RANK": "4"}, "RANK", "below WORLD_SIZE=4"),
        ({"PMI_RANK": "1"}, "PMI_SIZE", "nothing"),
        ({"PMIX_RANK": "1"}, "JAX_NUM_PROCESSES", "PMIx"),
        ({"PMIX_RANK": "1", "JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS", "which PMIx does not say"),
        ({**SLURM, "RANK": "3", "WORLD_SIZE": "16"}, "WORLD_SIZE", "16, beside SLURM_STEP_NUM_TASKS=2"),
        ({**SLURM, **TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, "WORLD_SIZE", "2 nodes"),
        ({**{k: v for k, v in MPI.items() if "uri" not in k}}, "JAX_COORDINATOR_ADDRESS", "mpirun -x"),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], named: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        find(environment)
    assert caught.value.where == named and told in str(caught.value)


def test_a_pod_without_a_name_in_the_cluster_is_told(monkeypatch: Patch) -> None:
    monkeypatch.setattr(launchers.socket, "getfqdn", lambda: "train-2")
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS.*headless service"):
        find(KUBERNETES)


# -- devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "on_node, devices, seen, share",
    [
        ((0, 1), (8, "x"), 8, None),  # one process a node has all
        ((3, 8), (1, "x"), 8, [3]),  # all see all: each takes its share
        ((1, 2), (4, "x"), 8, [4, 5, 6, 7]),
        ((3, 8), (1, "x"), 1, None),  # each sees its own (--gpus-per-task, --gpu-bind)
        ((1, 2), None, 4, [2, 3]),  # a launcher that does not count GPUs
        ((1, 4), None, 0, None),  # none at all
    ],
)
def test_the_gpus_of_a_node_are_shared_out(on_node, devices, seen: int, share: list[int] | None) -> None:
    place = Place("x", "h:1", 16, 0, on_node=on_node, devices=devices)
    assert distributed.device_share(place, seen) == share


def facts(index: int, **changes: object) -> distributed.Facts:
    alike = {"gpus": 8, "claims": [], "visible": None, "expected": [8, "SLURM_GPUS_ON_NODE"], "jax": "0.10.2"}
    return {"index": index, "host": f"node-{index}", **alike, **changes}


def test_processes_that_see_what_is_expected_pass() -> None:
    assert distributed.judge([facts(0), facts(1)]) is None
    assert distributed.judge([facts(i, expected=None, gpus=0) for i in range(3)]) is None


@pytest.mark.parametrize(
    "other, named, told",
    [
        ({"gpus": 1, "visible": "0"}, "SLURM_GPUS_ON_NODE", "1 GPUs (CUDA_VISIBLE_DEVICES=0) in process 1 on node-1"),
        ({"gpus": 4, "expected": None}, "CUDA_VISIBLE_DEVICES", "4 GPUs in process 1 on node-1, 8 GPUs in process 0"),
        ({"jax": "0.11.2"}, "jax", "0.11.2 in process 1 on node-1"),
    ],
)
def test_one_that_sees_something_else_is_named(other: dict[str, object], named: str, told: str) -> None:
    problem = distributed.judge([facts(0), facts(1, **other)])
    assert problem is not None and problem.where == named and told in str(problem)


@pytest.fixture
def dev(monkeypatch: Patch, tmp_path: Path) -> Path:
    """The devices' folder of a host of eight GPUs, where JAX knows them."""
    monkeypatch.setattr(distributed.metadata, "entry_points", lambda group: [SimpleNamespace(name="xla_cuda12")])
    for i in range(8):
        (tmp_path / f"nvidia{i}").touch()
    return tmp_path


def judged(claims: list[list[str]]) -> UserError | None:
    """Of the processes of one host."""
    alike: dict[str, object] = {"host": "node-0", "gpus": len(claims[0]), "expected": None}
    return distributed.judge([facts(i, claims=claimed, **alike) for i, claimed in enumerate(claims)])


def test_two_processes_by_hand_that_take_the_same_gpus_are_named(dev: Path) -> None:
    problem = judged([distributed.claims({}, None, dev)] * 2)
    assert problem is not None and problem.where == "CUDA_VISIBLE_DEVICES"
    assert "8 GPUs in process 1 on node-0, of which process 0 on node-0 takes some too" in str(problem)
    assert "set CUDA_VISIBLE_DEVICES for each process" in problem.fix
    overlapping = [distributed.claims({"CUDA_VISIBLE_DEVICES": visible}, None, dev) for visible in ("0,1", "1, 2")]
    assert judged(overlapping) is not None


def test_processes_of_a_host_with_gpus_of_their_own_pass(dev: Path, monkeypatch: Patch) -> None:
    by_hand = [{"CUDA_VISIBLE_DEVICES": visible} for visible in ("0,1,2,3", "4,5,6,7")]
    assert judged([distributed.claims(environment, None, dev) for environment in by_hand]) is None
    assert judged([distributed.claims({}, own, dev) for own in ([0, 1, 2, 3], [4, 5, 6, 7])]) is None  # shared out
    assert judged([distributed.claims({"JAX_PLATFORMS": "cpu"}, None, dev)] * 2) is None
    # SLURM and containers may keep the other GPUs from a process, which counts its own from 0.
    bound = []
    for mine in ("nvidia2", "nvidia5"):
        monkeypatch.setattr(os, "access", lambda path, mode, mine=mine: path.name == mine)
        bound.append(distributed.claims({"CUDA_VISIBLE_DEVICES": "0"}, None, dev))
    assert judged(bound) is None


def test_containers_of_one_machine_that_take_the_same_gpus_are_named(dev: Path, monkeypatch: Patch) -> None:
    """Each has a host name of its own; and machines may have the same one."""
    claimed = []
    for name in ("one", "other"):
        monkeypatch.setattr(distributed, "BOOT", dev / name)
        (dev / name).write_text(f"{name}\n")
        claimed.append(distributed.claims({}, None, dev))
    assert judged(claimed) is None
    same = [facts(i, claims=claimed[0], expected=None) for i in range(2)]
    assert same[0]["host"] != same[1]["host"] and distributed.judge(same) is not None


def test_gpus_are_counted_without_starting_jax(monkeypatch: Patch, tmp_path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert distributed.gpus({}, tmp_path) == 0  # no plugin for CUDA
    entry = type("Entry", (), {"name": "xla_cuda12"})
    monkeypatch.setattr(distributed.metadata, "entry_points", lambda group: [entry])
    assert distributed.gpus({}, tmp_path) == 2
    assert distributed.gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert distributed.gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert distributed.gpus({"JAX_PLATFORMS": "cpu"}, tmp_path) == 0
    assert distributed.gpus({"JAX_PLATFORMS": "cuda,cpu"}, tmp_path) == 2


def test_a_launcher_that_counts_gpus_is_not_content_with_a_cpu(monkeypatch: Patch) -> None:
    import jax

    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE: found 8 of platform cpu in process 0; expected 8 GPUs"):
        distributed._check_devices((len(jax.local_devices()), "SLURM_GPUS_ON_NODE"), 0)
    distributed._check_devices((8, launchers.DEVICES), 0)
    with pytest.raises(UserError, match=f"{launchers.DEVICES}: found 8 .*expected 4 devices"):
        distributed._check_devices((4, launchers.DEVICES), 0)
