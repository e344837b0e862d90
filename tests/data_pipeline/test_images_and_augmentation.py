"""From recordings to batches of images; and what augmentation depends on: seed, epoch, recording, nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from texts import chat_tokenizer, write_records

from elm_jax.config import DataConfig
from elm_jax.data.batch import Batch
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.loader import Loaded, StepSource
from elm_jax.data.plan import Plan
from elm_jax.data.readers import steps_from
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.models.encoders import ENCODERS

TURNS = [{"from": "human", "value": "Is this normal?"}, {"from": "gpt", "value": "yes"}]
PATHS = ["0.npy", "1.npy", "2.npy", "0.npy", "noise", "flatline", "gone.npy", "3.npy"]
ROWS, LENGTH = 4, 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records: five of four recordings, one of noise, one of a flat line, and one whose file is missing."""
    path = tmp_path_factory.mktemp("recordings")
    for i in range(4):
        np.save(path / f"{i}.npy", np.random.default_rng(i).normal(size=(12, LENGTH)).cumsum(1).astype(np.float32))
    write_records(path, [TURNS] * len(PATHS), PATHS)
    return path


def dataset(folder: Path, representation: str, encoder: str | None, augments: bool = True, seed: int = 0) -> Dataset:
    data = DataConfig(
        names=("records.jsonl",), root=str(folder), val_fraction=0.0, segment_len=LENGTH, max_len=128,
        representation=representation, augment_ecg=True, augment_rgb=encoder is not None,
    )  # fmt: skip
    spec = signal_spec(data, seed, ENCODERS[encoder].processing if encoder else None)
    text = text_spec(data, "qwen2", 1, "sft", ())
    return Dataset(load_records(data, "train", 0), chat_tokenizer(), text, spec, augments)


def source(dataset: Dataset, steps: int, ways: int = 1, **options: Any) -> StepSource:
    plan = Plan(dataset.length_index("none", 0.0), rows=ROWS, ways=ways, max_len=128, pack=False, seed=0)
    return StepSource(dataset, plan, steps=steps, **options)


