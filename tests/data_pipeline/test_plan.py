"""The plan: every sample once an epoch, in rows that fit, as a pure function of seed and step."""

from __future__ import annotations

import functools
import pickle
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_jax.data.batch import visible_blocks
from elm_jax.data.packing import LengthIndex, PlannedRow
from elm_jax.data.plan import Plan, bucket, token_buckets
from elm_jax.errors import UserError

SYSTEM, SIGNAL = 6, 4  # tokens of the system prompt, and of an ECG
COUNTED = [
    {"conversations": count, "micro_batches": micro, "ways": ways}
    for count, micro, ways in ((1, 1, 1), (1, 1, 2), (6, 1, 1), (6, 2, 1), (8, 4, 2), (30, 1, 4))
]


def index_of(
    own: list[int], recordings: list[int], share: str = "none", datasets: list[int] | None = None, targets: int = 2
) -> LengthIndex:
    """Conversations of a system prompt, one ECG and `own` more tokens; own = 0 marks one that is unusable."""
    count = len(own)
    prefix = {"none": 0, "system": SYSTEM, "ecg": SYSTEM + SIGNAL}[share]
    usable = np.array(own) > 0
    key = np.array(recordings, np.uint64) + np.uint64(100) if share == "ecg" else np.full(count, 7, np.uint64)
    ones = np.ones(count, np.int32)
    return LengthIndex(
        length=np.where(usable, SYSTEM + SIGNAL + np.array(own), 0).astype(np.int32),
        targets=(targets * usable).astype(np.int32),
        ecgs=ones,
        prefix=np.full(count, prefix, np.int32),
        key=key,
        prefix_ecgs=ones * (share == "ecg"),
        shares_ecg=(ones * (share == "ecg")).astype(bool),
        dataset=np.array(datasets or [0] * count, np.int32),
        cut=np.zeros(count, bool),
        lost_answers=np.zeros(count, np.int16),
        cut_ecgs=np.zeros(count, bool),
    )


@st.composite
def plans(draw: st.DrawFn) -> tuple[LengthIndex, dict]:
    count = draw(st.integers(1, 60))
    own = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    own[draw(st.integers(0, count - 1))] = 5  # one at least is usable
    recordings = draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    index = index_of(own, recordings, draw(st.sampled_from(["none", "system", "ecg"])))
    settings = {
        **draw(st.sampled_from([*({"rows": rows} for rows in (1, 2, 4, 8)), *COUNTED])),
        "max_len": draw(st.integers(50, 130)),
        "pack": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32)),
        "shuffle": draw(st.booleans()),
    }
    return index, settings


def epoch_rows(plan: Plan, epoch: int) -> list[PlannedRow]:
    return [row for step in range(plan.steps_before(epoch), plan.steps_before(epoch + 1)) for row in plan.rows(step)]


def samples(rows: list[PlannedRow]) -> list[int]:
    return [sample for row in rows for group in row for sample in group.samples]


def tokens(row: PlannedRow, index: LengthIndex) -> int:
    return sum(g.prefix + sum(int(index.length[s]) - g.prefix for s in g.samples) for g in row)


@given(plans())
def test_every_usable_sample_once_an_epoch_in_rows_that_fit(case: tuple[LengthIndex, dict]) -> None:
    index, settings = case
    plan = Plan(index, **settings)
    for epoch in range(3):
        rows = epoch_rows(plan, epoch)
        assert sorted(samples(rows)) == np.flatnonzero(index.length > 0).tolist()
        assert len(rows) % (settings.get("rows", 1) * plan.micro_batches * plan.ways) == 0
        assert max(tokens(row, index) for row in rows) <= plan.max_len


