"""What the doctor looks at without starting JAX: versions, parts of the package, folders, network, environment.

A check is a function without arguments that returns a Finding; each statement in it was tested just then. This
module needs nothing but Python to be imported, so that it can say what else is missing.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OK, NOTE, FAIL = "ok", "note", "FAIL"
PROJECT = "elm-jax"
ROOT = Path(__file__).resolve().parents[2]  # with pyproject.toml in it, this is a source tree
NAMED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "datasets")
LEAST_FREE, LITTLE_FREE = 1.0, 20.0  # GB on a disk
LEAST_MEMORY, LITTLE_MEMORY = 1.0, 4.0  # GB; the demo takes about one
LEAST_DRIVER = 525  # of NVIDIA, for CUDA 12
CONNECT_SECONDS = 3.0
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits")
PCI, NVIDIA_PROC = Path("/sys/bus/pci/devices"), Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
MEMORY_LIMITS = (  # a container's limit, what it uses, and which of that it can give back; version 2, version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
SWITCHES = ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_ENABLE_X64")  # change what is computed, or how fast


@dataclass(frozen=True)
class Finding:
    """What one check found. status: OK, NOTE (worth knowing) or FAIL; mend: a command, where there is one."""

    check: str
    status: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.status:<6}{self.text}" + (f"\n      mend: {self.mend}" if self.mend else "")


def examine(checks: Iterable[Callable[[], Finding]] | None = None) -> Iterator[Finding]:
    """The findings of HOST_CHECKS, one after the other; a check that breaks is a finding too."""
    for check in HOST_CHECKS if checks is None else checks:
        try:
            yield check()
        except Exception as error:  # whatever is broken here is what the user wants to know
            name = check.args[0] if isinstance(check, partial) else check.__name__
            mend = install() if isinstance(error, ImportError) else ""
            yield Finding(name, FAIL, f"{name} cannot be checked: {type(error).__name__}: {error}", mend)


def install(extra: str = "") -> str:
    """The command that installs this package again, or what one of its extras brings. (No index has the package.)"""
    if (ROOT / "pyproject.toml").is_file():
        return f'pip install -e "{ROOT}[{extra}]"' if extra else f'pip install -e "{ROOT}"'
    if not extra:
        return f"pip install --force-reinstall {PROJECT.replace('-', '_')}-*.whl  # the wheel that brought it"
    brought = [line.partition(";")[0].strip() for line in requirements() if re.search(f"extra == .{extra}.$", line)]
    return " ".join(["pip install", *(f'"{one}"' for one in brought)])


# -- what is installed ---------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """What the package requires; that of an extra as `torch>=2.6; extra == "torch"`."""
    if not (ROOT / "pyproject.toml").is_file():
        return metadata.requires(PROJECT) or []
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    return project["dependencies"] + [f'{line}; extra == "{e}"' for e, lines in extras.items() for line in lines]


def python_asked() -> str:
    """The versions of Python that the package is for."""
    if not (ROOT / "pyproject.toml").is_file():
        return metadata.metadata(PROJECT)["Requires-Python"]
    # Not read with tomllib, which the versions that this is to find do not have.
    found = re.search(r'^requires-python\s*=\s*"(.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert found is not None, "pyproject.toml states requires-python"
    return found[1]


def python() -> Finding:
    """Python's version against what the package asks for."""
    from packaging.specifiers import SpecifierSet

    asked = python_asked()
    version = ".".join(map(str, sys.version_info[:3]))
    if version not in SpecifierSet(asked):
        mend = f"python3.12 -m venv .venv && .venv/bin/{install()}"
        return Finding("python", FAIL, f"Python {version} is not {asked}, which {PROJECT} asks for", mend)
    return Finding("python", OK, f"Python {version} is {asked}")


def packages() -> Finding:
    """Versions of all required packages, and of what jax requires (jaxlib), against the ranges asked for."""
    wrong, seen = {}, {}
    for source in (requirements(), _required_by("jax")):
        for name, asked, version in _installed(source):
            seen[name] = version
            if version is None:
                wrong[f'"{name}{asked}"'] = f"{name} is missing"
            elif not asked.contains(version, prereleases=True):
                wrong[f'"{name}{asked}"'] = f"{name} {version} is not {asked}"
    if wrong:
        return Finding("packages", FAIL, "; ".join(wrong.values()), f"pip install {' '.join(wrong)}")
    named = ", ".join(f"{name} {seen[name]}" for name in NAMED if name in seen)
    return Finding("packages", OK, f"{named} and {len(set(seen) - set(NAMED))} more packages fit {PROJECT}")


def optional(extra: str, gives: str) -> Finding:
    """Whether the packages of an extra are there, in versions that fit; `gives` is what they are for."""
    there = []
    for name, asked, version in _installed(requirements(), extra):
        if version is None:
            return Finding(extra, NOTE, f"{name} is not installed, so no {gives}", install(extra))
        if not asked.contains(version, prereleases=True):
            text = f"{name} {version} is not {asked}, so no {gives}"
            return Finding(extra, FAIL, text, f'pip install "{name}{asked}"')
        there.append(f"{name} {version}")
    return Finding(extra, OK, f"{', '.join(there)} is installed, for {gives}")


