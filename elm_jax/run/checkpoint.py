"""Checkpoints of a run: what is trained, the optimizer, and a JSON of what belongs to the step.

`checkpoints/<step>/` holds the items `trained`, `statistics` (running statistics that move), `optimizer`, `average`
(with `optim.ema`, of what is trained) and `meta`. Frozen parts are not saved: `meta` holds a fingerprint of them, so
that a resume on other weights is refused.

A checkpoint counts when it is verified: read back after it was written, found equal to what was on the devices, and
its files listed with their checksums (`run.verification`). Whoever reads takes the newest that still is as it was.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AsyncOptions

from elm_jax import stopping
from elm_jax.errors import UserError, printable
from elm_jax.folders import read_json, seal, sealed, writable_folder
from elm_jax.run import verification
from elm_jax.run.arrays import named, said, sums_of
from elm_jax.runtime import distributed

AVERAGE = "average"
MODEL_ITEMS = ("trained", "statistics", AVERAGE)  # flat dictionaries of the model's arrays
ITEMS = (*MODEL_ITEMS, "optimizer")
META = "meta/metadata"  # the JSON's file
DAMAGED = "damaged"  # folder beside `checkpoints` of what was in the way when training went back
_TEMPORARY = ".orbax-checkpoint-tmp"  # behind a step: being written, or removed
_GONE, _EMPTY = "is gone", "its folder is empty"
LISTING_SECONDS = 60  # in which a folder that one host has made is seen by all


class Checkpoints:
    """The checkpoints of one run folder; saving and verifying are asynchronous.

    Args:
        folder: the run's folder.
        count: how many of the latest are kept, the best aside.
        read_only: for the model's arrays alone, and nothing in the folder is changed. Who writes must be the only one.
    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, count: int = 1, read_only: bool = False) -> None:
        _keep_orbax_quiet()
        self.folder, self.read_only = folder / "checkpoints", read_only
        self._items = MODEL_ITEMS if read_only else ITEMS
        self._count = count
        self._problems: dict[int, str] = {}  # what is wrong with each step that was looked at
        self._last: int | None = None  # the newest step that is known to be whole
        self._verifying: threading.Thread | None = None
        self._failure: UserError | None = None
        self._begun = time.monotonic()
        if not read_only:
            writable_folder(self.folder, str(self.folder))
            if jax.process_index() == 0:
                for left in self.folder.glob(f"*{_TEMPORARY}*"):  # by one that was killed
                    shutil.rmtree(left, ignore_errors=True)
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        self._library = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**handlers, meta=ocp.JsonCheckpointHandler()),
            # Else threads that wait for a folder keep the process alive where it cannot be made.
            async_options=AsyncOptions(create_directories_asynchronously=False),
        )

    def save(
        self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any], best: int | None = None
    ) -> None:
        """Begin to save trees of arrays under names of ITEMS; returns once they are copied from the devices.

        `meta` is a JSON object; `best` is the best step so far, whose checkpoint is kept.

        Raises:
            UserError: this one cannot be begun, or the one before it failed, as in `wait`.
        """
        self.wait()
        self._begun = time.monotonic()
        saves: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree}
        names = {name: sorted(items[name]) for name in MODEL_ITEMS if items.get(name)}
        sums = sums_of(items)
        facts = seal({**meta, "step": step, "best_step": best, "arrays": names, "sums": sums})
        saves["meta"] = ocp.args.JsonSave(copy.deepcopy(facts))  # written later, when the caller's has changed
        with self._failing(step):
            if jax.process_index() == 0 and self._path(step).exists():
                self._move_aside(step)
            self._library.save(self._path(step).absolute(), args=ocp.args.Composite(**saves))
        self._verifying = threading.Thread(
            target=self._complete, args=(step, sums, best), name=f"verify checkpoint {step}", daemon=True
        )
        self._verifying.start()

    @property
    def age(self) -> float:
        """Minutes since a save was begun, or since the folder was opened."""
        return (time.monotonic() - self._begun) / 60

    def _complete(self, step: int, sums: Mapping[str, str], best: int | None) -> None:
        """In a thread of its own: wait until the step is on disk, verify it, and remove what need not be kept."""
        stopping.doing(f"saving checkpoint {step}")
        try:
            with self._failing(step):
                problem = ""
                try:
                    self._library.wait_until_finished()
                    own = verification.own_checksums(self._path(step))  # first: they will tell of what changes later
                    problem = verification.wrong_array(self._path(step), sums)  # then: earlier ones show here
                    if not problem:
                        verification.write_list(self._path(step), own)
                except Exception as error:
                    problem = said(error)
                    raise
                finally:
                    problems = distributed.exchange(f"{self._path(step)}", problem)
                if problem := verification.first(problems):
                    raise ValueError(problem)
            self._problems[step], self._last = "", step
            if jax.process_index() == 0:
                self._remove_old(step, best)
        except UserError as error:
            self._failure = error
        finally:
            stopping.forget()

    @contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Whatever goes wrong while a step is saved, as one error that says what is left."""
        try:
            yield
        except Exception as error:
            last = "no earlier one was made" if self._last is None else f"the checkpoint of step {self._last} is whole"
            raise UserError(
                str(self._path(step)), f"a checkpoint that could not be saved: {said(error)}",
                "a disk with room that keeps what it is given", f"make room and run the same command again; {last}",
            ) from error  # fmt: skip

    def wait(self) -> None:
        """Until what was begun is on disk and verified.

        Raises:
            UserError: it could not be written, or does not come back as it was saved. The one before it is kept.
        """
        if self._verifying is not None:
            self._verifying.join()
            self._verifying = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """As `wait`, for the last time."""
        try:
            self.wait()
        finally:
            with suppress(OSError):  # it says again what `wait` has told
                self._library.close()

    def _remove_old(self, verified: int, best: int | None) -> None:
        """Keep the latest up to the one that was `verified` just now, and the best."""
        steps = [step for step in self._steps() if step <= verified]
        for step in steps[self._count :]:
            if step != best:
                gone = self._path(step).with_name(f"{step}{_TEMPORARY}")  # whoever stops us leaves no half of it
                with suppress(OSError):  # it stays, then, and the next save tries again
                    self._path(step).rename(gone)
                    shutil.rmtree(gone)

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _steps(self) -> list[int]:
        """Steps that have a folder, the newest first. Empty ones count for nothing, but of the newest must be told."""
        names = [path.name for path in self.folder.glob("*") if path.name.isdecimal() and os.path.isdir(path)]
        steps = sorted((int(name) for name in names if str(int(name)) == name), reverse=True)
        return [step for step in steps if step == steps[0] or _without_files(self._path(step)) != _EMPTY]

    # -- reading --------------------------------------------------------------------------------------------------

    def find(self, which: str = "latest") -> int | None:
        """The step of `latest`, `best` (else latest) or a number; None where the run has none.

        Where the first that comes into question is damaged, the next older one is taken, and that is said; who writes
        moves the damaged newer ones aside. All processes call it together.

        Raises:
            UserError: no checkpoint of that step, or a damaged one; or none that is whole.
        """
        self.wait()
        steps, best = distributed.gather((self._steps(), self._best() if which == "best" else None))[0]
        if not steps:
            return None
        order = steps
        if which == "best":
            order = [*(step for step in steps if step == best), *(step for step in steps if step != best)]
        elif which != "latest":
            order = [step for step in steps if which.isdecimal() and step == int(which)]
            if not order:
                raise UserError(
                    "--step", repr(which), f"latest, best or one of {sorted(steps)}", "name one of these"
                )
        damaged: dict[int, str] = {}
        for step in order:
            problem = self._problem(step)
            if problem == _GONE:
                self._wait_for(step)
                return self.find(which)
            if not problem:
                self._go_back(damaged, step)
                return step
            damaged[step] = problem
        fix = "name another step, or put it back from a copy"
        if not which.isdecimal():
            fix = "put one back from a copy, or remove them all to begin anew"
        raise UserError(str(self.folder), _told(damaged), "a whole checkpoint", fix)

    def _wait_for(self, step: int) -> None:
        """Until all processes see a step, or process 0 does not: the run itself, which goes on, has removed it then,
        and there is a newer one now. Raises UserError where one that process 0 sees does not come."""
        del self._problems[step]
        for _ in range(LISTING_SECONDS):
            seen = distributed.gather(os.path.isdir(self._path(step)))
            if all(seen) or not seen[0]:
                return
            time.sleep(1.0)
        raise UserError(
            str(self.folder), f"checkpoint {step}, which process {seen.index(False)} does not see",
            "a workdir that all processes share", "put it on a file system that all hosts have",
        )  # fmt: skip

    def _problem(self, step: int) -> str:
        """What is wrong with a step; empty if nothing."""
        if step not in self._problems:
            self._problems[step] = self._verify(step)
        if not self._problems[step]:
            self._last = max(step, self._last or step)
        return self._problems[step]

    def _verify(self, step: int) -> str:
        path = self._path(step)
        try:
            problem, own = self._look_into(step)
        except OSError as error:
            problem, own = said(error), {}
        problem = verification.first(distributed.gather(problem if not problem or os.path.isdir(path) else _GONE))
        if own and not problem:
            verification.write_list(path, own)
        return problem

    def _look_into(self, step: int) -> tuple[str, dict[str, list[Any]]]:
        """What is wrong by the lists of its files; by its arrays, where the run ended before these were written: then
        with what this process is to list, where it writes."""
        path = self._path(step)
        if problem := _without_files(path):
            return problem, {}
        if files := verification.listed(path):
            left_out = {*ITEMS} - {*self._items}
            mine = {name: facts for name, facts in files.items() if name.partition("/")[0] not in left_out}
            return verification.wrong_file(path, mine), {}
        own = {} if self.read_only else verification.own_checksums(path)
        return self._wrong_value(step), own

    def _wrong_value(self, step: int) -> str:
        try:
            meta = self.meta(step)
        except UserError as error:
            return f"{META}: {error.found}"
        if _has_sums(meta):
            mine = {name: value for name, value in meta["sums"].items() if name.partition("/")[0] in self._items}
            return verification.wrong_array(self._path(step), mine) or verification.wrong_layout(self._path(step), mine)
        if jax.process_index() == 0:
            old = f"{self._path(step)} was saved by a version that kept no checksums: it cannot be verified"
            print(printable(old), file=sys.stderr)
        return verification.unreadable(self._path(step), self._items)

    def _best(self) -> int | None:
        """The best step, as the newest checkpoint whose JSON can be read knows it."""
        for step in self._steps():
            try:
                return self.meta(step).get("best_step")
            except UserError:
                continue
        return None

    def _go_back(self, damaged: Mapping[int, str], step: int) -> None:
        """Say that `step` is taken in place of the damaged ones; who writes moves newer ones out of the way."""
        if not damaged or jax.process_index() > 0:
            return
        print(printable(f"warning: {self.folder}: {_told(damaged)}; step {step} is taken"), file=sys.stderr)
        for newer in damaged:
            if newer > step and not self.read_only:
                self._move_aside(newer)

    def _move_aside(self, step: int) -> None:
        """What stands where a checkpoint will be written."""
        place = self.folder.parent / DAMAGED
        place.mkdir(exist_ok=True)
        free = next(path for n in range(10**6) if not (path := place / (f"{step}.{n}" if n else f"{step}")).exists())
        self._path(step).rename(free)
        print(printable(f"{self._path(step)} is now {free}"), file=sys.stderr)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step. Raises UserError where it is damaged."""
        path = self._path(step) / META
        facts = read_json(path)
        if _has_sums(facts) and not sealed(facts):
            raise UserError(str(path), "other content than was written", "what was saved", "put it back from a copy")
        return facts

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """The items of a step, laid out as `like` (arrays, or ShapeDtypeStructs with shardings) are.

        Raises:
            UserError: the saved trees have other names or shapes.
        """
        args = {
            n: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for n, tree in like.items() if tree
        }
        with named(self._path(step)):
            restored = self._library.restore(self._path(step).absolute(), args=ocp.args.Composite(**args))
        return {name: restored[name] if tree else tree for name, tree in like.items()}

    def items(self, step: int, average: bool = False) -> dict[str, Path]:
        """The name of each of the model's arrays that a step has -> the folder of its `SavedArrays`; `average`: of what
        is trained its average. Raises UserError where the step has none."""
        names = self.meta(step)["arrays"]
        if average and AVERAGE not in names:
            found, fix = f"true for {self._path(step)}, a checkpoint without an average", "leave --config.eval.ema out"
            raise UserError("eval.ema", found, "a run that averages its weights: optim.ema above 0", fix)
        chosen = [item for item in names if item != AVERAGE] + [AVERAGE] * average
        return {name: self._path(step) / item for item in chosen for name in names[item]}