@given(plans())
def test_a_group_shares_what_is_equal_and_nothing_else(case: tuple[LengthIndex, dict]) -> None:
    index, settings = case
    for row in epoch_rows(Plan(index, **settings), 0):
        for group in row:
            chosen = list(group.samples)
            if len(chosen) > 1:
                assert group.prefix > 0 and settings["pack"]
            if group.prefix:
                assert len({int(k) for k in index.key[chosen]}) == 1
                assert set(index.prefix[chosen].tolist()) == {group.prefix}
                assert len(set(index.prefix_ecgs[chosen].tolist())) == 1
        keys = [int(index.key[g.samples[0]]) for g in row if g.prefix]
        assert len(keys) == len(set(keys)), "one prefix stands twice in a row"


@given(plans(), st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_what_was_asked_before(case: tuple[LengthIndex, dict], order: random.Random) -> None:
    index, settings = case
    plan = Plan(index, **settings)
    in_order = [plan.rows(step) for step in range(plan.steps_before(4))]
    again = Plan(index, **settings)
    steps = list(range(len(in_order)))
    order.shuffle(steps)
    for step in steps:
        assert again.rows(step) == in_order[step]
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.rows(step) for step in steps] == [in_order[step] for step in steps]
    assert [plan.epoch_of(step) for step in range(len(in_order))] == sorted(map(plan.epoch_of, range(len(in_order))))


