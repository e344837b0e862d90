"""From the plan to batches: any number of hosts, workers and micro-batches reads the same rows."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import chat_tokenizer

from elm_jax.config import DataConfig
from elm_jax.data import readers
from elm_jax.data.batch import ArraySpec, Batch, BatchShape, Conversation, Group, collate
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.loader import Loaded, StepSource, unusable
from elm_jax.data.packing import LengthIndex
from elm_jax.data.plan import Plan
from elm_jax.data.readers import Reading, steps_from
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.errors import Absent, UserError
from elm_jax.models.attention import packed_mask

ROOT = Path(__file__).parents[2]
N, SIGNAL_SHAPE = 3, (2, 5)
SIGNAL_LAYOUT = ArraySpec(SIGNAL_SHAPE)


# -- laying out rows ------------------------------------------------------------------------------------------


@st.composite
def rows_of_groups(draw: st.DrawFn) -> list[list[Group]]:
    """Rows of groups: conversations behind a prefix that may end before, between or after their ECGs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = 0

    def conversation(
        prefix: np.ndarray, signals: list[np.ndarray], starts: list[int], more: int, bad: bool
    ) -> Conversation:
        nonlocal count
        own = rng.integers(10, 99, int(rng.integers(1, 6)) + more * N)
        ids = np.concatenate([prefix, own, rng.integers(10, 99, 3)]).astype(np.int32)
        places = [*starts, *(len(prefix) + N * e for e in range(more))]
        supervised = np.zeros(len(ids), bool)
        supervised[-3:] = rng.random(3) < 0.6
        supervised[-1] = True
        if len(prefix) and rng.random() < 0.5 and not more:
            supervised[len(prefix)] = True  # predicted by the last token of the prefix
        loaded = [*signals, *(rng.random(SIGNAL_SHAPE).astype(np.float32) for _ in range(more))]
        count += 1
        positions = np.array([[p + n for n in range(N)] for p in places], np.int32).reshape(-1, N)
        return Conversation(count - 1, ids, supervised, positions, None if bad else loaded)

    def group() -> Group:
        bad = bool(rng.random() < 0.2)  # who shares a recording shares that it cannot be read
        if rng.random() < 0.4:
            return Group(0, [conversation(np.zeros(0, np.int32), [], [], int(rng.integers(0, 3)), bad)])
        shared = int(rng.integers(0, 3))
        prefix = rng.integers(10, 99, 2 + N * shared).astype(np.int32)
        signals = [rng.random(SIGNAL_SHAPE).astype(np.float32) for _ in range(shared)]
        starts = [2 + N * e for e in range(shared)]
        branches = int(rng.integers(1, 4))
        more = int(rng.integers(0, 2))
        return Group(len(prefix), [conversation(prefix, signals, starts, more, bad) for _ in range(branches)])

    return [[group() for _ in range(draw(st.integers(0, 3)))] for _ in range(draw(st.integers(1, 3)))]


SHAPE = BatchShape(tokens=160, signals=24, targets=48)


def conversations(row: list[Group]) -> list[tuple[int, int, Group, Conversation]]:
    """(group number, branch number, group, conversation) in the order of the row."""
    return [
        (g, b if group.prefix else 0, group, conversation)
        for g, group in enumerate(row, start=1)
        for b, conversation in enumerate(group.conversations, start=1)
    ]


def places_of(batch: Batch, r: int, group: int, branch: int) -> np.ndarray:
    """Where in the row a conversation's tokens stand: the group's prefix, then its branch."""
    mine = (batch.group_ids[r] == group) & np.isin(batch.branch_ids[r], (0, branch))
    return np.flatnonzero(mine)


@given(rows_of_groups())
def test_blocks_of_keys_are_those_that_the_mask_lets_through(rows: list[list[Group]]) -> None:
    with mock.patch("elm_jax.data.batch.BLOCK", 16):
        batch = collate(rows, replace(SHAPE, key_blocks=10), SIGNAL_LAYOUT)
    mask = np.array(packed_mask(batch.group_ids, batch.branch_ids))[:, 0]
    mask &= (batch.group_ids > 0)[:, :, None]
    expected = mask.reshape(len(rows), 10, 16, 10, 16).any((2, 4))
    for row, blocks in zip(expected, batch.key_blocks, strict=True):
        for seen, named in zip(row, blocks, strict=True):
            assert [*np.flatnonzero(seen), *[-1] * (10 - seen.sum())] == named.tolist()


