"""What is set for GPUs: only there, only what the libraries know, and nothing that the user has set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elm_jax.runtime import gpu_settings
from elm_jax.runtime.gpu_settings import gpu_flags

Patch = pytest.MonkeyPatch


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library that knows all flags of jaxlib 0.10 but one."""
    names = [name for name in gpu_flags("0.10.2") if name != "xla_gpu_enable_triton_gemm"]
    path = tmp_path / "lib.so"
    path.write_bytes(b"\x7fELF\0" + b"\0".join(name.encode() for name in names) + b"\0no_xla_gpu_enable_triton_gemm\0")
    return path


def test_the_table_holds_what_the_installed_jaxlib_knows() -> None:
    """For GPUs too: jaxlib on a CPU reads the same flags."""
    version = gpu_settings.metadata.version("jaxlib")
    assert gpu_flags(version)
    assert gpu_settings.choose({}, version, gpu_settings.libraries())[1] == []


def test_the_installed_jaxlib_starts_with_the_flags() -> None:
    flags, _ = gpu_settings.choose({}, gpu_settings.metadata.version("jaxlib"), gpu_settings.libraries())
    code = "import jax; print(jax.devices()[0].platform)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)},
    )  # fmt: skip
    assert done.stdout == "cpu\n", done.stderr


def test_a_flag_that_a_library_lacks_is_left_out_and_named(library: Path) -> None:
    flags, unknown = gpu_settings.choose({}, "0.10.2", [library])
    assert unknown == ["xla_gpu_enable_triton_gemm"]
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags and not any("triton" in flag for flag in flags)
    assert gpu_settings.choose({}, "0.10.2", [])[0] == []
    assert gpu_settings.choose({}, "0.4.1", [library]) == ([], [])


def test_nothing_is_set_without_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"JAX_PLATFORMS": "cpu"}
    gpu_settings.apply(environment)
    assert environment == {"JAX_PLATFORMS": "cpu"} and capsys.readouterr().err == ""


@pytest.mark.parametrize("fraction", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_what_the_user_has_set_stays(
    monkeypatch: Patch, library: Path, capsys: pytest.CaptureFixture[str], fraction: str
) -> None:
    monkeypatch.setattr(gpu_settings, "gpus", lambda _: 8)
    monkeypatch.setattr(gpu_settings, "libraries", lambda: [library])
    monkeypatch.setattr(gpu_settings, "is_any", lambda models: "H200" in models)
    monkeypatch.setattr(gpu_settings.metadata, "version", lambda _: "0.10.2")
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_foo=1"
    environment = {"XLA_FLAGS": own, fraction: "0.5"}
    gpu_settings.apply(environment)
    assert environment["XLA_FLAGS"].endswith(own) and environment["XLA_FLAGS"].count("latency_hiding") == 1
    assert [value for name, value in environment.items() if "MEM_FRACTION" in name] == ["0.5"]
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    told = capsys.readouterr().err
    assert "jaxlib 0.10.2" in told and environment["XLA_FLAGS"] in told
    assert "not known to it: xla_gpu_enable_triton_gemm" in told and "MEM_FRACTION" not in told


def test_the_environment_of_a_process_is_set(monkeypatch: Patch, library: Path) -> None:
    """That of a process, unlike a dict, takes nothing but text."""
    monkeypatch.setattr(gpu_settings, "gpus", lambda _: 1)
    monkeypatch.setattr(gpu_settings, "libraries", lambda: [library])
    monkeypatch.setattr(gpu_settings, "is_any", lambda _: True)
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in ("XLA_FLAGS", *names):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
    for name in names:
        monkeypatch.delenv(name)
    gpu_settings.apply()
    assert [os.environ.get(name) for name in names] == ["1", "0.9", None]


def test_only_process_0_tells(monkeypatch: Patch, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_settings, "gpus", lambda _: 8)
    monkeypatch.setattr(gpu_settings, "libraries", lambda: [library])
    environment = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    gpu_settings.apply(environment)
    assert "XLA_FLAGS" in environment and capsys.readouterr().err == ""
    assert environment["XLA_CLIENT_MEM_FRACTION"] == "0.9"


def test_the_model_of_a_gpu_is_what_the_driver_says(tmp_path: Path) -> None:
    (tmp_path / "0000:19:00.0").mkdir()
    (tmp_path / "0000:19:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   44\n")
    assert gpu_settings.is_any(gpu_settings.HOPPER, tmp_path)
    assert not gpu_settings.is_any(("B200", "A100"), tmp_path)
    assert not gpu_settings.is_any(gpu_settings.HOPPER, tmp_path / "none")