@pytest.mark.parametrize("pack", [True, False])
def test_what_a_run_begins_with_is_planned_once(pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all its epochs are counted first; and in a worker not again."""
    planned: list[int] = []
    plan_epoch = Plan._plan_epoch
    monkeypatch.setattr(Plan, "_plan_epoch", lambda self, epoch: planned.append(epoch) or plan_epoch(self, epoch))
    plan = Plan(index_of([5] * 40, list(range(40)), "system"), rows=2, max_len=64, pack=pack, seed=0)
    plan.steps_before(5)
    assert planned == ([0, 1, 2, 3, 4] if pack else []), "rows of one conversation need no plan to be counted"
    plan.shape(plan.rows(0))
    worker = pickle.loads(pickle.dumps(plan))
    for one in (plan, worker):
        one.shape(one.rows(one.steps_before(1) - 1))
    assert planned.count(0) == 1, planned


@pytest.mark.parametrize("counts", [{"rows": 2}, {"conversations": 6}], ids=["rows", "conversations"])
def test_a_kept_plan_is_the_same_and_plans_nothing(
    counts: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elm_jax.data.plan.KEPT_FROM", 40)
    index = index_of([5 + i % 7 for i in range(40)], [i // 3 for i in range(40)], "ecg")
    make = functools.partial(Plan, max_len=64, pack=True, cache=tmp_path, **counts)
    first = make(index, seed=0)
    steps = range(first.steps_before(3))
    first.rows(0)
    planned: list[int] = []
    plan_epoch = Plan._plan_epoch
    monkeypatch.setattr(Plan, "_plan_epoch", lambda self, epoch: planned.append(epoch) or plan_epoch(self, epoch))
    again = make(index, seed=0)
    assert again.steps_before(3) == len(steps) and again.shape(again.rows(0)) == first.shape(first.rows(0))
    assert not planned, "the first epoch is read, and the others are counted"
    assert [again.rows(step) for step in steps] == [first.rows(step) for step in steps]
    planned.clear()
    for changed in (make(index, seed=1), make(replace(index, length=index.length + 1), seed=0)):
        changed.rows(0)
    assert planned == [0, 0], "another seed and another index have plans of their own"


def test_a_run_neither_fails_by_a_plan_that_cannot_be_kept_nor_plans_anew_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("elm_jax.data.plan.KEPT_FROM", 40)
    index, planned = index_of([5 + i % 7 for i in range(40)], [*range(40)], "none"), list[int]()
    plan_epoch = Plan._plan_epoch
    monkeypatch.setattr(Plan, "_plan_epoch", lambda self, epoch: planned.append(epoch) or plan_epoch(self, epoch))
    (tmp_path / "file").touch()
    for cache, told in ((tmp_path / "file", 1), (tmp_path / "cache", 0)):
        plan = Plan(index, rows=2, max_len=64, pack=True, seed=0, cache=cache)
        for step in range(40):
            plan.rows(step)
        assert plan.epoch_of(39) >= 3 and planned.count(0) == 1
        assert [str(tmp_path / "file") in message for message in caplog.messages] == [True] * told
        planned.clear()
        caplog.clear()


@given(plans())
def test_every_row_of_a_step_fits_its_shape_and_shapes_are_few(case: tuple[LengthIndex, dict]) -> None:
    index, settings = case
    plan = Plan(index, **settings)
    shapes = set()
    for step in range(plan.steps_before(5)):
        rows = plan.rows(step)
        shape = plan.shape(rows)
        shapes.add((len(rows), shape))
        for row in rows:
            assert tokens(row, index) <= shape.tokens
            assert sum(int(index.targets[s]) for g in row for s in g.samples) <= shape.targets
            ecgs = sum(1 if index.prefix_ecgs[g.samples[0]] and g.prefix else len(g.samples) for g in row)
            assert ecgs <= shape.signals
        assert shape.tokens <= -(-plan.max_len // 8) * 8
    assert len(shapes) <= 12


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
@pytest.mark.parametrize("pack", [True, False])
def test_lengths_as_real_questions_have_them_make_at_most_eight_shapes(share: str, pack: bool) -> None:
    """Each costs a compilation of the step. Rows that are packed are full, but for those at the end of an epoch."""
    rng = np.random.default_rng(0)
    own = np.clip(rng.lognormal(3.3, 0.8, 600), 1, 180).astype(int).tolist()
    index = index_of(own, (np.arange(600) // 14).tolist(), share)
    index.targets[:] = rng.integers(1, 20, 600)
    plan = Plan(index, rows=4, max_len=256, pack=pack, seed=0)
    assert len({plan.shape(plan.rows(step)) for step in range(plan.steps_before(5))}) <= 8


def test_another_seed_or_epoch_is_another_order() -> None:
    index = index_of([5] * 40, list(range(40)))
    plans = [Plan(index, rows=2, max_len=64, pack=True, seed=seed) for seed in (0, 1)]
    orders = [samples(epoch_rows(plan, epoch)) for plan in plans for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_without_shuffling_samples_keep_their_order() -> None:
    index = index_of([5, 0, 9, 2], [0, 1, 2, 3])
    plan = Plan(index, rows=2, max_len=64, pack=False, seed=0, shuffle=False)
    assert samples(epoch_rows(plan, 0)) == [0, 2, 3] and samples(epoch_rows(plan, 1)) == [0, 2, 3]


def test_the_last_step_of_an_epoch_is_filled_up_with_empty_rows() -> None:
    plan = Plan(index_of([5] * 5, [0] * 5), rows=4, max_len=64, pack=False, seed=0)
    assert plan.steps_before(1) == 2 and [len(row) for row in plan.rows(1)] == [1, 0, 0, 0]


def test_questions_about_a_recording_stand_behind_it_together() -> None:
    index = index_of([4] * 30, [i % 3 for i in range(30)], "ecg")
    rows = epoch_rows(Plan(index, rows=1, max_len=10 + 40, pack=True, seed=3), 0)
    assert len(rows) == 3 and all(len(row) == 1 and len(row[0].samples) == 10 for row in rows)


def test_the_system_prompt_stands_once_in_a_row() -> None:
    index = index_of([4] * 12, list(range(12)), "system")
    rows = epoch_rows(Plan(index, rows=1, max_len=6 + 6 * 8, pack=True, seed=3), 0)
    assert len(rows) == 2 and all(len(row) == 1 and row[0].prefix == SYSTEM for row in rows)


# -- steps of conversations -----------------------------------------------------------------------------------


def real_index(share: str, count: int = 600) -> LengthIndex:
    """Lengths as those of ECG-QA: 261 tokens, of which 174 are the system prompt's and the ECG's."""
    rng = np.random.default_rng(0)
    index = index_of(np.clip(rng.lognormal(4.3, 0.4, count), 20, 800).astype(int).tolist(), [0] * count)
    recordings = (np.arange(count) // 14).astype(np.uint64)
    index.length[:] += 164
    index.targets[:] = rng.integers(1, 20, count)
    if share == "none":
        return index
    prefix, key = (174, recordings) if share == "ecg" else (170, np.zeros(count, np.uint64))
    in_prefix = np.full(count, share == "ecg")
    return replace(
        index, prefix=np.full(count, prefix, np.int32), key=key, prefix_ecgs=in_prefix.astype(np.int32),
        shares_ecg=in_prefix,
    )  # fmt: skip


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
@pytest.mark.parametrize("micro", [1, 4])
def test_a_step_has_so_many_conversations_in_each_micro_batch_packed_or_not_on_any_mesh(share: str, micro: int) -> None:
    index, found = real_index(share), []
    for pack, ways in ((False, 1), (True, 1), (True, 4), (False, 8)):
        plan = Plan(index, conversations=32, micro_batches=micro, ways=ways, max_len=2048, pack=pack, seed=5)
        assert plan.steps_before(3) == 3 * 19
        steps = []
        for step in range(plan.steps_before(2)):
            rows = plan.rows(step)
            assert len(rows) % (micro * ways) == 0
            size = len(rows) // micro
            steps.append([sorted(samples(rows[m * size : (m + 1) * size])) for m in range(micro)])
        found.append(steps)
    assert all(steps == found[0] for steps in found)
    sizes = [[len(part) for part in step] for step in found[0]]
    whole, left = [32 // micro] * micro, 600 - 18 * 32
    assert sizes[:18] == sizes[19:37] == [whole] * 18 and sum(sizes[18]) == sum(sizes[37]) == left
    for epoch in (found[0][:19], found[0][19:]):
        assert sorted(s for step in epoch for part in step for s in part) == list(range(600))
    assert found[0][0] != found[0][19]


@given(plans(), st.sampled_from([1, 2, 3, 8]))
def test_another_mesh_has_the_same_rows_and_other_empty_ones(case: tuple[LengthIndex, dict], ways: int) -> None:
    index, settings = case
    settings |= {"rows": None, "conversations": settings.get("conversations", 6), "micro_batches": 1}
    one, other = (Plan(index, **{**settings, "ways": n}) for n in (1, ways))
    for step in range(one.steps_before(2)):
        mine, theirs = one.rows(step), other.rows(step)
        assert [row for row in mine if row] == [row for row in theirs if row] and len(theirs) % ways == 0


@pytest.mark.parametrize("share", ["none", "system", "ecg"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("conversations", [1, 8, 64, 256])
@pytest.mark.parametrize("ways", [1, 8])
def test_steps_of_conversations_have_few_shapes_and_few_empty_rows(
    share: str, pack: bool, conversations: int, ways: int
) -> None:
    index = real_index(share, 4000)
    plan = Plan(index, conversations=conversations, ways=ways, max_len=2048, pack=pack, seed=0)
    shapes, held, used = Counter(), 0, 0
    for step in range(min(plan.steps_before(1), 300)):
        rows = plan.rows(step)
        shape = plan.shape(rows)
        shapes[len(rows), shape] += 1
        held += len(rows) * shape.tokens
        used += sum(tokens(row, index) for row in rows)
    assert len(shapes) <= 6, shapes
    if pack and conversations >= 64:  # of fewer there are not enough to fill a row for each device
        assert used / held > 0.7
    if not pack:
        assert {rows for rows, _ in shapes} == {-(-conversations // ways) * ways}


def test_of_an_epoch_of_conversations_only_what_is_read_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    index = real_index("system", 20_000)
    plan = Plan(index, conversations=64, max_len=2048, pack=True, seed=0)
    plan.rows(0)
    packed = []
    monkeypatch.setattr("elm_jax.data.plan.pack_rows", lambda bundles, room: packed.append(len(list(bundles))) or [()])
    plan.rows(plan.steps_before(7) + 3)
    assert packed == [64]


def test_averages_are_those_of_an_epoch() -> None:
    index = index_of([5, 5, 0, 5, 5, 5], [0] * 6, targets=3)
    plan = Plan(index, conversations=2, max_len=64, pack=True, seed=0)
    assert plan.averages() == (5 / 3, 5.0)
    rows = Plan(index, rows=4, max_len=64, pack=False, seed=0)
    assert rows.averages() == (2.5, 7.5) and rows.usual_rows == 4


# -- weights --------------------------------------------------------------------------------------------------


def seen(weights: tuple[float, ...], sizes: tuple[int, ...], epochs: int) -> list[Counter[int]]:
    datasets = [d for d, size in enumerate(sizes) for _ in range(size)]
    index = index_of([5] * len(datasets), [0] * len(datasets), datasets=datasets)
    plan = Plan(index, rows=3, max_len=64, pack=True, seed=1, weights=weights)
    return [Counter(samples(epoch_rows(plan, epoch))) for epoch in range(epochs)]


def test_a_weight_is_how_often_an_epoch_sees_a_dataset() -> None:
    for epoch in seen((1.0, 3.0), (7, 5), 2):
        assert [epoch[i] for i in range(7)] == [1] * 7
        assert [epoch[i] for i in range(7, 12)] == [3] * 5


def test_a_fraction_takes_turns() -> None:
    epochs = seen((1.0, 0.5), (4, 10), 4)
    for first, second in (epochs[:2], epochs[2:]):
        assert all(sum(epoch[i] for i in range(4, 14)) == 5 for epoch in (first, second))
        assert all(first[i] + second[i] == 1 for i in range(4, 14))


@given(st.floats(0.05, 4.0), st.integers(1, 30))
def test_over_the_epochs_no_sample_is_seen_twice_more_than_another(weight: float, size: int) -> None:
    epochs = seen((1.0, weight), (3, size), 5)
    total = Counter[int]()
    for epoch in epochs:
        total.update({i: epoch[i] for i in range(3, 3 + size)})
    counts = [total[i] for i in range(3, 3 + size)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == pytest.approx(5 * weight * size, abs=1)


# -- edges ----------------------------------------------------------------------------------------------------


def test_nothing_usable_is_the_users_error() -> None:
    with pytest.raises(UserError, match="no usable sample"):
        Plan(index_of([0, 0], [0, 0]), rows=1, max_len=64, pack=True, seed=0)


def test_weights_by_which_an_epoch_has_nothing_are_the_users_error() -> None:
    with pytest.raises(UserError, match="data.weights: found 0.1"):
        Plan(index_of([5] * 4, [0] * 4), conversations=2, max_len=64, pack=True, seed=0, weights=[0.1])


def test_an_index_of_longer_samples_is_our_fault() -> None:
    plan = Plan(index_of([60], [0]), rows=1, max_len=32, pack=True, seed=0)
    with pytest.raises(AssertionError, match="max_len"):
        plan.rows(0)


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_a_bucket_holds_its_size_and_half_of_it_does_not(size: int, least: int) -> None:
    found = bucket(size, least)
    assert found >= max(size, least) and (found == least or found // 2 < size)
    assert (found // least).bit_count() == 1 and found % least == 0


@given(st.integers(1, 10_000))
def test_row_lengths_end_with_the_longest_row(max_len: int) -> None:
    for pack in (True, False):
        buckets = token_buckets(max_len, pack)
        assert max_len <= buckets[-1] < max_len + 8 and all(a <= b and a % 8 == 0 for a, b in pairwise(buckets))


@given(st.integers(300, 10_000), st.integers(65, 10_000))
def test_rows_of_one_conversation_are_padded_by_a_quarter_or_63_tokens_at_most(max_len: int, size: int) -> None:
    size = min(size, max_len)
    assert next(b for b in token_buckets(max_len, pack=False) if b >= size) <= max(1.25 * size + 8, size + 63)


@pytest.mark.parametrize("share", ["none", "system"])
def test_long_packed_rows_say_how_many_blocks_of_keys_are_seen(share: str) -> None:
    index = index_of([190] * 90, [0] * 90, share)
    plan = Plan(index, rows=2, max_len=2048, pack=True, seed=0)
    spans = [[(g.prefix, [200 - g.prefix] * len(g.samples)) for g in row] for row in plan.rows(0)]
    most = max(visible_blocks(row, 2048).sum(1).max() for row in spans)
    assert most > 3 and plan.shape(plan.rows(0)).key_blocks == most + most % 2  # of 32, in steps of 2
    alone = Plan(index_of([2000] * 4, [0] * 4), rows=2, max_len=2048, pack=True, seed=0)
    assert alone.shape(alone.rows(0)).key_blocks == 0  # one conversation sees all before it


def test_questions_about_one_ecg_are_divided_where_that_fills_rows() -> None:
    """14 questions of 30 tokens behind a prefix of 10: four recordings would leave 280 of 2000 tokens empty."""
    recordings = [n // 14 for n in range(14 * 60)]
    plan = Plan(index_of([30] * len(recordings), recordings, "ecg"), rows=1, max_len=2000, pack=True, seed=0)
    rows = [row for step in range(plan.steps_before(1)) for row in plan.rows(step)]
    assert Counter(s for row in rows for g in row for s in g.samples) == Counter(range(len(recordings)))
    used = [sum(g.prefix + 30 * len(g.samples) for g in row) for row in rows]
    assert max(used) <= 2000 and sum(used) > 0.97 * 2000 * (len(rows) - 1)  # all but the last are full
    assert all(len(g.samples) > 1 for row in rows for g in row[:-1])


class SlowPlan(Plan):
    """Gives other threads time to come in between."""

    def _plan_epoch(self, epoch: int) -> list[PlannedRow]:
        time.sleep(0.002)
        return super()._plan_epoch(epoch)


def test_threads_that_meet_at_the_end_of_an_epoch_see_the_same_plan() -> None:
    """Steps are read ahead by threads, so two of them may be the first to plan an epoch."""
    index = index_of([1 + 7 * i % 40 for i in range(40)], [0] * 40)
    make = {"rows": 1, "max_len": 80, "pack": True, "seed": 0}
    expected = Plan(index, **make)
    assert len({expected.steps_before(e + 1) - expected.steps_before(e) for e in range(4)}) > 1
    for _ in range(20):
        plan, found = SlowPlan(index, **make), {}
        barrier = threading.Barrier(4)

        def read(first: int, plan: Plan = plan, found: dict = found, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            for step in range(first, 60, 4):
                found[step] = plan.rows(step)

        threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {step: expected.rows(step) for step in range(60)}


@pytest.mark.slow
@pytest.mark.parametrize("share", ["none", "system", "ecg"])
def test_three_hundred_thousand_samples_are_planned_in_seconds(share: str) -> None:
    count = 300_000
    rng = np.random.default_rng(0)
    own, recordings = rng.integers(20, 120, count).tolist(), (np.arange(count) // 14).tolist()
    index = index_of(own, recordings, share)
    begin = time.process_time()
    plan = Plan(index, rows=8, max_len=2048, pack=True, seed=0)
    plan.shape(plan.rows(0))
    assert time.process_time() - begin < 20  # measured: 1 to 4
    begin = time.process_time()
    for step in range(1, 50):
        plan.shape(plan.rows(step))
    assert (time.process_time() - begin) / 49 < 0.05
    fill = sum(tokens(row, index) for row in epoch_rows(plan, 0)) / (plan.steps_before(1) * 8 * 2048)
    assert fill > 0.75
    assert sum(column.nbytes for column in vars(index).values()) <= 40 * count
