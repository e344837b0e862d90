"""What the doctor tries out: JAX on its devices, the package's modules, one step of training.

The trials run in a process of their own, `python -m elm_jax.doctoring.trials`, because a wrong flag or a broken
driver can end the process that meets it. It prints one JSON object a line: `{"trial": name}` before a trial,
`{"finding": {...}}` after it. A trial is a function without arguments that returns a Finding.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import json
import math
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elm_jax.doctoring.checks import FAIL, NOTE, OK, ROOT, Finding, install, smi

COMMAND = (sys.executable, "-m", "elm_jax.doctoring.trials")
SECONDS = 600.0
FLAGS_REFUSED = re.compile(r"parse_flags_from_env\.cc:\d+\] (.*)")


def examine(command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> Iterator[Finding]:
    """The findings of all trials, as they come; that their process dies or hangs is a finding too."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        trial = "start"
        assert process.stdout is not None
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a library's own output
            trial = said.get("trial", trial)
            if "finding" in said:
                yield Finding(**said["finding"])
        status = process.wait()
        timer.cancel()
        errors.seek(0)
        if status and late.is_set():
            yield Finding(trial, FAIL, f"{trial} did not end within {seconds:g} s")
        elif status:
            yield _death(trial, status, errors.read())


def _death(trial: str, status: int, errors: str) -> Finding:
    refused = FLAGS_REFUSED.search(errors)
    if refused:
        text = f"XLA does not take XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}: {refused[1].strip()}"
        return Finding("settings", FAIL, text, "unset XLA_FLAGS")
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    return Finding(trial, FAIL, f"{trial} ended the process with {how}: {last}")


def main() -> None:
    """All trials, in this process; what needs devices is left out where there are none."""
    output = sys.stdout
    sys.stdout = sys.stderr  # what libraries print

    def say(**line: Any) -> None:
        print(json.dumps(line), file=output, flush=True)

    for trial in TRIALS:
        say(trial=trial.__name__)
        try:
            finding = trial()
        except Exception as error:  # whatever is broken here is what the user wants to know
            said = str(error).strip().split("\n")[0]
            mend = install() if isinstance(error, ImportError) else ""
            finding = Finding(trial.__name__, FAIL, f"{trial.__name__} failed: {type(error).__name__}: {said}", mend)
        say(finding=asdict(finding))
        if trial is devices and finding.status == FAIL:
            return


def modules() -> Finding:
    """Whether every module of the package can be imported."""
    import elm_jax

    count = 0
    for module in pkgutil.walk_packages(elm_jax.__path__, "elm_jax.", onerror=lambda name: None):
        if module.name.rpartition(".")[2].startswith("_"):
            continue  # the compiled part has a check of its own
        try:
            importlib.import_module(module.name)
        except Exception as error:
            text = f"{module.name} cannot be imported: {type(error).__name__}: {error}"
            return Finding("modules", FAIL, text, install())
        count += 1
    return Finding("modules", OK, f"all {count} modules of elm_jax can be imported")


def devices() -> Finding:
    """Whether JAX starts, and on which devices."""
    import jax

    asked = os.environ.get("JAX_PLATFORMS", "")
    try:
        found = jax.devices()
    except Exception as error:  # of a plugin, of any type
        said = f"{type(error).__name__} {str(error).strip().split(chr(10))[0]}".strip()
        setting = f" with JAX_PLATFORMS={asked}" if asked else ""
        mend = "unset JAX_PLATFORMS" if asked else install()
        return Finding("devices", FAIL, f"JAX starts on no device{setting}: {said}", mend)
    memory = (found[0].memory_stats() or {}).get("bytes_limit")
    each = f", {memory / 1e9:.0f} GB each" if memory else ""
    kind = counted(len(found), f"{found[0].platform} device")
    return Finding("devices", OK, f"jax {jax.__version__} sees {kind}: {found[0].device_kind}{each}")


def accelerator() -> Finding:
    """Whether JAX uses the NVIDIA GPUs that are there."""
    import jax

    asked, here, platform = os.environ.get("JAX_PLATFORMS", ""), smi(), jax.default_backend()
    count = len([line for line in here.stdout.splitlines() if line.strip()]) if here and not here.returncode else 0
    gpus = counted(count, "NVIDIA GPU")
    if not count:
        return Finding("accelerator", OK, f"JAX computes on {platform}; nvidia-smi shows no GPU")
    if platform == "gpu":
        used = jax.local_device_count()
        if used < count:
            hidden = "CUDA_VISIBLE_DEVICES" in os.environ
            mend = "unset CUDA_VISIBLE_DEVICES" if hidden else "nvidia-smi -L  # compare"
            return Finding("accelerator", NOTE, f"JAX computes on {used} of {gpus}", mend)
        return Finding("accelerator", OK, f"JAX computes on {gpus}")
    if asked and "cuda" not in asked and "gpu" not in asked:
        return Finding("accelerator", NOTE, f"JAX_PLATFORMS={asked} keeps JAX off {gpus}", "unset JAX_PLATFORMS")
    plugins = [name for name in ("jax-cuda12-plugin", "jax-cuda13-plugin") if _version(name)]
    if not plugins:
        text = f"JAX computes on {platform}, not on {gpus}: it was installed without CUDA"
        return Finding("accelerator", FAIL, text, install("gpu"))
    found, needed = _version(plugins[0]), jax.__version__
    why = f"{plugins[0]} {found} is not of jax {needed}" if found != needed else f"{plugins[0]} finds no device"
    mend = f'pip install --force-reinstall "jax[{plugins[0].split("-")[1]}]=={needed}"'
    return Finding("accelerator", FAIL, f"JAX computes on {platform}, not on {gpus}: {why}", mend)