def _without_files(folder: Path) -> str:
    """Why nothing can be read in a folder; empty if something may be."""
    try:
        return "" if any(folder.iterdir()) else _EMPTY
    except OSError as error:
        return f"its folder cannot be listed: {error.strerror}"


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=x.sharding)


def _has_sums(meta: Mapping[str, Any]) -> bool:
    """Whether a version made it that keeps checksums."""
    return bool({"sums", "checksum"} & meta.keys())


def _told(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"checkpoint {step} is damaged ({problem})" for step, problem in damaged.items())


def _keep_orbax_quiet() -> None:
    """It reports each file, tells what it raises with pages of stack, and leaves loops closed that are called later."""
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_its_tasks)
    before = sys.unraisablehook
    if getattr(before, "__name__", "") != _quiet_hook.__name__:
        sys.unraisablehook = functools.update_wrapper(functools.partial(_quiet_hook, before), _quiet_hook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_of_its_tasks(record: logging.LogRecord) -> bool:
    """Of a save that fails in several places at once one error is raised, and the others are told here."""
    message = record.getMessage()
    return "exception was never retrieved" not in message or "orbax" not in message


def _quiet_hook(before: Callable[[Any], Any], found: Any) -> None:
    if str(found.exc_value) != "Event loop is closed":
        before(found)
