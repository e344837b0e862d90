"""What a run tells of its steps: the lines of metrics.jsonl, the progress bar, trackers, and a summary at its end.

Between two lines nothing is read from the devices: what the steps leave there is kept, and fetched together when a line
is due.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax import stopping
from elm_jax.assemble import Assembly
from elm_jax.config import Config, to_dict
from elm_jax.data.batch import Batch
from elm_jax.data.loader import Loaded
from elm_jax.data.packing import LengthIndex
from elm_jax.errors import printable
from elm_jax.models.lora import is_lora
from elm_jax.objectives import Redrawn
from elm_jax.runtime import telemetry
from elm_jax.runtime.mesh import batch_ways, host_parts
from elm_jax.scoring.generation import rebuilding

DRAWN = 4  # ECGs of a picture
Flops = Callable[[int, int, int], float]  # of (tokens, supervised tokens, attention pairs)


@dataclasses.dataclass
class Tally:
    """What some steps did, and the seconds that passed meanwhile: all, those that the devices had nothing to do, and
    those of each step on the devices."""

    steps: int = 0
    tokens: int = 0
    supervised: int = 0
    slots: int = 0
    conversations: int = 0
    truncated: int = 0
    pairs: int = 0
    seconds: float = 0.0
    idle: float = 0.0
    each: list[float] = dataclasses.field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take the other's steps as well."""
        self.each += other.each  # in place: there is one for each step of the run
        for name, value in vars(other).items():
            if name != "each":
                setattr(self, name, getattr(self, name) + value)

    def rates(self, flops: Flops | None, peak: float | None) -> dict[str, Any]:
        """The entries of a line that depend on time. `peak`: FLOP/s of all devices, where it is known."""
        seconds, mfu = max(self.seconds, 1e-9), None
        if flops is not None and peak is not None:
            mfu = flops(self.tokens, self.supervised, self.pairs) / seconds / peak
        p50, p95 = np.percentile(self.each, [50, 95]) * 1000 if self.each else (None, None)
        return {
            "step_ms": round(1000 * seconds / max(self.steps, 1), 3),
            "step_ms_p50": None if p50 is None else round(float(p50), 3),
            "step_ms_p95": None if p95 is None else round(float(p95), 3),
            "tokens_per_s": round(self.tokens / seconds, 3),
            "supervised_tokens_per_s": round(self.supervised / seconds, 3),
            "padded_tokens_per_s": round(self.slots / seconds, 3),
            "conversations_per_s": round(self.conversations / seconds, 3),
            "host_wait_share": round(self.idle / seconds, 6),
            "mfu": mfu,
            "device_memory_gb": telemetry.device_memory_gb(),
        }


