"""What a run tells of its steps: how long they took, where the time went, and what came to pass in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from elm_jax.config import MeshConfig, resolve
from elm_jax.data.batch import ArraySpec, BatchShape, empty_batch
from elm_jax.data.loader import Loaded
from elm_jax.runtime import telemetry
from elm_jax.runtime.mesh import make_mesh
from elm_jax.runtime.telemetry import StepClock
from elm_jax.training import report as report_module
from elm_jax.training.report import Report, Tally

ROWS, TOKENS, REAL = 2, 16, 24  # of 32 slots


class Clock:
    """Stands for the module time: it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(telemetry, "time", made)
    monkeypatch.setattr(report_module, "time", made)
    return made


class Result:
    """Stands for an array that is ready at `at`."""

    def __init__(self, clock: Clock, at: float, fails: bool = False) -> None:
        self.clock, self.at, self.fails = clock, at, fails

    def block_until_ready(self) -> None:
        self.clock.now = max(self.clock.now, self.at)
        if self.fails:
            raise RuntimeError("the device is gone")


def test_a_step_counts_from_the_end_of_the_one_before_it(clock: Clock) -> None:
    """Three are handed over at once; the fourth after a pause in which the devices had nothing to do."""
    steps, now = StepClock(), clock.now
    for seconds in (0.1, 0.2, 0.25):
        steps.step(now, Result(clock, now + seconds))
    steps.step(now + 0.35, Result(clock, now + 0.45))
    seconds, idle = steps.lap()
    np.testing.assert_allclose(seconds, [0.1, 0.1, 0.05, 0.1])
    assert idle == pytest.approx(0.1)
    assert steps.lap() == ([], 0.0)
    steps.close()


def test_a_step_that_fails_does_not_stop_the_clock(clock: Clock) -> None:
    steps, now = StepClock(), clock.now
    steps.step(now, Result(clock, now, fails=True))
    steps.step(now, Result(clock, now + 0.05))
    assert len(steps.lap()[0]) == 1
    steps.close()


def test_what_is_skipped_is_no_idling(clock: Clock) -> None:
    steps = StepClock()
    clock.sleep(0.5)  # the first batch is loaded
    steps.step(clock.now, Result(clock, clock.now + 0.1))
    steps.wait()
    clock.sleep(0.1)
    clock.sleep(3.0)  # a checkpoint
    steps.skip(3.0)
    clock.sleep(0.1)
    steps.step(clock.now, Result(clock, clock.now + 0.1))
    assert steps.lap()[1] == pytest.approx(0.7)
    steps.close()


def loaded(step: int) -> Loaded:
    batch = empty_batch(BatchShape(TOKENS, 1, 4), ArraySpec((3, 8)), 1, ROWS)
    return Loaded(step, batch, conversations=3, attention_pairs=50, bad=(), truncated=2)


def metrics(finite: bool = True) -> dict[str, jax.Array]:
    values: dict[str, Any] = {"loss": 1.5, "grad_norm": 0.5, "finite": finite, "tokens": REAL, "supervised_tokens": 6,
                              "recordings": 2, "updates": 7, "others": {}}  # fmt: skip
    return jax.tree.map(lambda value: jax.device_put(np.asarray(value)), values)


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Report]:
    config = resolve({"log": {"progress": False}})
    made = Report(tmp_path, config, make_mesh(MeshConfig(), jax.devices()[:1]), lambda *n: float(sum(n)), 0, 10)
    yield made
    made.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rates_are_of_all_steps_since_the_last_line(report: Report, clock: Clock) -> None:
    for step in range(4):
        report.took(loaded(step), metrics(finite=step != 1), clock.now)
    clock.sleep(0.5)
    line = report.line(loaded(3), lambda updates: 0.1 * updates)
    for name, amount in {"tokens": REAL, "supervised_tokens": 6, "padded_tokens": ROWS * TOKENS,
                         "conversations": 3}.items():  # fmt: skip
        assert line[f"{name}_per_s"] == pytest.approx(4 * amount / 0.5), name
    assert line["step_ms"] == 125 and 0 <= line["step_ms_p50"] <= line["step_ms_p95"]
    assert line["padding_fraction"] == 0.25 and (line["tokens"], line["supervised_tokens"]) == (REAL, 6)


def test_cut_conversations_are_counted_since_the_last_line(report: Report, clock: Clock) -> None:
    for step in range(5):
        report.took(loaded(step), metrics(), clock.now)
        if step in (2, 4):
            assert report.line(loaded(step), float)["truncated"] == {2: 6, 4: 4}[step]


def test_the_devices_wait_for_the_host_is_a_share_of_the_time(report: Report, clock: Clock) -> None:
    for step in range(2):
        clock.sleep(0.1)  # the loader, while the devices have nothing to do
        report.took(loaded(step), metrics(), clock.now)
        report._clock.step(clock.now, Result(clock, clock.now + 0.3))
        report._clock.wait()
    line = report.line(loaded(1), float)
    assert line["host_wait_share"] == pytest.approx(0.25)


def test_a_pause_is_no_part_of_the_time(report: Report, clock: Clock) -> None:
    with report.paused():
        clock.sleep(3.0)
    report.took(loaded(0), metrics(), clock.now)
    clock.sleep(0.1)
    assert report.line(loaded(0), float)["step_ms"] == pytest.approx(100)


def test_compilations_are_counted_and_named_by_shape(report: Report, tmp_path: Path) -> None:
    report.compiled(1, loaded(0).batch, 2.0)
    report.compiled(5, loaded(4).batch, 1.0)
    report.summary("finish", 5)
    first, second, finish = lines(tmp_path)
    shape = {"micro_batches": 1, "rows": ROWS, "tokens": TOKENS, "signals": 1, "targets": 4, "key_blocks": 0}
    assert first == {"event": "compile", "step": 1, "shape": shape, "seconds": 2.0, "count": 1}
    assert (second["step"], second["count"]) == (5, 2)
    assert (finish["compile_seconds"], finish["compile_count"]) == (3.0, 2)


def test_the_summary_adds_the_lines_up(report: Report, tmp_path: Path, clock: Clock) -> None:
    for step in range(3):
        report.took(loaded(step), metrics(), clock.now)
        clock.sleep(0.2)
        report.write(report.line(loaded(step), float))
    clock.sleep(1.0)
    report.summary("finish", 3)
    *_, finish = lines(tmp_path)
    assert (finish["event"], finish["step"], finish["steps"]) == ("finish", 3, 3)
    assert (finish["tokens"], finish["supervised_tokens"], finish["conversations"]) == (3 * REAL, 18, 9)
    assert (finish["train_seconds"], finish["seconds"]) == pytest.approx((0.6, 1.6))
    assert finish["step_ms"] == pytest.approx(200) and finish["padding_fraction"] == 0.25


def test_mfu_is_work_by_time_and_peak() -> None:
    tally = Tally(steps=2, tokens=100, supervised=10, pairs=50, seconds=2.0)
    assert tally.rates(lambda *n: float(sum(n)), 1000.0)["mfu"] == pytest.approx(160 / 2 / 1000)
    assert tally.rates(lambda *n: float(sum(n)), None)["mfu"] is None
