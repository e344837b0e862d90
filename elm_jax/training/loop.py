"""The training loop: read a step, run it, log, validate, save. A run goes on where its folder says it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elm_jax import stopping
from elm_jax.assemble import assemble, find_llm
from elm_jax.config import Config
from elm_jax.data.batch import Batch
from elm_jax.data.dataset import Dataset
from elm_jax.data.loader import Loaded, StepSource
from elm_jax.data.plan import Plan
from elm_jax.data.readers import steps_from
from elm_jax.errors import UserError, printable
from elm_jax.folders import TOKENIZER, leave_folder
from elm_jax.models.functional import Arrays
from elm_jax.run import folder as run
from elm_jax.run.arrays import SavedArrays, save_arrays
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.weights import TrainedWeights, first_arrays, frozen_fingerprints, keep_adapter
from elm_jax.runtime import distributed, telemetry
from elm_jax.runtime.compilation import cache_folder
from elm_jax.runtime.mesh import batch_sharding, batch_ways, check_heads, host_parts, make_mesh, to_device
from elm_jax.runtime.watchdog import Watchdog
from elm_jax.training.attention_check import checked_attention, tell
from elm_jax.training.encoder_cache import keep_features
from elm_jax.training.encoder_probe import EncoderProbe
from elm_jax.training.health import Health
from elm_jax.training.optim import batch_scale, learning_rate_multiplier
from elm_jax.training.program import check_rows, check_updates, train_program
from elm_jax.training.report import Report, flops_of, tell_of_cuts
from elm_jax.training.rollouts import Rollouts
from elm_jax.training.state import TrainState, new_state
from elm_jax.training.step import StepPrograms


def train(config: Config) -> bool:
    """Train to the end, or to a stop signal (then SystemExit 143 after a checkpoint). Returns whether there was
    anything left to train.

    Raises:
        UserError: the config, the data or the folder does not fit.
    """
    folder = run.open_folder(config)
    try:
        stopping.doing("looking for the LLM")
        find_llm(config, folder / TOKENIZER)
        distributed.gather(None)  # all have it: however long that took
        with Watchdog(folder, config.train.timeout, config.data.timeout):
            trainer = Trainer(config, folder)
            if run.is_done(folder, trainer.total_steps):
                print(printable(f"{folder} is done: raise train.steps or train.epochs to go on"), file=sys.stderr)
                return False
            trainer.run()
            return True
    finally:
        leave_folder(folder)


class Trainer:
    """One run: built from its config, then `run`."""

    def __init__(self, config: Config, folder: Path) -> None:
        stopping.doing("reading tokenizer and records")
        self.config, self.folder = config, folder
        self.mesh = make_mesh(config.mesh)
        check_rows(config, self.mesh)
        self.assembly = assemble(config, folder / TOKENIZER)
        if self.assembly.llm is not None:
            check_heads(self.mesh, self.assembly.llm)
        run.keep_tokenizer(folder, self.assembly.llm and self.assembly.tokenizer, self.assembly.signal.ecg_byte)
        self._warn_of_random_parts()
        self.dataset = self.assembly.dataset("train")
        self.plan = self._plan(self.dataset)
        self.assembly, self.attention = checked_attention(self.assembly, self.mesh, self.plan.usual_rows)
        updates, steps = self.dataset.samples.updates, config.train.steps
        self.total_steps = self.plan.steps_before(config.train.epochs) * updates if steps is None else steps
        check_updates(config.train, updates)
        self.source = self._source(self.dataset, self.plan, self.total_steps // updates)
        self._prepare_validation()

    def run(self) -> None:
        """Train from where the folder stands to `total_steps`."""
        self._build()
        first = int(self.state.step)
        flops = flops_of(self.assembly, self.state.trained)
        self.report = Report(self.folder, self.config, self.mesh, flops, first, self.total_steps)
        self._announce(first)
        bad = self.history["bad"]
        self.health = Health(self.config, self.report, self.source, first, bad, self.mesh, lambda: self._arrays)
        profiler = telemetry.Profiler(self.folder, self.config.log.profile_steps, self.report.paused)
        done = first
        # Nothing passes between host and devices unasked: what does would make the loop wait for the step.
        with stopping.StopAfterStep() as stop, jax.transfer_guard("disallow"):
            try:
                for loaded in self._steps(self.source, first, self.config.data.workers):
                    done = loaded.step + 1
                    profiler.before(loaded.step)
                    line = self._advance(loaded)
                    self.report.advance(line)
                    validated = line is not None and "val_loss" in line
                    improved = validated and self.history["best_step"] == done
                    stopped_early = validated and self._stops_early()
                    if done % self.source.updates:  # the next step learns from the same answers
                        continue
                    late = self.checkpoints.age > (self.config.train.save_minutes or math.inf)
                    why = stop.after(done // self.source.updates, late)
                    if why is not None or stopped_early or improved or self._due(done, self.config.train.save_every):
                        self._save(done)
                    if why:
                        self._stop(done, why)
                    if stopped_early:
                        break
            except BaseException:
                with contextlib.suppress(UserError):  # what ends the run is told, not what failed besides
                    self.checkpoints.wait()  # a save that has begun is not lost
                raise
            finally:
                profiler.close()
                self.report.close()
            self.checkpoints.wait()
        self._finish(done)

    # -- building ---------------------------------------------------------------------------------------------

    def _warn_of_random_parts(self) -> None:
        """A part that is neither trained nor loaded is noise: rarely what was meant."""
        config = self.config
        loaded = {part: encoder.checkpoint for part, encoder in config.encoder_parts.items()}
        loaded |= {"llm": self.assembly.llm_folder}
        leaves = {leaf.part.removesuffix(".lora"): leaf for leaf in self.assembly.structure.leaves.values()}
        for part, leaf in leaves.items():
            if not leaf.is_of(config.update) and not config.init_from and loaded.get(part) is None:
                where = "encoder.checkpoint" if part in config.encoder_parts else "init_from"
                where = "llm.name without llm.scratch" if part == "llm" else where
                print(f"warning: the {part} stays as it is drawn: not in update, and no {where}", file=sys.stderr)

    def _plan(self, dataset: Dataset, rows: int | None = None) -> Plan:
        """The plan of training; with `rows` that of a validation, in steps of so many."""
        data, train, here = self.config.data, self.config.train, distributed.neighbours()
        shown, cache = self.config.log.progress and jax.process_index() == 0, cache_folder() / "index"
        index = dataset.length_index(data.share, data.max_bad_records, cache, shown, data.timeout, here)
        missing = dataset.missing(data.max_bad_records)
        for problem in distributed.gather(missing and missing.parts):
            if problem:
                raise UserError(*problem)
        if jax.process_index() == 0:
            tell_of_cuts("training" if rows is None else "validation", index, data.max_len)
        max_len, pack = (dataset.text.max_len or 1, False) if dataset.samples.alone else (data.max_len, data.pack)
        ways, seed = batch_ways(self.mesh), self.config.seed
        make = functools.partial(Plan, index, max_len=max_len, pack=pack, seed=seed, ways=ways, cache=cache)
        if rows is not None:
            return make(rows=rows, shuffle=False)
        return make(
            rows=train.batch_size, conversations=train.conversations, weights=data.weights,
            micro_batches=self.config.optim.accum_steps,
        )  # fmt: skip

    def _source(self, dataset: Dataset, plan: Plan, steps: int) -> StepSource:
        """This process's parts of the steps."""
        return StepSource(dataset, plan, steps=steps, parts=host_parts(self.mesh))

    def _prepare_validation(self) -> None:
        """The validation part, where the config asks for one and the data have it; says where they have not."""
        self.validation: StepSource | None = None
        train, asked = self.config.train, self.config.ssl.probe
        self.probe = EncoderProbe(self.assembly, self.mesh) if asked else None
        self.better = "probe" if asked else self.assembly.objective.better  # by which validations are judged
        if not (self.config.data.val_fraction > 0 or train.early_stopping or train.eval_every is not None or asked):
            return
        dataset = self.assembly.dataset("val")
        if len(dataset):
            plan = self._plan(dataset, self.plan.usual_rows // self.config.optim.accum_steps)
            self.validation = self._source(dataset, plan, plan.steps_before(1))
            return
        fix = "set data.val_fraction above 0, or give a dataset a split val"
        for key, value in (("train.early_stopping", train.early_stopping and "true"), ("ssl.probe", asked)):
            if value:
                raise UserError(key, f"{value} without validation records", "some to judge by", fix)
        if jax.process_index() == 0:
            print(f"warning: train.eval_every={train.eval_every}: nothing to validate on; {fix}", file=sys.stderr)

    def _build(self) -> None:
        stopping.doing("loading the weights")
        config = self.config
        self.program = train_program(self.assembly, self.mesh, self.total_steps)
        self.step = StepPrograms(self.program.step)
        like, shardings = self.program.state, self.program.shardings
        moved = {*like.trained, *like.statistics}
        self.checkpoints = Checkpoints(self.folder, config.train.keep)
        self.history: dict[str, Any] = {"best_step": None, "best_val_loss": None, "val_losses": [], "bad": []}
        latest = self.checkpoints.find("latest")
        if latest is None:
            arrays = first_arrays(self.assembly, self.folder, shardings, moved)
            self.frozen: Arrays = {n: x for n, x in arrays.items() if n not in moved}
            self.fingerprints = frozen_fingerprints(self.assembly.structure.leaves, self.frozen)
            self._keep_reference(arrays)
            self.state = new_state(arrays, like, self.program.optimizer)
        else:
            weights = TrainedWeights(self.folder, str(latest), self.assembly, checkpoints=self.checkpoints)
            self.frozen = weights.place(shardings, weights.frozen)
            self.fingerprints = frozen_fingerprints(weights.leaves, self.frozen)
            weights.check(self.fingerprints)
            self._restore(latest, weights.meta, like)
        if "reference" in self.assembly.objective.needs:
            kept = SavedArrays(self.folder / run.REFERENCE)
            self.frozen |= kept.place({name: self.program.frozen[name] for name in kept.shapes})
        if config.encoder.cache:
            self._keep_features()
        experience = self.assembly.objective.samples.experience
        self.rollouts = Rollouts(self.assembly, self.mesh, self.folder / "rollouts") if experience else None
        self.rate = learning_rate_multiplier(config.optim, self.total_steps)

    def _keep_reference(self, arrays: Arrays) -> None:
        """Save what is trained as it is before the first step, where the objective will compare with it."""
        prefix = f"{run.REFERENCE}."
        kept = {n: arrays[n.removeprefix(prefix)] for n in self.program.frozen if n.startswith(prefix)}
        if kept and not (self.folder / run.REFERENCE).is_dir():
            save_arrays(self.folder / run.REFERENCE, kept)

    def _keep_features(self) -> None:
        """Have the encoder's outputs on disk in place of the encoder."""
        datasets = [self.dataset, *([] if self.validation is None else [self.validation.dataset])]
        shown = self.config.log.progress and jax.process_index() == 0
        recordings = itertools.chain.from_iterable(dataset.recordings() for dataset in datasets)
        features = keep_features(self.assembly, self.frozen, recordings, self.mesh, cache_folder(), shown)
        for dataset in datasets:
            dataset.signal = replace(dataset.signal, features=features)
        self.frozen = {name: self.frozen[name] for name in self.program.frozen}

    def _restore(self, step: int, meta: Mapping[str, Any], like: TrainState) -> None:
        run.check_data(str(self.folder), meta, self.dataset.fingerprint, self.config.data)
        self.history = meta["history"]
        count = jax.device_put(np.asarray(step, np.int32), like.step.sharding)
        self.state = TrainState(step=count, **self.checkpoints.restore(step, like.items))

    # -- one step ---------------------------------------------------------------------------------------------

    def _steps(
        self, source: StepSource, first: int, workers: int = 0, what: str = "step", arrays: Arrays | None = None
    ) -> Iterator[Loaded]:
        """Steps from `first` on; what the model makes of them it makes with `arrays` (None: what it has then)."""
        if self.rollouts is not None:
            steps = self.rollouts.steps(source, first, lambda: self._arrays if arrays is None else arrays)
        else:
            steps = steps_from(source, first, workers, self.config.data.timeout)
        return stopping.each(steps, what, first)

    @property
    def _arrays(self) -> Arrays:
        return {**self.frozen, **self.state.trained, **self.state.statistics}

    def _advance(self, loaded: Loaded) -> dict[str, Any] | None:
        """Take one step; validate, and log, where it is time. Returns the logged line, if any."""
        self.health.note(loaded.step + 1, loaded.bad)
        arguments = self.state, self.frozen, self._on_devices(loaded.batch)
        if not self.step.has(arguments[2]):
            with self.report.paused("compiling"), jax.transfer_guard("allow"):
                seconds = self.step.compile(*arguments)
            self.report.compiled(loaded.step + 1, arguments[2], seconds)
        began = time.perf_counter()
        self.state, metrics = self.step(*arguments)
        done = loaded.step + 1
        self.report.took(loaded, metrics, began)
        self.health.took(done, metrics)
        train = self.config.train
        validates = self.validation is not None and self._due(done, train.eval_every or train.save_every)
        if not validates and not self._due(done, train.log_every):
            return None
        with jax.transfer_guard("allow"):
            return self._log(loaded, validates)

    def _log(self, loaded: Loaded, validates: bool) -> dict[str, Any]:
        done, optim = loaded.step + 1, self.config.optim
        peak = optim.lr * batch_scale(optim, self.config.train)
        line = self.report.line(loaded, lambda updates: peak * float(self.rate(updates)))
        if validates:
            with self.report.paused("validating"):
                line |= self._validate(done)
        self.report.write(line)
        self.health.check()
        return line

    def _on_devices(self, batch: Batch) -> Batch:
        sharding = batch_sharding(self.mesh)

        def place(x: Any) -> jax.Array:  # what was made there is there
            return x if isinstance(x, jax.Array) else to_device(self.mesh, x, sharding, row_axis=1)

        return jax.tree.map(place, batch)

    # -- now and then -----------------------------------------------------------------------------------------

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.total_steps

    def _validate(self, done: int) -> dict[str, float]:
        """The objective's numbers on the validation part, in evaluation mode; remembers the best loss."""
        assert self.validation is not None
        arrays = {**self._arrays, **(self.state.average if self.config.eval.ema else {})}
        sharding = batch_sharding(self.mesh, micro_batches=False)

        def first(x: Any) -> jax.Array:
            return x[0] if isinstance(x, jax.Array) else to_device(self.mesh, x[0], sharding, row_axis=0)

        total, count, shown = Counter[str](), Counter[str](), None
        for loaded in self._steps(self.validation, 0, what="batch", arrays=arrays):
            self.health.note(done, loaded.bad)
            batch = jax.tree.map(first, loaded.batch)
            shown = batch if shown is None else shown
            for whole, part in zip((total, count), jax.device_get(self.program.eval_step(arrays, batch)), strict=True):
                whole.update({name: float(x) for name, x in part.items()})
        means = {f"val_{name}": total[name] / max(count[name], 1.0) for name in count}
        if self.probe is not None:
            means["val_probe"] = self.probe(arrays)
        better, best = self.better, self.history["best_val_loss"]
        loss = -means[f"val_{better}"] if better else means["val_loss"]  # what the history calls so
        self.history["val_losses"].append(loss)
        if math.isfinite(loss) and (best is None or loss < best):
            self.history |= {"best_val_loss": loss, "best_step": done}
        if self.program.redraw is not None and shown is not None:
            made = jax.device_get(self.program.redraw(arrays, shown, jax.random.key(self.config.seed)))
            means |= self.report.redrawn(self.folder, done, self.assembly, made)
        return means

    def _stops_early(self) -> bool:
        """Whether none of the last `patience` validations beat the best before them by `patience_delta`. What is not
        finite beats nothing, and is beaten."""
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.history["val_losses"]]
        patience = self.config.train.patience
        if not self.config.train.early_stopping or len(losses) <= patience:
            return False
        return min(losses[-patience:]) > min(losses[:-patience]) - self.config.train.patience_delta

    def _save(self, done: int) -> None:
        with self.report.paused(), jax.transfer_guard("allow"):
            self.health.check()
            ids = {part: encoder.checkpoint for part, encoder in self.config.encoder_parts.items()}
            ids |= {"llm": self.config.llm.name}
            frozen = {"frozen": self.fingerprints, "frozen_ids": {c: ids.get(c) for c in self.fingerprints}}
            meta = {**frozen, **run.data_facts(self.dataset.fingerprint), "history": self.history}
            self.checkpoints.save(done, self.state.items, meta, self.history["best_step"])
            if self.config.train.save_wait:
                self.checkpoints.wait()

    def _announce(self, first: int) -> None:
        epoch, (conversations, supervised) = self.plan.steps_before(1) * self.source.updates, self.plan.averages()
        self.report.event(
            "resume" if first else "start", first, mfu_formula=telemetry.MFU_FORMULA, steps_per_epoch=epoch,
            rows_per_step=self.plan.usual_rows, conversations_per_step=round(conversations, 3),
            supervised_tokens_per_step=round(supervised, 3),
        )  # fmt: skip
        self.report.event("attention", first, **dataclasses.asdict(self.attention))
        self.report.event("truncated", first, max_len=self.config.data.max_len, **self.plan.index.cuts)
        trained, frozen = (sum(x.size for x in each.values()) for each in (self.state.trained, self.frozen))
        kept, samples = self.dataset.signal.features, self.dataset.samples
        tokens = "" if samples.alone else f"with {supervised:,.1f} supervised tokens, "
        if jax.process_index() == 0:
            tell(self.attention)
            print(
                f"{self.folder}: {trained:,} parameters trained, {frozen:,} frozen; "
                f"{'' if kept is None else f'the encoder in its outputs in {kept.folder}; '}"
                f"{len(self.dataset):,} {samples.unit};"
                f" a step has {conversations:,.1f} of them on average, {tokens}in"
                f" {self.plan.usual_rows:,} rows; {epoch:,} steps an epoch;"
                f" steps {first} to {self.total_steps}; {self.mesh.size} {self.mesh.devices.flat[0].device_kind} as"
                f" {dict(self.mesh.shape)}",
                file=sys.stderr,
            )

    def _stop(self, done: int, why: str) -> None:
        """Leave when the checkpoint of step `done` is verified."""
        self.report.summary("stop", done)
        self.checkpoints.wait()
        if jax.process_index() == 0:
            print(f"stopped after step {done} by {why}; run the same command to go on", file=sys.stderr)
        raise SystemExit(stopping.STOPPED)

    def _finish(self, done: int) -> None:
        stopping.doing("finishing")
        keep_adapter(self.folder, self.assembly, self.state.trained, self.mesh)
        self.report.finish(self.folder, done, self.history, self.better)
        if jax.process_index() == 0:
            run.write_done(self.folder, done, self.total_steps)
        self.checkpoints.close()