def assert_equal(found: Iterable[Loaded], expected: Iterable[Loaded]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.step == theirs.step and mine.bad == theirs.bad
        assert jax.tree.structure(mine.batch) == jax.tree.structure(theirs.batch)
        for a, b in zip(jax.tree.leaves(mine.batch), jax.tree.leaves(theirs.batch), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def by_sample(batch: Batch) -> dict[int, Any]:
    """Record -> its only signal, of rows with one conversation each."""
    rows = [(a, r) for a in range(batch.tokens.shape[0]) for r in range(batch.tokens.shape[1])]
    return {
        int(batch.sample_ids[a, r, 0]): jax.tree.map(lambda x, a=a, r=r: x[a, r, 0], batch.signals) for a, r in rows
    }


def arrays(signal: Any) -> list[np.ndarray]:
    return jax.tree.leaves(signal)


def is_same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


IMAGES = [("rgb", "siglip2"), ("stacked_signal", "siglip2"), ("stacked_signal", "vit"), ("rgb", "clip")]


@pytest.mark.parametrize(("representation", "encoder"), IMAGES)
def test_a_batch_holds_what_the_dataset_gives_of_each_record(folder: Path, representation: str, encoder: str) -> None:
    made = dataset(folder, representation, encoder)
    loaded = [source(made, 2)[step] for step in range(2)]
    found = by_sample(loaded[0].batch) | by_sample(loaded[1].batch)
    assert sorted(found) == list(range(len(PATHS)))
    for i, path in enumerate(PATHS):
        if path == "gone.npy":
            assert not any(leaf.any() for leaf in arrays(found[i]))
        else:
            (expected,) = made.signals(i, epoch=0)
            assert is_same(found[i], expected) and [x.dtype for x in arrays(found[i])] == [
                x.dtype for x in arrays(expected)
            ]
    assert [bad.id for step in loaded for bad in step.bad] == ["records.jsonl:6"]
    weights = sum(step.batch.signal_weights.sum() for step in loaded)
    assert weights == len(PATHS) - 1


@pytest.mark.parametrize(("representation", "encoder"), IMAGES[1:3])
def test_images_from_any_step_equal_those_of_the_whole_run(folder: Path, representation: str, encoder: str) -> None:
    made = source(dataset(folder, representation, encoder), 4)
    assert_equal(list(steps_from(made, 0))[1:], steps_from(made, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("representation", "encoder"), IMAGES[1:3])
def test_worker_processes_make_the_same_images_from_any_step(folder: Path, representation: str, encoder: str) -> None:
    made = source(dataset(folder, representation, encoder), 4)
    expected = list(steps_from(made, 1))
    assert [bad.id for loaded in expected for bad in loaded.bad].count("records.jsonl:6") >= 1
    assert isinstance(expected[0].batch.signals["ecg"], dict) == (encoder == "siglip2")
    assert_equal(steps_from(made, 1, workers=2), expected)


@pytest.mark.parametrize(("representation", "encoder"), [("signal", None), *IMAGES[1:3]])
def test_augmentation_is_of_seed_epoch_and_recording(folder: Path, representation: str, encoder: str | None) -> None:
    made, again = (dataset(folder, representation, encoder) for _ in range(2))
    other = dataset(folder, representation, encoder, seed=1)
    epochs = range(6)

    def changed(a: Dataset, b: Dataset, shift: int) -> float:
        """The part of recordings and epochs whose signals differ."""
        pairs = [(a.signals(i, e)[0], b.signals(i, e + shift)[0]) for i in range(3) for e in epochs]
        return float(np.mean([not is_same(x, y) for x, y in pairs]))

    assert changed(made, again, 0) == 0
    assert changed(made, made, 1) > 0.4 and changed(made, other, 0) > 0.4
    for epoch in epochs:  # the two records of one recording; and what is no recording
        assert is_same(made.signals(0, epoch)[0], made.signals(3, epoch)[0])
        for sentinel in (4, 5):
            assert is_same(made.signals(sentinel, epoch)[0], made.signals(sentinel)[0])
    assert not is_same(made.signals(4)[0], made.signals(5)[0])


@pytest.mark.parametrize(("representation", "encoder"), [("signal", None), ("stacked_signal", "vit")])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(
    folder: Path, representation: str, encoder: str | None
) -> None:
    """Two steps are an epoch: a resume in the second epoch draws as the run that was never stopped."""
    whole = list(steps_from(source(dataset(folder, representation, encoder), 6), 0))
    assert_equal(steps_from(source(dataset(folder, representation, encoder), 6), 3), whole[3:])
    epochs = [by_sample(whole[e].batch) | by_sample(whole[e + 1].batch) for e in (0, 2, 4)]
    recordings = [i for i, path in enumerate(PATHS) if path.endswith(".npy") and path != "gone.npy"]
    differ = [not is_same(a[i], b[i]) for a, b in zip(epochs, epochs[1:], strict=False) for i in recordings]
    assert sum(differ) >= 3


def test_the_hosts_draw_alike(folder: Path) -> None:
    made = dataset(folder, "stacked_signal", "vit")
    whole = by_sample(source(made, 2)[1].batch)
    parts = [by_sample(source(made, 2, parts=(p,), ways=2)[1].batch) for p in range(2)]
    assert {i: True for i in whole} == {i: is_same(x, whole[i]) for part in parts for i, x in part.items()}


def test_validation_is_never_augmented(tmp_path: Path) -> None:
    from elm_jax.assemble import assemble
    from elm_jax.config import resolve

    for i in range(20):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).normal(size=(12, LENGTH)).astype(np.float32))
    write_records(tmp_path, [TURNS] * 20, [f"{i}.npy" for i in range(20)])
    config = resolve({
        "elm": "base_elf", "llm": {"name": "demo", "scratch": {
            "hidden": 16, "layers": 1, "heads": 2, "mlp": 16, "max_len": 128}},
        "data": {"names": ["records.jsonl"], "root": str(tmp_path), "val_fraction": 0.5, "segment_len": LENGTH,
                 "max_len": 128, "augment_ecg": True},
    })  # fmt: skip
    made = assemble(config)
    train, val = made.dataset("train"), made.dataset("val")
    assert len(train) and len(val)
    for epoch in range(4):
        assert all(is_same(val.signals(i, epoch)[0], val.signals(i)[0]) for i in range(len(val)))
    assert any(not is_same(train.signals(i, e)[0], train.signals(i)[0]) for e in range(4) for i in range(len(train)))