@given(rows_of_groups())
def test_each_conversation_is_in_its_row_token_by_token(rows: list[list[Group]]) -> None:
    batch = collate(rows, SHAPE, SIGNAL_LAYOUT)
    mask = np.asarray(packed_mask(batch.group_ids, batch.branch_ids))[:, 0]
    for r, row in enumerate(rows):
        used = 0
        for g, b, group, c in conversations(row):
            places = places_of(batch, r, g, b)
            np.testing.assert_array_equal(batch.tokens[r, places], c.ids)
            np.testing.assert_array_equal(batch.positions[r, places], np.arange(len(c.ids)))
            for p, place in enumerate(places):
                np.testing.assert_array_equal(np.flatnonzero(mask[r, place]), places[: p + 1])
            used += len(c.ids) - group.prefix
        used += sum(group.prefix for group in row)
        assert (batch.group_ids[r] > 0).sum() == used and (batch.group_ids[r, :used] > 0).all()


@given(rows_of_groups())
def test_a_target_is_predicted_by_the_token_before_it(rows: list[list[Group]]) -> None:
    batch = collate(rows, SHAPE, SIGNAL_LAYOUT)
    for r, row in enumerate(rows):
        slot = 0
        for g, b, _, c in conversations(row):
            places = places_of(batch, r, g, b)
            for p in np.flatnonzero(c.supervised):
                assert batch.target_index[r, slot] == places[p - 1]
                assert batch.target_ids[r, slot] == c.ids[p]
                assert batch.target_weights[r, slot] == (c.signals is not None)
                assert batch.sample_ids[r, batch.target_sample[r, slot]] == c.sample
                slot += 1
        assert not batch.target_weights[r, slot:].any()
        assert batch.sample_ids[r][batch.sample_ids[r] >= 0].tolist() == [c.sample for *_, c in conversations(row)]


@given(rows_of_groups())
def test_a_signal_token_takes_its_own_embedding(rows: list[list[Group]]) -> None:
    batch = collate(rows, SHAPE, SIGNAL_LAYOUT)
    for r, row in enumerate(rows):
        readers = np.zeros(SHAPE.signals)
        signal_places = set()
        for g, b, _, c in conversations(row):
            places = places_of(batch, r, g, b)
            for e, positions in enumerate(c.signal_positions):
                slots = batch.signal_slot[r, places[positions]]
                signal_places.update(places[positions].tolist())
                assert slots.tolist() == [slots[0] + n for n in range(N)] and slots[0] % N == 0
                if c.signals is not None:
                    readers[slots[0] // N] += 1
                    np.testing.assert_array_equal(batch.signals[r, slots[0] // N], c.signals[e])
        np.testing.assert_array_equal(batch.signal_weights[r], readers)
        assert set(np.flatnonzero(batch.signal_slot[r] >= 0).tolist()) == signal_places
        assert not batch.signals[r][readers == 0].any()


@given(rows_of_groups())
def test_a_bad_record_keeps_its_place(rows: list[list[Group]]) -> None:
    """Only signals and weights differ from a batch without bad records."""

    def mended(c: Conversation) -> Conversation:
        signals = [np.zeros(SIGNAL_SHAPE, np.float32)] * len(c.signal_positions)
        return Conversation(c.sample, c.ids, c.supervised, c.signal_positions, c.signals or signals)

    good = [[Group(g.prefix, [mended(c) for c in g.conversations]) for g in row] for row in rows]
    found, expected = collate(rows, SHAPE, SIGNAL_LAYOUT), collate(good, SHAPE, SIGNAL_LAYOUT)
    for name in Batch._fields:
        if name not in ("signals", "signal_weights", "target_weights", "extras"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


# -- reading steps --------------------------------------------------------------------------------------------


@functools.cache
def demo(share: str) -> tuple[Dataset, LengthIndex]:
    data = DataConfig(
        names=("demo:train=24,val=8,test=8",), sampling_rate=50, segment_len=500, max_len=128, share=share,
        val_fraction=0.0, system_prompt="You read ECGs.",
    )  # fmt: skip
    dataset = Dataset(
        load_records(data, "train", 0), chat_tokenizer(), text_spec(data, "qwen2", 4, "sft", ()), signal_spec(data, 0)
    )
    return dataset, dataset.length_index(share, 0.0)


def source(share: str = "ecg", steps: int = 6, parts: tuple[int, ...] = (0,), **options: Any) -> StepSource:
    dataset, index = demo(share)
    counted = {} if "conversations" in options else {"rows": 8}
    plan = Plan(index, max_len=128, pack=True, seed=3, **counted, **options)
    return StepSource(dataset, plan, steps=steps, parts=parts)


def assert_equal(found: Loaded, expected: Loaded) -> None:
    assert (found.step, found.conversations, found.attention_pairs) == (
        expected.step, expected.conversations, expected.attention_pairs,
    )  # fmt: skip
    for name, mine, theirs in zip(Batch._fields, found.batch, expected.batch, strict=True):
        np.testing.assert_equal(mine, theirs, err_msg=name)
        assert jax.tree.map(lambda x: x.dtype, mine) == jax.tree.map(lambda x: x.dtype, theirs)


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("counted", [{}, {"conversations": 10}], ids=["rows", "conversations"])
@pytest.mark.parametrize("hosts", [[(0,), (1,)], [(0, 1), (2, 3)], [(0, 3), (1, 2)], [(0, 2, 3), (1,)]], ids=str)
def test_the_hosts_parts_together_are_the_step(
    share: str, micro: int, hosts: list[tuple[int, ...]], counted: dict[str, int]
) -> None:
    """On a torus a host's parts do not run on; it reads them one after another."""
    ways = sum(map(len, hosts))
    whole = source(share, parts=tuple(range(ways)), micro_batches=micro, ways=ways, **counted)
    sources = [source(share, parts=parts, micro_batches=micro, ways=ways, **counted) for parts in hosts]
    order = np.argsort([part for parts in hosts for part in parts])
    for step in (0, 3):
        read = [host[step] for host in sources]
        joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(r.batch for r in read))
        together = jax.tree.map(lambda x: np.concatenate([np.split(x, ways, axis=1)[at] for at in order], 1), joined)
        for one in read:
            assert_equal(one._replace(batch=together), whole[step])


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
def test_what_is_logged_of_a_step_is_what_is_in_it(share: str) -> None:
    for loaded in (source(share)[step] for step in range(4)):
        batch = loaded.batch
        mask = np.asarray(packed_mask(batch.group_ids[0], batch.branch_ids[0]))
        real = batch.group_ids[0] > 0
        assert loaded.attention_pairs == mask[:, 0][real].sum()
        assert loaded.conversations == (batch.sample_ids >= 0).sum()


def test_a_step_tells_how_many_of_its_conversations_are_cut() -> None:
    dataset, index = demo("ecg")
    index = replace(index, cut=np.arange(len(index)) % 3 == 0)
    steps = StepSource(dataset, Plan(index, rows=2, max_len=128, pack=True, seed=0), steps=1)
    shown = steps[0].batch.sample_ids
    assert steps[0].truncated == sum(i % 3 == 0 for i in np.unique(shown[shown >= 0])) > 0


def test_micro_batches_are_the_rows_in_order() -> None:
    one, two = source(micro_batches=1)[2].batch, source(micro_batches=2)[2].batch
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], np.concatenate([b[0], b[1]])), one, two)


