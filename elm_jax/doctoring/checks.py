"""What the doctor looks at without starting JAX: versions, the compiled part, the machine, folders, network, settings.

A check is a function without arguments that returns a Finding; each statement in it was tested just then. This
module needs nothing but Python to be imported, so that it can say what else is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from elm_jax.errors import UserError

OK, NOTE, FAIL = "ok", "note", "FAIL"
PROJECT = "elm-jax"
ROOT = Path(__file__).resolve().parents[2]  # with pyproject.toml in it, this is a source tree
NAMED = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "datasets")
LEAST_FREE, LITTLE_FREE = 1.0, 20.0  # GB on a disk
LEAST_MEMORY, LITTLE_MEMORY = 1.0, 4.0  # GB; the demo takes about one
PCI, MEMORY = Path("/sys/bus/pci/devices"), Path("/proc/meminfo")


@dataclass(frozen=True)
class Finding:
    """What one check found. status: OK, NOTE (worth knowing) or FAIL; mend: what to do about it."""

    status: str
    text: str
    mend: str = ""
    check: str = ""  # its name in the table of checks

    def __str__(self) -> str:
        return f"{self.status:<6}{self.text}" + (f"\n      mend: {self.mend}" if self.mend else "")


Checks = Mapping[str, Callable[[], Finding]]


def examine(checks: Checks) -> Iterator[Finding]:
    """The findings of `checks`, one after the other; a check that breaks is a finding too."""
    for name, check in checks.items():
        try:
            finding = check()
        except UserError as error:
            finding = Finding(FAIL, f"{error.where}: {error.found} instead of {error.expected}", error.fix)
        except Exception as error:  # whatever is broken here is what the user wants to know
            text = f"{name} cannot be checked: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            finding = Finding(FAIL, text, install() if isinstance(error, ImportError) else "")
        yield replace(finding, check=name)


def install(extra: str = "") -> str:
    """The command that installs this package again, with an extra. (No index has the package.)"""
    named = f"[{extra}]" if extra else ""
    if (ROOT / "pyproject.toml").is_file():
        return f'pip install -e "{ROOT}{named}"'
    return f'pip install --force-reinstall "$(ls elm_jax-*.whl){named}"  # the wheel that brought it'


# -- what is installed ---------------------------------------------------------------------------------------


def packages(extra: str = "", gives: str = PROJECT) -> Finding:
    """Versions of Python and the required packages, or of those of an extra, against the ranges asked for.

    `gives`: what these are for. That an extra is not there is a note, a version that does not fit a failure.
    """
    found = list(_installed(extra))
    wrong = [one for one in found if one[0] != OK]
    if not wrong:
        named = [said for _, said, _ in found if extra or said.split()[0] in NAMED]
        more = "" if extra else f" and {len(found) - len(named)} more packages, Python {platform.python_version()}"
        return Finding(OK, f"{', '.join(named)}{more}, for {gives}")
    absent = extra and all(status == NOTE for status, _, _ in wrong)
    mend = install(extra) if absent else f"pip install {' '.join(asked for _, _, asked in wrong)}"
    return Finding(NOTE if absent else FAIL, f"{'; '.join(said for _, said, _ in wrong)}, so no {gives}", mend)


def _installed(extra: str = "") -> Iterator[tuple[str, str, str]]:
    """(status, what is so, what pip is to be asked for) of each package that this one, or an extra of it, requires."""
    from packaging.requirements import Requirement

    for one in map(Requirement, metadata.requires(PROJECT) or ()):
        if one.marker.evaluate({"extra": extra}) if one.marker else not extra:
            asked = f'"{one.name}{one.specifier}"'
            try:
                version = metadata.version(one.name)
            except metadata.PackageNotFoundError:
                yield NOTE, f"{one.name} is not installed", asked
                continue
            fits = one.specifier.contains(version, prereleases=True)
            yield OK if fits else FAIL, f"{one.name} {version}" + ("" if fits else f" is not {one.specifier}"), asked


def tokenizer() -> Finding:
    """Whether the compiled ECG-Byte encoder is there. Raises ImportError where it is not."""
    importlib.import_module("elm_jax._bpe")
    return Finding(OK, "the Rust tokenizer, for symbolic ECGs, is built")


# -- the machine ---------------------------------------------------------------------------------------------


def machine() -> Finding:
    """Cores that this process may use and memory that is free (that of the machine where its system does not say)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = re.search(r"MemAvailable:\s*(\d+)", MEMORY.read_text()) if MEMORY.is_file() else None
    free = int(said[1]) * 1024 if said else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{cores} CPU cores, {free / 1e9:.1f} GB of memory free"
    if free < LITTLE_MEMORY * 1e9:
        status = FAIL if free < LEAST_MEMORY * 1e9 else NOTE
        return Finding(status, f"{text}, which is little", "ps aux --sort=-rss | head  # what takes it")
    return Finding(OK, text)


def nvidia() -> Finding:
    """NVIDIA GPUs and their driver; whether JAX uses them is tried elsewhere."""
    cards = [
        vendor for vendor in PCI.glob("*/vendor")
        if vendor.read_text().startswith("0x10de") and vendor.with_name("class").read_text().startswith("0x03")
    ]  # fmt: skip
    status, said = smi()
    if status == 0:
        return Finding(OK, f"{len(said)} NVIDIA GPUs ({said[0]})")
    if cards:
        text = f"{len(cards)} NVIDIA GPUs without a working driver; nvidia-smi: {' '.join(said) or 'not there'}"
        mend = "sudo ubuntu-drivers install  # or your system's way to NVIDIA's driver, then reboot"
        return Finding(FAIL, text, mend)
    return Finding(OK, "no NVIDIA GPU in this machine")


