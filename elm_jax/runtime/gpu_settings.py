"""What XLA, NCCL and CUDA are told before JAX starts on NVIDIA GPUs.

Only the train command applies it; `elm_jax.plan` compiles with the same flags. They let collectives run beside the
products of other layers, which is NVIDIA's advice for JAX. What the user has set stays: a flag in XLA_FLAGS, a variable
in the environment. A flag that the installed libraries do not have is left out, because XLA ends the process over it.
None of the settings changes what is computed.
"""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import mmap
import os
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path

from packaging.version import Version

from elm_jax.runtime import launchers
from elm_jax.runtime.distributed import gpus

HOPPER = ("H100", "H200", "H800", "H20")
DRIVER = Path("/proc/driver/nvidia/gpus")
# The second is deprecated, but jaxlib takes no GPU where both are set.
MEMORY = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
Flags = dict[str, bool | int]

_LAYER = 2**29  # bytes: more than one layer's weights of a 7B model, which are then gathered at once

# From this version of jaxlib on.
_GPU: dict[str, Flags] = {
    "0.10": {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
        "xla_gpu_all_gather_combine_threshold_bytes": _LAYER,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": _LAYER,
        "xla_gpu_all_reduce_combine_threshold_bytes": _LAYER,
    },
}


def apply(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is to be set where JAX will use NVIDIA GPUs, and print it in process 0. Call before JAX is imported.

    Raises:
        UserError: a variable of the launcher is missing or wrong.
    """
    if not gpus(environment):
        return
    place = launchers.find(environment)
    version = metadata.version("jaxlib")
    flags, unknown = choose(environment, version, libraries())
    environment["XLA_FLAGS"] = " ".join([*flags, environment.get("XLA_FLAGS", "")]).strip()
    added = {}
    if not MEMORY & environment.keys():
        added["XLA_CLIENT_MEM_FRACTION"] = "0.9"  # of the GPU's memory; JAX's own default is 0.75
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in environment and is_any(HOPPER):
        added["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # kernels start in the order of their launch
    environment.update(added)
    if place is None or place.index == 0:
        told = [*(f"{name}={value}" for name, value in added.items()), f"XLA_FLAGS={environment['XLA_FLAGS']!r}"]
        lacking = f"; not known to it: {', '.join(unknown)}" if unknown else ""
        print(f"for GPUs, jaxlib {version}: {' '.join(told)}{lacking}", file=sys.stderr)


def choose(environment: Mapping[str, str], version: str, paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The flags, as XLA_FLAGS has them, that the user has not set; and the names that a library does not know."""
    theirs = set(re.findall(r"--(\w+)", environment.get("XLA_FLAGS", "")))
    wanted = {name: value for name, value in gpu_flags(version).items() if name not in theirs}
    known = known_flags(wanted, paths)
    chosen = [f"--{name}={str(wanted[name]).lower()}" for name in known]
    return chosen, [name for name in wanted if name not in known]


def known_flags(names: Iterable[str], paths: Sequence[Path]) -> list[str]:
    """Those of `names` that every one of these shared libraries holds as a whole string; none without a library."""
    found = list(names) if paths else []
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = [name for name in found if content.find(b"\0" + name.encode() + b"\0") >= 0]
    return found


def is_any(models: Sequence[str], folder: Path = DRIVER) -> bool:
    """Whether the driver names a GPU of one of these models."""
    told = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*/information")]
    return any(model in text for text in told for model in models)


def gpu_flags(jaxlib: str) -> Flags:
    """The flags for a version of jaxlib; none for one older than the table."""
    known = [version for version in _GPU if Version(version) <= Version(jaxlib)]
    return dict(_GPU[max(known, key=Version)]) if known else {}


def libraries() -> list[Path]:
    """The libraries that read XLA_FLAGS: jaxlib's own and that of each plugin for GPUs."""
    modules = ["jaxlib"]
    modules += [entry.value for entry in metadata.entry_points(group="jax_plugins") if "cuda" in entry.name]
    found = []
    for module in modules:
        spec = importlib.util.find_spec(module)
        folders = spec.submodule_search_locations if spec else None
        found += [path for folder in folders or () for path in Path(folder).glob("*.so")]
    return [path for path in found if path.name in ("libjax_common.so", "xla_cuda_plugin.so")]