def _required_by(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []  # a package that is missing requires nothing; that it is missing is said elsewhere


def _installed(lines: Iterable[str], extra: str = "") -> Iterator[tuple[str, SpecifierSet, str | None]]:
    """(name, versions asked for, installed version) of the requirements, or only of those of one extra."""
    from packaging.requirements import Requirement

    for line in lines:
        one = Requirement(line)
        always = one.marker is None or one.marker.evaluate({"extra": ""})
        if always if not extra else not always and one.marker and one.marker.evaluate({"extra": extra}):
            try:
                yield one.name, one.specifier, metadata.version(one.name)
            except metadata.PackageNotFoundError:
                yield one.name, one.specifier, None


def tokenizer() -> Finding:
    """The compiled ECG-Byte encoder, against longest match as one writes it down."""
    merges = [b"ab", b"abc", b"cab", b"bb", b"abcab"]
    symbols = b"abcabbabcabcabbcabb"
    try:
        from elm_jax._bpe import Encoder
    except ImportError as error:
        mend = install() if shutil.which("cargo") else f"curl https://sh.rustup.rs -sSf | sh && {install()}"
        return Finding("tokenizer", FAIL, f"the Rust tokenizer is not built ({error}): no symbolic ECGs", mend)
    found = memoryview(Encoder(merges, b"abc").encode(symbols, False)).cast("I").tolist()
    if found != longest_match(symbols, merges):
        text = f"the Rust tokenizer encodes wrongly: {found} for {longest_match(symbols, merges)}"
        return Finding("tokenizer", FAIL, text, install().replace("install", "install --force-reinstall --no-deps", 1))
    return Finding("tokenizer", OK, f"the Rust tokenizer encodes {len(symbols)} letters as longest match does")


def longest_match(symbols: bytes, merges: list[bytes]) -> list[int]:
    """The ids of `symbols`: at each place the longest entry that matches. Bytes are 0..255, merge i is 256+i."""
    ids, at = [], 0
    while at < len(symbols):
        fitting = [i for i, merge in enumerate(merges) if symbols.startswith(merge, at)]
        best = max(fitting, key=lambda i: len(merges[i]), default=None)
        ids.append(symbols[at] if best is None else 256 + best)
        at += 1 if best is None else len(merges[best])
    return ids


# -- the machine ---------------------------------------------------------------------------------------------


def machine() -> Finding:
    """Cores that this process may use and memory that is free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = free_memory()
    text = f"{cores} CPU cores, {free:.1f} GB of memory free"
    if free < LITTLE_MEMORY:
        status = FAIL if free < LEAST_MEMORY else NOTE
        return Finding("machine", status, f"{text}, which is little", "ps aux --sort=-rss | head  # what takes it")
    return Finding("machine", OK, text)


def free_memory() -> float:
    """GB that this process can still have, of the machine and of its container."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    info = Path("/proc/meminfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        amounts.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for most, now, stat, spare in MEMORY_LIMITS:
        limit = _read(CGROUP / most)
        if limit.isdigit():
            fields = dict(line.split() for line in _read(CGROUP / stat).splitlines())
            amounts.append(int(limit) - int(_read(CGROUP / now)) + int(fields.get(spare, 0)))
    return min(amounts) / 1e9


def nvidia() -> Finding:
    """NVIDIA GPUs, their driver and who else uses them; whether JAX uses them is tried elsewhere."""
    asked = smi()
    if asked is None or asked.returncode:
        cards = [d for d in PCI.glob("*") if _read(d / "vendor") == "0x10de" and _read(d / "class").startswith("0x03")]
        if asked is not None and NVIDIA_PROC.is_file():
            said = " ".join((asked.stdout + asked.stderr).split())
            return Finding("nvidia", FAIL, f"nvidia-smi fails: {said}", "sudo reboot  # loads the driver anew")
        if cards:
            mend = "sudo ubuntu-drivers install  # or your system's way to NVIDIA's driver, then reboot"
            return Finding("nvidia", FAIL, f"{len(cards)} NVIDIA GPUs without a working driver", mend)
        return Finding("nvidia", OK, "no NVIDIA GPU in this machine")
    rows = [[cell.strip() for cell in line.split(",")] for line in asked.stdout.splitlines() if line.strip()]
    driver = rows[0][3]
    text = f"{len(rows)} NVIDIA GPUs ({rows[0][0]}, driver {driver})"
    if int(driver.split(".")[0]) < LEAST_DRIVER:
        mend = f"install a driver from https://www.nvidia.com/drivers, {LEAST_DRIVER} or later"
        return Finding("nvidia", FAIL, f"{text}: CUDA 12 needs driver {LEAST_DRIVER}", mend)
    sizes = [(float(total), float(used)) for _, total, used, _ in rows if total.isdigit() and used.isdigit()]
    busy = [f"{used / total:.0%} of GPU {i}" for i, (total, used) in enumerate(sizes) if used > 0.1 * total]
    if busy:
        return Finding("nvidia", NOTE, f"{text}; others take memory: {', '.join(busy)}", "nvidia-smi  # who")
    return Finding("nvidia", OK, text)


def smi() -> subprocess.CompletedProcess[str] | None:
    """What nvidia-smi says of the GPUs; None where there is none."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return None
    return subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=60)


def folder(name: str, path: Callable[[], Path], mend: str) -> Finding:
    """Whether a folder (or the one it will be made in) can be written, and how much room its disk has."""
    where = path().expanduser().absolute()
    there = next(place for place in (where, *where.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**20))
    except OSError as error:
        return Finding(name, FAIL, f"the {name}, {where}, cannot be written: {error.strerror} in {there}", mend)
    free = shutil.disk_usage(there).free / 1e9
    text = f"the {name}, {where}, can be written; {free:.1f} GB free"
    if free < LITTLE_FREE:
        return Finding(name, FAIL if free < LEAST_FREE else NOTE, f"{text}, which is little", mend)
    return Finding(name, OK, text)


def _own_cache() -> Path:
    from elm_jax.runtime.compilation import cache_folder

    return cache_folder()


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


# -- network and environment ---------------------------------------------------------------------------------


def hugging_face() -> Finding:
    """Whether models can be downloaded, or which are there where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    cached = {path.parents[1] for path in _hub_cache().glob("models--*/snapshots/*")}
    have = f"{len(cached)} models in {_hub_cache()}"
    if constants.HF_HUB_OFFLINE:
        text = f"HF_HUB_OFFLINE is set: nothing is downloaded; {have}"
        mend = "" if cached else "unset HF_HUB_OFFLINE  # or set llm.name to a local folder"
        return Finding("hugging_face", OK if cached else NOTE, text, mend)
    error = unreachable(constants.ENDPOINT)
    if error:
        mend = "export HF_HUB_OFFLINE=1  # and set llm.name to a local folder, or one of the cache"
        return Finding("hugging_face", NOTE, f"{constants.ENDPOINT} does not answer ({error}); {have}", mend)
    return Finding("hugging_face", OK, f"{constants.ENDPOINT} answers; {have}")


def unreachable(url: str) -> str:
    """Why a server does not answer within a few seconds, or "" if it does."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return ""  # an answer, though not a page
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def processes(environment: Mapping[str, str] = os.environ) -> Finding:
    """The variables that make several processes one program."""
    from elm_jax.errors import UserError
    from elm_jax.runtime.launchers import ADDRESS, COUNT, INDEX, find

    name = "processes"
    try:
        place = find(environment)
    except UserError as error:
        fix = error.fix.replace(f"or set {COUNT}=1", f"or export {COUNT}=1")
        return Finding(name, FAIL, f"{error.where}: {error.found} instead of {error.expected}", fix)
    if place is None:
        values = [variable for variable in (ADDRESS, COUNT, INDEX) if variable in environment]
        why = f"{', '.join(values)} set so" if values else f"{ADDRESS} is not set"
        return Finding(name, OK, f"this process works alone: {why}")
    host, _, port = place.address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        text = f"{place.address}: {host} has no address ({error.strerror or error})"
        return Finding(name, FAIL, text, f"export {ADDRESS}=...  # a host that `getent hosts` knows")
    text = f"process {place.index} of {place.count}, started by {place.launcher}; {host}, of process 0, has an address"
    return Finding(name, OK, text)


def settings(environment: Mapping[str, str] = os.environ) -> Finding:
    """XLA_FLAGS and JAX's switches; whether XLA takes the flags is tried elsewhere."""
    flags = environment.get("XLA_FLAGS", "").split()
    bad = [flag for flag in flags if not flag.startswith("--xla")]
    if bad and not (len(flags) == 1 and Path(flags[0]).is_file()):
        return Finding("settings", FAIL, f"XLA_FLAGS holds {bad[0]!r}, which is no --xla_... flag", "unset XLA_FLAGS")
    fake = [flag for flag in flags if flag.startswith("--xla_force_host_platform_device_count")]
    if fake:
        text = f"XLA_FLAGS divides the CPU into several devices, for tests: {fake[-1]}"
        return Finding("settings", NOTE, text, "unset XLA_FLAGS")
    on = [switch for switch in SWITCHES if environment.get(switch, "").lower() in ("1", "true")]
    if on:
        return Finding("settings", NOTE, f"{', '.join(on)} set: slower, or other numbers", f"unset {' '.join(on)}")
    text = f"XLA_FLAGS is {' '.join(flags) or 'not set'}; none of {', '.join(SWITCHES)} is"
    return Finding("settings", OK, text)


HOST_CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    packages,
    tokenizer,
    partial(optional, "torch", ".pt files"),
    partial(optional, "wandb", "Weights & Biases"),
    partial(optional, "tensorboard", "TensorBoard"),
    machine,
    nvidia,
    partial(folder, "run folder", lambda: Path("runs"), "cd to a folder with room, or --config.workdir=..."),
    partial(folder, "cache folder", _own_cache, "export ELM_JAX_CACHE=...  # a folder with room"),
    partial(folder, "Hugging Face cache", _hub_cache, "export HF_HOME=...  # a folder with room"),
    hugging_face,
    processes,
    settings,
)
