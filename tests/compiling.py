"""How tests compile: they compile much and compute little, on a CPU."""

import os
import platform
import zlib
from importlib.metadata import version
from pathlib import Path

from elm_jax.runtime.gpu_settings import known_flags, libraries

# Without LLVM's optimisations, with the older of XLA's two ways to write loops, in one piece: a quarter of the time.
_WANTED = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# For XLA_FLAGS. A flag that the installed jaxlib has no more would end the process.
FLAGS = " ".join(f"--{name}={_WANTED[name]}" for name in known_flags(_WANTED, libraries()))


def built_for() -> str:
    """What compiled programs, and the last bits of their results, depend on: jaxlib's version and the processor."""
    processor = Path("/proc/cpuinfo")
    features = processor.read_text().partition("\n\n")[0] if processor.exists() else platform.processor()
    made_for = "".join(line for line in features.splitlines(keepends=True) if line.startswith(("model name", "flags")))
    return f"{version('jaxlib')}-{zlib.crc32((made_for or features).encode()):08x}"


def cache() -> Path:
    """Where compiled programs are kept; what is in it may be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elm_jax_tests" / built_for()
