"""What a run tells: metrics.jsonl, the progress bar, trackers, and how MFU is counted."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from tqdm import tqdm

from elm_jax import stopping
from elm_jax.config import LogConfig
from elm_jax.errors import UserError, printable, refused
from elm_jax.folders import json_lines, read_regular, write_atomic
from elm_jax.models.functional import Leaf
from elm_jax.models.lora import is_lora

WANDB_ID = "wandb_id"  # in a run's folder: its id in Weights & Biases
# Peak dense bfloat16 FLOP/s of one device, by how its `device_kind` reads (vendors' data sheets): the first that is a
# part of it.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # that is what a v5p calls itself
    "TPU v6": 918e12,
}
MFU_FORMULA = (
    "(6 or, where the LLM is frozen, 4) FLOPs x (layer parameters x tokens + width x vocabulary x supervised tokens "
    "+ 2 x layers with attention x heads x head size x attention pairs + 3 x layers with linear attention x value "
    "heads x key size x value size x tokens); of experts the parameters of those that a token is sent to; pairs that a "
    "sliding window hides count, too; recomputation, encoder and connector do not"
)


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device, None where the table has no entry (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in device_kind.lower()), None)


def step_flops(
    llm: Any, layer_parameters: int, trained: bool, tokens: int, supervised: int, pairs: int
) -> float:
    """FLOPs of a step as MFU_FORMULA says. `llm` is the decoder's config."""
    products = layer_parameters * tokens + llm.embedding * llm.vocab_size * supervised
    attention = 2 * len(llm.layers_with("attention")) * llm.heads * llm.head_dim * pairs
    if llm.delta:
        state = llm.delta.value_heads * llm.delta.key_dim * llm.delta.value_dim
        attention += 3 * len(llm.layers_with("delta")) * state * tokens
    return float((6 if trained else 4) * (products + attention))


def layer_parameters(llm: Any, leaves: Mapping[str, Leaf]) -> int:
    """Of all arrays of a model, the parameters in its LLM's layers that each token meets; without adapters."""
    found = 0
    for name, leaf in leaves.items():
        if name.startswith("llm.layers.") and not is_lora(name):
            size = math.prod(leaf.shape)
            chosen = name.startswith("llm.layers.experts.") and name.endswith(".kernel")
            found += size * llm.experts.chosen // llm.experts.count if chosen else size
    return found


class MetricsFile:
    """metrics.jsonl of a run folder, appended by process 0 only.

    Args:
        resume_at: lines of later steps are cut, so that a resumed run's file is that of an unbroken one.
    """

    def __init__(self, folder: Path, resume_at: int, writes: bool) -> None:
        self.path, self.writes = folder / "metrics.jsonl", writes
        if not writes:
            return
        kept = "".join(json.dumps(line) + "\n" for line in self.lines() if line.get("step", 0) <= resume_at)
        write_atomic(self.path, lambda file: file.write(kept.encode()))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object, at once on disk. NaN and infinities become null: JSON has none.

        Raises:
            UserError: there is no room, or the file cannot be written.
        """
        if not self.writes:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        fix = "make room and run the same command again: it goes on from the last checkpoint"
        with refused(self.path, "", "a file that can be written", fix), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines; a last one that was cut short by a kill is left out.

        Raises:
            UserError: another line is no JSON object with a whole number `step`, if it has one.
        """
        fix = "remove this line, or the file"
        found = json_lines(self.path, fix)
        for number, line in enumerate(found, 1):
            if type(line.get("step", 0)) is not int:
                raise UserError(f"{self.path}, line {number}", f"step {line['step']!r}", "a whole number", fix)
        return found


