"""What the doctor tries out: JAX on its devices, a sum over them, one step of training.

The trials run in a process of their own, `python -m elm_jax.doctoring.trials`, because a wrong flag or a broken
driver can end the process that meets it. It prints each finding as one line of JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from elm_jax.doctoring.checks import FAIL, NOTE, OK, ROOT, Checks, Finding, examine, install, smi

COMMAND = (sys.executable, "-m", "elm_jax.doctoring.trials")
SECONDS = 600


def findings(command: Sequence[str] = COMMAND) -> Iterator[Finding]:
    """What the trials' process finds, as it comes; that the process dies is a finding too."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        left = list(TRIALS)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"status"'):  # else a library's own output
                yield Finding(**json.loads(line))
                left.pop(0)
        if process.wait():
            errors.seek(0)
            yield _death(left[0] if left else "the end of the trials", process.returncode, errors.read())


def _death(trial: str, status: int, errors: str) -> Finding:
    refused = re.search(r"parse_flags_from_env\.cc:\d+\] (.*)", errors)
    if refused:
        text = f"XLA does not take XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}: {refused[1].strip()}"
        return Finding(FAIL, text, "unset XLA_FLAGS", "settings")
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    text = f"did not end within {SECONDS} s" if -status == signal.SIGALRM else f"ended the process with {how}"
    return Finding(FAIL, f"{trial} {text}: {errors.strip().rpartition(chr(10))[2] or 'no message'}", check=trial)


def main() -> None:
    """All trials, in this process; what needs devices is left out where there are none."""
    signal.alarm(SECONDS)  # ends the process, in the middle of a driver's code too
    output, sys.stdout = sys.stdout, sys.stderr  # which gets what libraries print
    for finding in examine(TRIALS):
        print(json.dumps(asdict(finding)), file=output, flush=True)
        if (finding.check, finding.status) == ("devices", FAIL):
            return


def devices() -> Finding:
    """On which devices JAX starts. Raises what it raises where there are none, which says what to set."""
    import jax

    found = jax.devices()
    memory = (found[0].memory_stats() or {}).get("bytes_limit")
    each = f", {memory / 1e9:.0f} GB each" if memory else ""
    kind = counted(len(found), f"{found[0].platform} device")
    return Finding(OK, f"jax {jax.__version__} sees {kind}: {found[0].device_kind}{each}")


def accelerator() -> Finding:
    """Whether JAX uses the NVIDIA GPUs that are there."""
    import jax

    (status, said), platform, asked = smi(), jax.default_backend(), os.environ.get("JAX_PLATFORMS", "")
    gpus = counted(len(said), "NVIDIA GPU")
    if status:
        return Finding(OK, f"JAX computes on {platform}; nvidia-smi shows no GPU")
    if platform == "gpu" and jax.local_device_count() < len(said):
        mend = "unset CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else "nvidia-smi -L  # compare"
        return Finding(NOTE, f"JAX computes on {jax.local_device_count()} of {gpus}", mend)
    if platform == "gpu":
        return Finding(OK, f"JAX computes on {gpus}")
    if asked and "cuda" not in asked and "gpu" not in asked:
        return Finding(NOTE, f"JAX_PLATFORMS={asked} keeps JAX off {gpus}", "unset JAX_PLATFORMS")
    text = f"jax {jax.__version__} computes on {platform}, not on {gpus}: no CUDA plugin of this version works"
    return Finding(FAIL, text, install("gpu13" if find_spec("jax_cuda13_plugin") else "gpu"))


def collective() -> Finding:
    """A sum over an array that lies on all devices, which they must add up together."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    count = jax.local_device_count()
    mesh = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,), devices=jax.local_devices())
    each = jax.device_put(np.arange(count, dtype=np.float32), NamedSharding(mesh, PartitionSpec("all")))
    add = jax.shard_map(
        lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec()
    )
    total, expected = float(jax.jit(add)(each)[0]), count * (count - 1) / 2
    if total == expected:
        return Finding(OK, f"a sum over {counted(count, 'device')} is right")
    text = f"a sum over {counted(count, 'device')} is {total:g} instead of {expected:g}"
    return Finding(FAIL, text, "NCCL_DEBUG=INFO python -m elm_jax.doctor  # shows how they connect")


def training() -> Finding:
    """One step of a very small model on the demo's data, from generating the ECGs to the checkpoint."""
    import jax

    from elm_jax.cli import ConfigFlags
    from elm_jax.training.loop import train

    begun, rows = time.monotonic(), 4 * jax.device_count()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ELM_JAX_CACHE"] = folder
        keys = {
            "workdir": f"{folder}/run", "update": "connector,llm", "encoder.config.width": 4,
            "llm.scratch": '{"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32, "max_len": 256}',
            "data.names": f'["demo:train={rows},val=1,test=1"]', "data.val_fraction": 0, "train.steps": 1,
            "train.batch_size": rows, "train.log_every": 1, "eval.at_end": "false",
        }  # fmt: skip
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        train(ConfigFlags.parse(["--config=configs/demo.py", "--noconfig.log.progress", *flags]).load())
        lines = map(json.loads, Path(folder, "run/metrics.jsonl").read_text().splitlines())
        loss = next(line["loss"] for line in lines if "loss" in line)
    if loss is None:  # no number is null in JSON
        return Finding(FAIL, "the loss of a training step is no number", "unset XLA_FLAGS JAX_ENABLE_X64")
    return Finding(OK, f"a small model trains: one step in {time.monotonic() - begun:.0f} s, loss {loss:.2f}")


def counted(count: int, thing: str) -> str:
    """`1 device`, `2 devices`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


TRIALS: Checks = {
    "devices": devices,
    "accelerator": accelerator,
    "collective": collective,
    "training": training,
}

if __name__ == "__main__":
    main()
