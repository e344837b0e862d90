"""The order of samples: resumed on other numbers of hosts and workers it is that of the unbroken run.

    python scripts/reliability/order.py [--short]

First without training: plans with rows and with conversations, with and without shared ECGs and micro-batches, read
by 1, 2 and 4 hosts and by hosts that become more and fewer; every step has the same samples in the same rows, and every
epoch each sample once. Then by 0 to 4 workers, from the beginning and from the middle; every array is the same. Then
real runs: one process, then two, then one with workers, beside one that is not interrupted. --short is the first part,
in part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import runs
from texts import chat_tokenizer

from elm_jax.config import DataConfig
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.loader import Loaded, StepSource
from elm_jax.data.plan import Plan
from elm_jax.data.readers import steps_from
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec

EPOCHS = 2
HOSTS = (1, 2, 4, 2)  # one after another
WORKERS = range(5)
ROWS, CONVERSATIONS = 8, 12  # of a step
Step = list[list[int]]  # the samples of each row that has some


def dataset(share: str) -> Dataset:
    """Conversations of the demo, several about each ECG."""
    data = DataConfig(
        names=("demo:train=24,val=8,test=8",), sampling_rate=50, segment_len=500, max_len=128, share=share,
        val_fraction=0.0, system_prompt="You read ECGs.",
    )  # fmt: skip
    text = text_spec(data, "qwen2", 4, "sft", ())
    return Dataset(load_records(data, "train", 0), chat_tokenizer(), text, signal_spec(data, 0))


def planned(of: Dataset, share: str, ways: int, options: dict[str, int]) -> Plan:
    """The plan of rows that divide by `ways`, which are packed."""
    return Plan(of.length_index(share, 0.0), max_len=128, pack=True, seed=3, ways=ways, **options)


def read_by(of: Dataset, hosts: int, steps: range, **options: Any) -> Iterator[Step]:
    """The rows of some steps as so many hosts read them, put together; each makes its own plan."""
    parts = []
    for host in range(hosts):
        plan = planned(of, options["share"], hosts, options["plan"])
        parts.append(StepSource(of, plan, steps=steps.stop, parts=(host,)))
    for step in steps:
        joined = np.concatenate([part[step].batch.sample_ids for part in parts], axis=1)
        yield rows_of(joined)


def rows_of(sample_ids: np.ndarray) -> Step:
    """The samples of (A, B, S) ids, by row; rows without any are left out."""
    rows = ([int(i) for i in row if i >= 0] for micro in sample_ids for row in micro)
    return [row for row in rows if row]


def hosts_differ(share: str, counted: dict[str, int], micro: int) -> list[str]:
    """What is not as promised where the number of hosts changes."""
    of, told = dataset(share), f"share={share}, {counted}, {micro} micro-batches"
    options = {"share": share, "plan": {**counted, "micro_batches": micro}}
    ends = [planned(of, share, ways, options["plan"]).steps_before for ways in (1, 2, 4)]
    problems = [f"{told}: epochs of other lengths" for end in ends if end(EPOCHS) != ends[0](EPOCHS)]
    count, epoch = ends[0](EPOCHS), ends[0](1)
    unbroken = list(read_by(of, 1, range(count), **options))
    for hosts in (2, 4):
        if [*read_by(of, hosts, range(count), **options)] != unbroken:
            problems.append(f"{told}: {hosts} hosts read otherwise")
    cuts = [count * n // len(HOSTS) for n in range(len(HOSTS) + 1)]
    resumed = [
        step
        for hosts, (first, end) in zip(HOSTS, itertools.pairwise(cuts), strict=True)
        for step in read_by(of, hosts, range(first, end), **options)
    ]
    problems += [f"{told}: hosts {HOSTS} one after another read otherwise"] if resumed != unbroken else []
    for first, end in ((0, epoch), (epoch, count)):
        seen = Counter(sample for step in resumed[first:end] for row in step for sample in row)
        if seen != Counter(range(len(of))):
            problems.append(f"{told}: in steps {first} to {end} samples are lost or doubled: {seen.most_common(3)}")
    return problems


def workers_differ() -> list[str]:
    """What is not as promised of worker processes."""
    of = dataset("ecg")
    plan = planned(of, "ecg", 1, {"rows": ROWS})
    source = StepSource(of, plan, steps=plan.steps_before(EPOCHS))
    expected = [source[step] for step in range(len(source))]
    return [
        f"{workers} workers from step {first} on read otherwise"
        for workers, first in itertools.product(WORKERS, (0, len(source) // 2))
        if not _equal(list(steps_from(source, first, workers)), expected[first:])
    ]


def _equal(found: list[Loaded], expected: list[Loaded]) -> bool:
    if [one.step for one in found] != [one.step for one in expected]:
        return False
    mine, theirs = (jax.tree.leaves([one.batch for one in steps]) for steps in (found, expected))
    pairs = zip(mine, theirs, strict=True)
    return all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in pairs)


def runs_differ(place: Path) -> list[str]:
    """What is not as promised of runs that go on in other processes, with packing and shared ECGs."""
    options = {"data__pack": True, "data__share": "ecg", "data__val_fraction": 0.0, "mesh__data": -1,
               "optim__schedule": "constant", "optim__warmup_ratio": 0.0}  # fmt: skip

    def noted(name: str, process: int = 0) -> dict[int, np.ndarray]:
        lines = (place / f"{name}.{process}").read_text().splitlines()
        found = [(step, np.array(ids)) for step, ids in map(json.loads, lines)]
        assert len(found) == len(dict(found)), f"{name}: a step was taken twice"
        return dict(found)

    def note(name: str, process: int = 0) -> dict[str, str]:
        return {"TEST_SAMPLES": str(place / f"{name}.{process}")}

    runs.train(place / "unbroken", devices=4, env=note("unbroken"), train__steps=15, **options)
    runs.train(place / "run", devices=4, env=note("one"), train__steps=3, **options)
    started = [
        runs.start(place / "run", devices=2, env={**env, **note("two", i)}, train__steps=9, **options)
        for i, env in enumerate(runs.two())
    ]
    runs.finish_all(started)
    runs.train(place / "run", devices=1, env=note("last"), train__steps=15, data__workers=2, **options)
    first, second = noted("two", 0), noted("two", 1)
    both = {step: np.concatenate([first[step], second[step]], axis=1) for step in first}
    found = {step: rows_of(ids) for step, ids in {**noted("one"), **both, **noted("last")}.items()}
    expected = {step: rows_of(ids) for step, ids in noted("unbroken").items()}
    problems = [f"real runs: step {s} has other samples" for s in expected if found.get(s) != expected[s]]
    losses = [{s: values["loss"] for s, values in runs.logged(place / name).items()} for name in ("run", "unbroken")]
    if not np.allclose(*(list(one.values()) for one in losses), rtol=1e-4):
        problems.append(f"real runs: other losses, {losses[0]} and {losses[1]}")
    return problems


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="some plans without training, no workers, no runs")
    args = parser.parse_args(argv)
    shares, micros = (("ecg",), (2,)) if args.short else (("none", "system", "ecg"), (1, 2))
    plans = [*itertools.product(shares, ({"rows": ROWS}, {"conversations": CONVERSATIONS}), micros)]
    problems = [problem for plan in plans for problem in hosts_differ(*plan)]
    if not args.short:
        problems += workers_differ()
        with tempfile.TemporaryDirectory() as folder:
            problems += runs_differ(Path(folder))
    for problem in problems:
        print(problem, file=sys.stderr)
    more = f"; 0 to {WORKERS[-1]} workers read the same arrays; real runs in 1, 2 and 1 processes the same samples"
    sentence = (
        f"{len(plans)} plans of {EPOCHS} epochs on 1, 2, 4 and changing hosts: the same samples in the same rows, each "
        f"once an epoch{'' if args.short else more}" if not problems else f"not as promised: {problems[0]}"
    )
    return common.end(sentence, not problems, plans=len(plans), hosts=HOSTS, not_as_promised=len(problems))


if __name__ == "__main__":
    sys.exit(main())