def test_steps_come_in_order_from_any_first_step() -> None:
    expected = source()
    found = list(steps_from(source(), 2))
    assert [loaded.step for loaded in found] == [2, 3, 4, 5]
    for loaded in found:
        assert_equal(loaded, expected[loaded.step])


def test_a_source_and_its_records_can_be_sent_to_a_process() -> None:
    original = source()
    copy = pickle.loads(pickle.dumps(original))
    assert_equal(copy[4], original[4])


@pytest.mark.slow
def test_worker_processes_read_what_threads_read() -> None:
    expected = list(steps_from(source(), 1))
    found = list(steps_from(source(), 1, workers=3))
    assert len(found) == len(expected) == 5
    for mine, theirs in zip(found, expected, strict=True):
        assert_equal(mine, theirs)


READING = """
import multiprocessing, os, signal, sys, threading, time
from elm_jax.data.readers import steps_from
from elm_jax.stopping import StopAfterStep

sys.path[:0] = sys.argv[3:]
from test_loader import source

def stop():
    os.killpg(0, signal.SIGTERM)

def stop_when_one_starts():
    while not multiprocessing.active_children():
        time.sleep(0.001)
    stop()

if __name__ == "__main__":
    workers, when = int(sys.argv[1]), sys.argv[2]
    with StopAfterStep() as training:
        training.after(0)
        if when == "starting":
            threading.Thread(target=stop_when_one_starts).start()
        for loaded in steps_from(source(steps=60), 0, workers):
            if when == "reading" and loaded.step == 0:
                stop()
            if when == "killed" and loaded.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if loaded.step == 40:  # no worker had read it when the signal came
                break
        asked = bool(training.after(loaded.step))
        print(loaded.step, asked, flush=True)
        sys.exit(143 if asked else 0)
"""


def ended(tmp_path: Path, workers: int, when: str) -> tuple[int, str]:
    """Status and output of a process of its own group that reads 60 steps, when its workers have ended, too: they
    share its output, which `communicate` reads to the end."""
    program = tmp_path / "reading.py"
    program.write_text(READING)
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, str(program), str(workers), when, *tests], start_new_session=True, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, told


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "when"), [(1, "reading"), (2, "starting")])
def test_sigterm_to_the_whole_group_stops_a_run_as_that_to_one_process(tmp_path: Path, workers: int, when: str) -> None:
    """Its workers still read up to its last step, and end when it has ended."""
    assert ended(tmp_path, workers, when) == (143, "40 True\n")


