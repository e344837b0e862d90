"""The scripts for clusters: SLURM's with stand-ins for its commands, Kubernetes' against what the program reads."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from elm_jax.runtime import launchers

ROOT = Path(__file__).resolve().parents[2]
SLURM, KUBERNETES = ROOT / "scripts" / "slurm", ROOT / "scripts" / "k8s"


def submitted(tmp_path: Path, status: int, restarts: str | None = None) -> tuple[int, list[str]]:
    """The status of the train script whose `srun` ends with `status`, and the commands that it ran."""
    log = tmp_path / "commands"
    for name, ending in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {log}\nexit {ending}\n')
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path),
        **({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", SLURM / "train.sbatch", "--config", "configs/demo.py", "--config.seed=1"], env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, log.read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137, 139, 143])
def test_a_job_goes_on_after_its_time_limit_and_after_a_lost_process(tmp_path: Path, status: int) -> None:
    found, commands = submitted(tmp_path, status)
    assert found == status
    arguments = "--config.log.progress=false --config configs/demo.py --config.seed=1"
    assert commands[0].endswith(f"python -m elm_jax.train {arguments}")
    assert commands[1:] == (["scontrol requeue 17"] if status in (75, 137, 139, 143) else [])


def test_a_job_does_not_go_on_for_ever(tmp_path: Path) -> None:
    assert submitted(tmp_path, 143, restarts="50") == (143, submitted(tmp_path, 0)[1][:1])


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sbatch")), ids=lambda p: p.name)
def test_scripts_are_bash_and_start_by_srun(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert re.search(r"^srun .*python -m elm_jax", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --ntasks-per-node=", text, re.MULTILINE)  # the line that is forgotten most


def documents() -> list[dict[str, Any]]:
    return [document for path in KUBERNETES.glob("*.yaml") for document in yaml.safe_load_all(path.read_text())]


def jobs() -> list[dict[str, Any]]:
    found = [document["spec"] for document in documents() if document["kind"] == "Job"]
    sets = [document["spec"]["replicatedJobs"][0] for document in documents() if document["kind"] == "JobSet"]
    assert all(one["replicas"] == 1 for one in sets)  # the number of a pod is that of its process
    return found + [one["template"]["spec"] for one in sets]


def test_pods_find_each_other() -> None:
    assert len(jobs()) == 2
    for job in jobs():
        assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
        (container,) = job["template"]["spec"]["containers"]
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        assert given[launchers.COUNT] == str(job["completions"])
        assert given[launchers.DEVICES] == str(container["resources"]["limits"]["nvidia.com/gpu"])
        assert [port["containerPort"] for port in container["ports"]] == [launchers.PORT, launchers.PORT + 1]
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
        assert job["template"]["spec"]["shareProcessNamespace"]  # process 1 would not hear SIGTERM before it trains
    services = {document["metadata"]["name"] for document in documents() if document["kind"] == "Service"}
    assert {job["template"]["spec"].get("subdomain") for job in jobs()} == {*services, None}


def test_arguments_are_keys_of_the_configuration() -> None:
    from elm_jax.cli import ConfigFlags

    for job in jobs():
        (container,) = job["template"]["spec"]["containers"]
        assert container["command"] == ["python", "-m", "elm_jax.train"]
        assert ConfigFlags.parse(container["args"]).load().mesh.fsdp == 8