def arithmetic() -> Finding:
    """A product of matrices of small whole numbers, which every device must get exactly right."""
    import jax
    import numpy as np

    left, right = (np.random.default_rng(seed).integers(-8, 8, (64, 64)) for seed in (0, 1))
    for device in jax.local_devices():
        operands = [jax.device_put(x.astype(np.float32), device) for x in (left, right)]
        if not np.array_equal(np.asarray(multiply(*operands)), left @ right):
            return Finding("arithmetic", FAIL, f"{device} multiplies matrices wrongly", "unset XLA_FLAGS")
    return Finding("arithmetic", OK, f"products of matrices are right on {counted(len(jax.local_devices()), 'device')}")


def multiply(left: Any, right: Any) -> Any:
    """The product, compiled."""
    import jax

    return jax.jit(lambda a, b: a @ b)(left, right)


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
    total = jax.jit(add)(each)
    expected = count * (count - 1) / 2
    if float(total[0]) != expected:
        text = f"a sum over {counted(count, 'device')} is {float(total[0]):g} instead of {expected:g}"
        return Finding("collective", FAIL, text, "NCCL_DEBUG=INFO python -m elm_jax.doctor  # shows how they connect")
    return Finding("collective", OK, f"a sum over {counted(count, 'device')} is right")


def local_models() -> Finding:
    """Whether a tokenizer in a local folder can be used, as Hugging Face writes it, without the network."""
    from elm_jax.data.demo import demo_tokenizer
    from elm_jax.text.vocabulary import load_tokenizer

    own, text = demo_tokenizer(), "What is the heart rate?"
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        read = load_tokenizer(folder, local_files_only=True)
    if read(text)["input_ids"] != own(text)["input_ids"]:
        text = "a tokenizer read from a local folder encodes otherwise than before"
        return Finding("local_models", FAIL, text, "pip install --force-reinstall transformers tokenizers")
    return Finding("local_models", OK, "a tokenizer in a local folder works without the network")


def training() -> Finding:
    """One step of a very small model on the demo's data, from generating the ECGs to the checkpoint."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loss, has_checkpoint = train_one_step(Path(folder))
    seconds = time.monotonic() - begun
    if not math.isfinite(loss):
        return Finding("training", FAIL, f"the loss of a training step is {loss}", "unset XLA_FLAGS JAX_ENABLE_X64")
    if not has_checkpoint:
        return Finding("training", FAIL, "a training run left no checkpoint", "pip install -U orbax-checkpoint")
    text = f"a small model trains: one step in {seconds:.0f} s, loss {loss:.2f}, with a checkpoint"
    return Finding("training", OK, text)


def train_one_step(folder: Path) -> tuple[float, bool]:
    """The loss of the step, and whether its checkpoint is there."""
    import jax

    from elm_jax import cli
    from elm_jax.config import resolve
    from elm_jax.training.loop import train

    tree, _ = cli.read_config_file("configs/demo.py")
    rows = 4 * jax.device_count()
    os.environ["ELM_JAX_CACHE"] = str(folder)
    tree |= {"workdir": str(folder / "run"), "update": ("connector", "llm")}
    tree["llm"]["scratch"] = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32, "max_len": 256}
    tree["encoder"]["config"]["width"] = 4
    tree["data"] |= {"names": (f"demo:train={rows},val=1,test=1",), "val_fraction": 0}
    tree["train"] |= {"steps": 1, "batch_size": rows, "log_every": 1}
    tree["eval"]["at_end"] = False
    tree["log"]["progress"] = False
    train(resolve(tree))
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return float(losses[-1] if losses and losses[-1] is not None else "nan"), (run / "checkpoints" / "1").is_dir()


def counted(count: int, thing: str) -> str:
    """`1 device`, `2 devices`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


TRIALS: tuple[Callable[[], Finding], ...] = (
    modules,
    devices,
    accelerator,
    arithmetic,
    collective,
    local_models,
    training,
)

if __name__ == "__main__":
    main()
