"""What a benchmark ran on: one line for its table."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str, device: str = "cpu") -> str:
    """Processor or GPU, cores, load, and the versions of Python and of these packages."""
    name = _gpu() if device == "gpu" else _processor()
    load = f", load {os.getloadavg()[0]:.0f}" if sys.platform != "win32" else ""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{name}, {os.cpu_count()} cores{load}; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