class Report:
    """The log of one run, from its step `first` on. Process 0 writes.

    A line's `loss`, `tokens` and the like are those of its step. `truncated`, the conversations that data.max_len cut,
    and what depends on time (see `Tally.rates`) are of all steps since the line before; the time of compiling,
    validating and saving is no part. `step_ms` is the time passed by the steps taken; `step_ms_p50` and `step_ms_p95`
    are of the steps as the devices took them (`telemetry.StepClock`).
    `host_wait_share` is the part of the time in which the devices had done all that they were given and waited for the
    host: for the loader, or for a line to be written.
    """

    def __init__(self, folder: Path, config: Config, mesh: Mesh, flops: Flops | None, first: int, total: int) -> None:
        self._first_process = jax.process_index() == 0
        self._file = telemetry.MetricsFile(folder, first, self._first_process)
        log = config.log
        self._trackers = (
            telemetry.trackers(folder, log, to_dict(config)) if self._first_process else []
        )
        self._bar = telemetry.Progress(total, first, log.progress and self._first_process)
        self._tables, self._told_alike = folder / "rollouts", False
        peak = telemetry.peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = None if peak is None else peak * mesh.size
        self._flops, self._ways, self._parts = flops, batch_ways(mesh), len(host_parts(mesh))
        self._clock = telemetry.StepClock()
        self._now, self._all = Tally(), Tally()
        self._pending: list[dict[str, jax.Array]] = []  # what the steps since the last line left on the devices
        self._compiled: list[float] = []
        self._begun = self._mark = time.perf_counter()

    # -- while it trains --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self, what: str = "saving") -> Iterator[None]:
        """What happens here is no part of the steps' time. It begins when the steps before it are done."""
        self._clock.wait()
        self._bar.says(what)
        began = time.perf_counter()
        try:
            with stopping.during(what):
                yield
        finally:
            passed = time.perf_counter() - began
            self._mark += passed
            self._clock.skip(passed)
            self._bar.says("train")

    def compiled(self, step: int, batch: Batch, seconds: float) -> None:
        """The train step was compiled for the shape of a batch, which `step` is the first to have."""
        self._compiled.append(seconds)
        (micro, rows, tokens), signals = batch.tokens.shape, batch.signal_weights.shape[-1]
        shape = {"micro_batches": micro, "rows": rows, "tokens": tokens, "signals": signals,
                 "targets": batch.target_ids.shape[-1], "key_blocks": batch.key_blocks.shape[-1]}  # fmt: skip
        self.event("compile", step, shape=shape, seconds=round(seconds, 3), count=len(self._compiled))

    def took(self, loaded: Loaded, metrics: dict[str, jax.Array], began: float) -> None:
        """A step was given to the devices at the time `began`."""
        self._clock.step(began, metrics["finite"], f"step {loaded.step + 1} on the devices")
        self._pending.append(metrics)
        now, (micro, rows, tokens) = self._now, loaded.batch.tokens.shape
        now.steps += 1
        now.slots += micro * rows * tokens * self._ways // self._parts
        now.conversations += loaded.conversations
        now.truncated += loaded.truncated
        now.pairs += loaded.attention_pairs

    def line(self, loaded: Loaded, rate: Callable[[int], float]) -> dict[str, Any]:
        """The line of this step, once it is done.

        rate: the learning rate after so many updates, of which skipped steps are none.
        """
        fetched = jax.device_get(self._pending)
        self._pending = []
        now = self._now
        now.tokens = sum(int(values["tokens"]) for values in fetched)
        now.supervised = sum(int(values["supervised_tokens"]) for values in fetched)
        now.each, now.idle = self._clock.lap()
        time_now = time.perf_counter()
        now.seconds = time_now - self._mark
        if not self._told_alike and all(v["others"].get("degenerate", 0) > 1 - 1e-5 for v in fetched):
            self._told_alike = True
            self.warn(
                f"step {loaded.step + 1}: all answers to a question were rewarded alike, which teaches nothing: see "
                f"{self._tables}; try other rl.rewards, a higher rl.temperature or more SFT before"
            )
        micro, rows, length = loaded.batch.tokens.shape
        values = fetched[-1]
        tokens, slots = int(values["tokens"]), micro * rows * length * self._ways // self._parts
        line = {
            "step": loaded.step + 1,
            "loss": float(values["loss"]),
            "learning_rate": rate(int(values["updates"])),
            "grad_norm": float(values["grad_norm"]),
            **{name: float(value) for name, value in values["others"].items()},
            "tokens": tokens,
            "supervised_tokens": int(values["supervised_tokens"]),
            "conversations": loaded.conversations,
            "truncated": now.truncated,
            "recordings": int(values["recordings"]),
            "padding_fraction": round(1 - tokens / slots, 6),
            **now.rates(self._flops, self._peak),
        }
        self._all.add(now)
        self._now, self._mark = Tally(), time_now
        return line

    def write(self, line: Mapping[str, Any]) -> None:
        """Put a step's line on disk, and send it to the trackers."""
        self._file.write(line)
        for track in self._trackers:
            track(int(line["step"]), line)

    def event(self, name: str, step: int, **values: Any) -> None:
        """Write what happened at a step."""
        self._file.write({"event": name, "step": step, **values})

    def warn(self, text: str) -> None:
        """Say in the terminal what should be known while the run goes on."""
        if self._first_process:
            self._bar.warn(text)

    def advance(self, line: Mapping[str, Any] | None) -> None:
        """Move the bar on by one step."""
        self._bar.update(1, line)

    # -- at its end -------------------------------------------------------------------------------------------

    def summary(self, name: str, step: int) -> None:
        """Write the event `name` with the totals of this process's steps up to its last line."""
        done = self._all
        self.event(
            name, step, steps=done.steps, seconds=round(time.perf_counter() - self._begun, 3),
            train_seconds=round(done.seconds, 3), tokens=done.tokens, supervised_tokens=done.supervised,
            conversations=done.conversations, truncated=done.truncated,
            padding_fraction=round(1 - done.tokens / max(done.slots, 1), 6),
            **done.rates(self._flops, self._peak), compile_seconds=round(sum(self._compiled), 3),
            compile_count=len(self._compiled),
        )  # fmt: skip

    def finish(self, folder: Path, step: int, history: Mapping[str, Any], better: str) -> None:
        """Write the event, draw the losses, and say in the terminal how good the best validation was; `better` is that
        of an `Objective`."""
        self.summary("finish", step)
        self.plot(folder)
        best, judged = history["best_val_loss"], ""
        if best is not None:
            value = -best if better else best
            judged = f", val_{better or 'loss'} {value:.4g} (best step {history['best_step']})"
        if self._first_process:
            print(printable(f"{folder}: done, step {step}{judged}"), file=sys.stderr)

    def plot(self, folder: Path) -> None:
        """Draw plots/loss.png from the lines of metrics.jsonl."""
        from elm_jax.pictures.ecg_paper import loss_plot

        if not self._first_process:
            return
        logged = [line for line in self._file.lines() if line.get("loss") is not None]
        (folder / "plots").mkdir(exist_ok=True)
        steps, losses = [line["step"] for line in logged], [line["loss"] for line in logged]
        loss_plot(steps, losses, [line.get("val_loss") for line in logged], folder / "plots" / "loss.png")

    def redrawn(self, folder: Path, step: int, assembly: Assembly, made: Redrawn) -> dict[str, float]:
        """Draw plots/<what>_<step>.png of some validation ECGs; what is measured of those that were rebuilt."""
        from elm_jax.pictures.redrawn import draw_redrawn

        there, data = made.there, assembly.config.data
        truth, own, hidden = (np.asarray(x)[there] for x in (made.truth, made.made, made.hidden))
        if self._first_process and len(own):
            (folder / "plots").mkdir(exist_ok=True)
            path = folder / "plots" / f"{assembly.objective.drawn}_{step}.png"
            leads = data.leads if own.shape[1] == len(data.leads) else ()
            shown = (None if made.features else truth[:DRAWN]), own[:DRAWN], hidden[:DRAWN]
            draw_redrawn(path, *shown, data.sampling_rate, leads)
        if made.features is not None or not len(own):
            return {}
        measured = rebuilding(own, truth, data.sampling_rate)
        of_hidden = hidden.any(-1)
        return {f"val_{name}": float(getattr(measured, name)[of_hidden].mean()) for name in ("psnr", "ssim")}

    def close(self) -> None:
        """End the bar and the clock."""
        self._clock.close()
        self._bar.close()


def flops_of(assembly: Assembly, trained: Collection[str]) -> Flops | None:
    """The FLOPs of steps that train these arrays; None where there is no LLM."""
    if assembly.llm is None:
        return None
    parameters = telemetry.layer_parameters(assembly.llm, assembly.structure.leaves)
    own = any(name.startswith("llm.layers.") and not is_lora(name) for name in trained)
    return functools.partial(telemetry.step_flops, assembly.llm, parameters, own)


def tell_of_cuts(what: str, index: LengthIndex, max_len: int) -> None:
    """Say, where it is so, how much of the conversations is cut off."""
    told = index.cuts
    if told["conversations"]:
        ecgs = f", {told['with_ecgs_cut']:,} of them within their ECGs" if told["with_ecgs_cut"] else ""
        print(
            f"warning: {what}: {told['conversations']:,} of {len(index):,} conversations ({told['share']:.1%}) exceed "
            f"data.max_len={max_len} and are cut{ecgs} ({told['answers']:,} answers lost whole); raise data.max_len "
            "to keep all", file=sys.stderr,
        )  # fmt: skip