class Progress:
    """The progress bar: step, loss, tokens/s, MFU, the devices' wait for the host; from the bar itself, time left."""

    def __init__(self, total: int, initial: int, shown: bool, file: TextIO | None = None) -> None:
        self._bar = tqdm(
            total=total,
            initial=initial,
            disable=None if shown else True,  # None: shown on a terminal only
            unit="step",
            dynamic_ncols=True,
            file=file,
            desc="train",
            smoothing=0.02,  # lines are slower than steps
        )

    def update(self, steps: int, line: Mapping[str, Any] | None = None) -> None:
        if line:
            mfu = line.get("mfu")
            shown = {"loss": f"{line['loss']:.4f}", "tok/s": f"{line['tokens_per_s']:,.0f}"}
            shown |= {} if mfu is None else {"mfu": f"{mfu:.1%}"}
            self._bar.set_postfix({**shown, "wait": f"{line.get('host_wait_share', 0.0):.0%}"}, refresh=False)
        self._bar.update(steps)

    def says(self, what: str) -> None:
        """What is done now."""
        self._bar.set_description(what)

    def warn(self, text: str) -> None:
        """A line of its own above the bar, on stderr."""
        tqdm.write(printable(f"warning: {text}"), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Profiler:
    """Writes an XLA profile of the steps a to b - 1 (`log.profile_steps` "a:b") into `profile/` of a run's folder.

    settled: a context that is entered when the devices have done all that they were given, since they run behind the
    loop.
    """

    def __init__(
        self, folder: Path, steps: str | None, settled: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self.folder, self.settled = folder / "profile", settled
        self.first, self.last = (int(part) for part in steps.split(":")) if steps else (-1, -1)
        self.active = False

    def before(self, step: int) -> None:
        """Call before each step (counted from 0), so that the profile begins and ends between steps."""
        if step == self.first:
            with self.settled():
                jax.profiler.start_trace(str(self.folder))
            self.active = True
        elif step == self.last:
            self.close()

    def close(self) -> None:
        """End the profile, if one has begun."""
        if self.active:
            self.active = False
            with self.settled():
                jax.profiler.stop_trace()


class StepClock:
    """Seconds that each step took on the devices, told by a thread that waits for the steps' results.

    A step counts from when it was handed over, or from the end of the one before it, whichever came later, to when its
    result was there; from that end to the handing over the devices idled. The loop itself never waits, and a wait
    copies nothing. What the clock cannot see is a device that idles within a step.
    """

    def __init__(self) -> None:
        self._steps: queue.Queue[tuple[float, Any, str] | None] = queue.Queue()
        self._seconds: list[float] = []
        self._idle, self._ended = 0.0, time.perf_counter()
        self._thread = threading.Thread(target=self._watch, name="step clock", daemon=True)
        self._thread.start()

    def step(self, began: float, result: Any, name: str = "a step") -> None:
        """A step called `name` was handed over at `began` (of time.perf_counter) and will leave `result`."""
        self._steps.put((began, result, name))

    def wait(self) -> None:
        """Until the results of all steps handed over are there."""
        self._steps.join()

    def skip(self, seconds: float) -> None:
        """So much of what has passed since the last step ended is no idling. Call after `wait`."""
        self._ended += seconds

    def lap(self) -> tuple[list[float], float]:
        """The seconds of each step since the last call, in order, and those that the devices idled until now. Waits."""
        self.wait()
        now = time.perf_counter()
        found = self._seconds, self._idle + now - self._ended
        self._ended = now
        self._seconds, self._idle = [], 0.0
        return found

    def close(self) -> None:
        """End the thread; one that waits for a result that may never come is left to end with the process."""
        self._steps.put(None)
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        while (step := self._steps.get()) is not None:
            began, result, name = step
            stopping.doing(name)
            with contextlib.suppress(Exception):  # of a step that failed, which the loop meets when it reads a result
                jax.block_until_ready(result)
                now = time.perf_counter()
                self._seconds.append(now - max(began, self._ended))
                self._idle += max(0.0, began - self._ended)
                self._ended = now
            stopping.doing("")
            self._steps.task_done()


def device_memory_gb() -> float | None:
    """Peak memory of the first local device, where it says so."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else round(peak / 1e9, 3)


Tracker = Callable[[int, Mapping[str, Any]], None]


def trackers(folder: Path, log: LogConfig, config: Mapping[str, Any]) -> list[Tracker]:
    """Functions (step, values) that send a line elsewhere. Of Weights & Biases' own variables those hold that `log`
    says nothing of.

    Raises:
        UserError: a package that the config asks for is not installed, or the folder's WANDB_ID is damaged.
    """
    found: list[Tracker] = []
    if log.wandb:
        module = _needed("wandb", "log.wandb")
        known = os.environ.keys()
        run = module.init(
            project=log.wandb_project or (None if "WANDB_PROJECT" in known else "elm_jax"),
            entity=log.wandb_entity, tags=list(log.wandb_tags) or None,
            name=None if "WANDB_NAME" in known else folder.name, dir=None if "WANDB_DIR" in known else str(folder),
            config=dict(config), id=_wandb_id(folder / WANDB_ID), resume="allow",
        )  # fmt: skip
        found.append(lambda step, values: run.log(dict(values), step=step))
    if log.tensorboard:
        module = _needed("tensorboardX", "log.tensorboard")
        writer = module.SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, values: Mapping[str, Any]) -> None:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    writer.add_scalar(name, value, step)

        found.append(write)
    return found


def _wandb_id(path: Path) -> str:
    """The run's id there: the one that the run's folder keeps, else that of a sweep's agent or a new one, then kept."""
    if not path.exists():
        new = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        write_atomic(path, lambda file: file.write(new.encode()))
    expected = "the id of this run in Weights & Biases"
    fix = "put it back, or remove the file: the run goes on there as a new one"
    kept = read_regular(path, expected, fix, most=1000)
    if not re.fullmatch(rb"[\w.-]+", kept.strip()):
        raise UserError(path, repr(kept[:40]), expected, fix)
    return kept.strip().decode()


def _needed(module: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"config.{key}", f"no package {module}", "the package",
            f"install it with pip install {module}, or set config.{key} to False",
        ) from error  # fmt: skip
