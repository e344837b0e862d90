"""What goes wrong in a run without ending it: records that cannot be read, steps that are skipped, spikes.

All of it is named in metrics.jsonl; too much of it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from elm_jax.config import Config
from elm_jax.data.loader import BadRecord, StepSource, unusable
from elm_jax.errors import UserError
from elm_jax.models.functional import Arrays
from elm_jax.runtime import distributed
from elm_jax.runtime.mesh import replicated
from elm_jax.training.report import Report
from elm_jax.training.spikes import TOLD, Recent

SKIPPED_LIMIT = 10  # steps in a row that are skipped, after which the run stops
SHOWN = 3  # names in a sentence
READ = ("loss", "grad_norm", "finite", "taken")  # of what a step leaves on the devices
REASONS = {
    "non_finite": "its loss or gradients are not finite",
    "spike": "its loss or gradients are far above the usual",
}


class Health:
    """Of one start of a run, from its step `first` on. Process 0 tells; all processes find the same.

    Nothing is read from the devices but in `check`, and which samples a skipped step has is told by the plan.

    Args:
        source: the steps; bad: ids of the records that were named before, to which others are added.
        arrays: what the model has now.
    """

    def __init__(
        self, config: Config, report: Report, source: StepSource, first: int, bad: list[str], mesh: Mesh,
        arrays: Callable[[], Arrays],
    ) -> None:  # fmt: skip
        self._config, self._report, self._source, self._mesh, self._arrays = config, report, source, mesh, arrays
        self._bad, self._found = bad, list[dict[str, Any]]()  # records named, and not yet
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []  # taken, and not yet looked at
        self._skipped, self._limit = 0, min(SKIPPED_LIMIT, len(source) * source.updates - first)  # in a row
        self._recent, self._told = Recent.none(np), set[str]()
        self.note(first, unusable(source.dataset, source.plan.index))
        self.check()

    def note(self, step: int, found: Iterable[BadRecord]) -> None:
        """Records of a step, counted from 1, that this process could not read."""
        self._found += [{"step": step, "id": bad.id, "error": bad.error} for bad in found]

    def took(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step, counted from 1, was given to the devices, where it leaves its metrics."""
        self._steps.append((step, {name: metrics[name] for name in READ}))

    def check(self) -> None:
        """Tell of what was noted and taken since the last call. Waits for the steps; all processes call it together.

        Raises:
            UserError: more records are bad than data.max_bad_records allows; SKIPPED_LIMIT steps in a row (all steps
                of a shorter run) were skipped; or one was, and the weights themselves are not finite.
        """
        self._name_records([bad for part in distributed.gather(self._found) for bad in part])
        steps, self._found, self._steps = self._steps, [], []
        for (step, _), values in zip(steps, jax.device_get([metrics for _, metrics in steps]), strict=True):
            self._look(step, **values)

    def _name_records(self, found: Iterable[dict[str, Any]]) -> None:
        """Name each bad record once, whichever process met it; stop when there are too many."""
        allowed = self._config.data.max_bad_records * len(self._source.dataset)
        for bad in found:
            if bad["id"] in self._bad:
                continue
            self._bad.append(bad["id"])
            self._report.event("bad_record", **bad)
            if len(self._bad) > allowed:
                raise UserError(
                    f"record {bad['id']}", bad["error"],
                    f"at most {allowed:g} unreadable records (data.max_bad_records)",
                    "mend the data, or raise data.max_bad_records",
                )  # fmt: skip

    def _look(self, step: int, loss: Any, grad_norm: Any, finite: Any, taken: Any) -> None:
        spike, usual, skips = False, None, self._config.optim.skip_spikes
        if finite:
            known = bool(self._recent.seen)
            above, means, self._recent = self._recent.judge(np.stack([loss, grad_norm]), skips or TOLD, np)
            spike, usual = not taken if skips else above, means if known else None
        self._skipped = 0 if taken else self._skipped + 1
        if finite and not spike:
            return
        reason, samples = "spike" if finite else "non_finite", self._samples(step)
        records = [self._source.dataset.records[i] for i in samples]
        level = {} if usual is None else {"usual_loss": float(usual[0]), "usual_grad_norm": float(usual[1])}
        self._report.event(
            reason, step, skipped=not taken, steps_in_a_row=self._skipped, loss=float(loss), grad_norm=float(grad_norm),
            **level, samples=[record.id for record in records],
            recordings=list(dict.fromkeys(path for record in records for path in record.ecg_paths)),
        )  # fmt: skip
        if not taken and reason not in self._told:
            self._told.add(reason)
            self._report.warn(
                f"step {step} is skipped: {REASONS[reason]} (samples {_few([r.id for r in records])}); others like it "
                "are named in metrics.jsonl alone"
            )
            self._check_weights()
        if self._skipped >= self._limit:
            raise UserError(
                "optim.lr", f"{self._skipped} steps in a row skipped, last step {step}: {REASONS[reason]}",
                "a loss that stays finite and near the usual",
                "lower optim.lr, set optim.grad_clip, or use float32; metrics.jsonl names the samples",
            )  # fmt: skip

    def _samples(self, step: int) -> list[int]:
        """The samples of a step, as the plan has them on all hosts together."""
        rows = self._source.plan.rows((step - 1) // self._source.updates)
        return [sample for row in rows for group in row for sample in group.samples]

    def _check_weights(self) -> None:
        """Stop where the weights themselves are not finite: no step will be, since skipped ones do not change them."""
        finite = jax.jit(
            lambda arrays: {name: jnp.isfinite(x).all() for name, x in arrays.items()},
            out_shardings=replicated(self._mesh),
        )(self._arrays())  # fmt: skip
        wrong = [name for name, good in jax.device_get(finite).items() if not good]
        if wrong:
            raise UserError(
                "weights", f"values that are not finite in {_few(wrong)}", "finite numbers",
                "start from other weights (init_from, llm.name, encoder.checkpoint); if this run made them so, lower "
                "optim.lr",
            )  # fmt: skip


def _few(names: list[str]) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