@pytest.mark.slow
def test_workers_do_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    assert ended(tmp_path, 2, "killed") == (-signal.SIGKILL, "")


@pytest.mark.slow
def test_workers_end_with_the_loop_that_reads() -> None:
    steps = steps_from(source(steps=60), 0, workers=2)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named() -> None:
    steps = steps_from(source(steps=60), 0, workers=2)
    next(steps)
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(Absent, match=rf"data.workers: found worker \d of 2 \(process {victim}\).*killed by signal 9"):
        list(steps)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_named_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SILENT", 2.0)
    steps = steps_from(source(steps=60), 0, workers=1)
    next(steps)
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(Absent, match=rf"process {victim}\), which was to bring step \d+, stopped for \d+ s;"):
        list(steps)
    assert not multiprocessing.active_children()


class Stuck(StepSource):
    """Its step 2 does not get beyond its second record."""

    def read(self, step: int, reading: Reading) -> Loaded:
        if step == 2:
            reading.at(5)
            time.sleep(600)
        return super().read(step, reading)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_record_that_is_not_read_in_time_is_named(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(readers, "LOOK", 0.05)
    good = source(steps=60)
    steps = steps_from(Stuck(good.dataset, good.plan, steps=60), 0, workers, timeout=1.0)
    with pytest.raises(Absent, match="record demo.*5: found demo:.* being read for .* s, for step 3; .*timeout=1 s"):
        list(steps)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_fault_in_a_worker_is_one_of_the_loop() -> None:
    good = source(steps=3)
    with pytest.raises(AttributeError, match="nothing"):
        list(steps_from(Faulty(good.dataset, good.plan, steps=3), 0, workers=1))


class Faulty(StepSource):
    def read(self, step: int, reading: Reading) -> Loaded:
        return self.nothing  # type: ignore[attr-defined]


def test_data_that_cannot_be_sent_are_refused() -> None:
    unsent = source()
    unsent.steps_of = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="data.workers: found 2, to whose processes the data cannot be sent"):
        next(steps_from(unsent, 0, workers=2))


# -- bad records ----------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Dataset:
    """Six questions about two recordings, of which the second has no file; and two without an answer."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "good.npy", rng.normal(size=(12, 500)).astype(np.float32))
    rows = []
    for name in ("good.npy", "gone.npy"):
        for n in range(3):
            turns = [{"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": "yes"}]
            rows.append({"ecg_path": name, "text": turns, "name": "x", "patient_id": name, "split": "train"})
    for n in range(2):
        turns = [{"from": "human", "value": f"Unanswered {n}?"}]
        rows.append({"ecg_path": "good.npy", "text": turns, "name": "x", "patient_id": "z", "split": "train"})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        names=("records.jsonl",), root=str(tmp_path), sampling_rate=50, segment_len=500, max_len=128, val_fraction=0.0
    )
    return Dataset(
        load_records(data, "train", 0), chat_tokenizer(), text_spec(data, "qwen2", 4, "sft", ()), signal_spec(data, 0)
    )


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
def test_each_record_of_a_missing_recording_is_named_and_weighs_nothing(broken: Dataset, share: str) -> None:
    index = broken.length_index(share, 0.5)
    loaded = StepSource(broken, Plan(index, rows=8, max_len=128, pack=True, seed=0), steps=1)[0]
    assert sorted(bad.id for bad in loaded.bad) == [f"records.jsonl:{i}" for i in (3, 4, 5)]
    assert all("gone.npy" in bad.error for bad in loaded.bad)
    batch = loaded.batch
    assert sorted(batch.sample_ids[batch.sample_ids >= 0].tolist()) == [0, 1, 2, 3, 4, 5]
    supervised = int(index.targets[:3].sum())
    assert batch.target_weights.sum() == supervised and batch.signal_weights.sum() == 3
    assert np.isfinite(batch.signals["ecg"]).all()


def test_records_without_an_answer_are_named(broken: Dataset) -> None:
    index = broken.length_index("none", 0.5)
    found = unusable(broken, index)
    assert [bad.id for bad in found] == ["records.jsonl:6", "records.jsonl:7"]
    assert all("answer" in bad.error for bad in found)


def test_what_the_next_start_has_ends_the_run_and_is_no_bad_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> Any:
        raise Absent("a part", "an output that is damaged", "what was kept", "start the run again")

    steps = source()
    monkeypatch.setattr(steps.dataset, "signals", absent)
    with pytest.raises(Absent, match="start the run again"):
        next(steps_from(steps, 0))