def smi() -> tuple[int, list[str]]:
    """The status of nvidia-smi and what it says: name, driver and free memory of a GPU a line. 127: it is not there."""
    if shutil.which("nvidia-smi") is None:
        return 127, []
    asked = ("nvidia-smi", "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader")
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


def folder(name: str, path: Callable[[], Path], mend: str) -> Finding:
    """Whether a folder (or the one it will be made in) can be written, and how much room its disk has."""
    where = path().expanduser().absolute()
    there = next(place for place in (where, *where.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**20))
    except OSError as error:
        return Finding(FAIL, f"the {name}, {where}, cannot be written: {error.strerror} in {there}", mend)
    free = shutil.disk_usage(there).free / 1e9
    text = f"the {name}, {where}, can be written; {free:.1f} GB free"
    if free < LITTLE_FREE:
        return Finding(FAIL if free < LEAST_FREE else NOTE, f"{text}, which is little", mend)
    return Finding(OK, text)


# -- network and environment ---------------------------------------------------------------------------------


def hugging_face() -> Finding:
    """Whether models can be downloaded, or which are there where HF_HUB_OFFLINE is set."""
    from urllib import error, request

    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    have = f"{len(list(folder.glob('models--*/snapshots')))} models in {folder}"
    if constants.HF_HUB_OFFLINE:
        mend = "unset HF_HUB_OFFLINE  # or set llm.name to a local folder" if have[:2] == "0 " else ""
        return Finding(NOTE if mend else OK, f"HF_HUB_OFFLINE is set: nothing is downloaded; {have}", mend)
    try:
        request.urlopen(request.Request(constants.ENDPOINT, method="HEAD"), timeout=3).close()
    except (OSError, ValueError) as refused:
        if not isinstance(refused, error.HTTPError):  # which is an answer, though not a page
            mend = "export HF_HUB_OFFLINE=1  # and set llm.name to a local folder, or one of the cache"
            return Finding(NOTE, f"{constants.ENDPOINT} does not answer ({refused}); {have}", mend)
    return Finding(OK, f"{constants.ENDPOINT} answers; {have}")


def processes(environment: Mapping[str, str] = os.environ) -> Finding:
    """The variables that make several processes one program. Raises UserError where they do not fit together."""
    from elm_jax.runtime.launchers import ADDRESS, COUNT, INDEX, find

    place = find(environment)
    if place is None:
        values = " ".join(f"{name}={environment[name]}" for name in (ADDRESS, COUNT, INDEX) if name in environment)
        return Finding(OK, f"this process works alone: {values or f'{ADDRESS} is not set'}")
    host, _, port = place.address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        text = f"{place.address}: {host} has no address ({error.strerror or error})"
        return Finding(FAIL, text, f"export {ADDRESS}=...  # a host that `getent hosts` knows")
    text = f"process {place.index} of {place.count}, started by {place.launcher}; {host}, of process 0, has an address"
    return Finding(OK, text)


def settings(environment: Mapping[str, str] = os.environ) -> Finding:
    """XLA_FLAGS and JAX's switches; whether XLA takes the flags is tried elsewhere."""
    flags = environment.get("XLA_FLAGS", "").split()
    bad = [flag for flag in flags if not flag.startswith("--xla")]
    if bad and not (len(flags) == 1 and Path(flags[0]).is_file()):
        return Finding(FAIL, f"XLA_FLAGS holds {bad[0]!r}, which is no --xla_... flag", "unset XLA_FLAGS")
    if "--xla_force_host_platform_device_count" in " ".join(flags):
        return Finding(NOTE, f"XLA_FLAGS divides the CPU into devices, for tests: {' '.join(flags)}", "unset XLA_FLAGS")
    switches = ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_ENABLE_X64")  # change what is computed, or how fast
    on = [switch for switch in switches if environment.get(switch, "").lower() in ("1", "true")]
    if on:
        return Finding(NOTE, f"{', '.join(on)} set: slower, or other numbers", f"unset {' '.join(on)}")
    return Finding(OK, f"XLA_FLAGS is {' '.join(flags) or 'not set'}; none of {', '.join(switches)} is")


def _own_cache() -> Path:
    return importlib.import_module("elm_jax.runtime.compilation").cache_folder()


def _hub_cache() -> Path:
    return Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)


HOST_CHECKS: Checks = {
    "packages": packages,
    "tokenizer": tokenizer,
    "formats": partial(packages, "formats", "recordings in HDF5 and DICOM"),
    "torch": partial(packages, "torch", ".pt files"),
    "wandb": partial(packages, "wandb", "Weights & Biases"),
    "tensorboard": partial(packages, "tensorboard", "TensorBoard"),
    "machine": machine,
    "nvidia": nvidia,
    "run folder": partial(folder, "run folder", lambda: Path("runs"), "cd to one with room, or set config.workdir"),
    "cache folder": partial(folder, "cache folder", _own_cache, "export ELM_JAX_CACHE=...  # a folder with room"),
    "hub cache": partial(folder, "Hugging Face cache", _hub_cache, "export HF_HOME=...  # a folder with room"),
    "hugging_face": hugging_face,
    "processes": processes,
    "settings": settings,
}
