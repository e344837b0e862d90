"""What the scripts of this folder share: tiny runs, the hash of what a run has learnt, and how figures are printed.

The tiny runs are those of the tests (`tests/runs.py`): `runs.flags(workdir, data__workers=2)` is the command line of
one, `runs.start` starts one as a child that has the imports behind it (`tests/warm.py`), `runs.train` waits for its
end, and `ask=` has it send itself a signal. Import this module before jax: it says where and how is compiled.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import absl.logging

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import compiling  # noqa: E402  # of the tests
import runs  # noqa: E402
from machine import machine  # noqa: E402  # of the scripts

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiling.cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint that counts, as every command finds it; 0 where there is none."""
    from elm_jax.run.checkpoint import Checkpoints

    if not (workdir / "checkpoints").is_dir():
        return 0
    reader = Checkpoints(workdir, read_only=True)
    try:
        return reader.find("latest") or 0
    finally:
        reader.close()


def state_hash(workdir: Path, step: int | None = None) -> str:
    """SHA-256 of all arrays of a run's checkpoint (default: the newest): names, dtypes, shapes and bytes."""
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax misses files that it never wrote
    step = newest(workdir) if step is None else step
    found = hashlib.sha256(str(step).encode())
    for name, array in sorted(runs.saved_arrays(workdir, step).items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def end(sentence: str, good: bool, **figures: Any) -> int:
    """Print the figures, with the machine, as a line of JSON, and the sentence; the exit status: 1 unless `good`."""
    print(json.dumps({**figures, "good": good, "machine": machine("jax", "orbax-checkpoint")}))
    print(sentence)
    return 0 if good else 1
