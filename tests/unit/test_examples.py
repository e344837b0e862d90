"""The picture of examples, where the model was shown no ECG and a recording is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import RATE, SECONDS, fake_config
from texts import chat_tokenizer, write_records

from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.evaluation import examples

TURNS = [{"from": "human", "value": "Is the rhythm regular?"}, {"from": "gpt", "value": "yes"}]


def drawn(folder: Path, present: int, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> list[int]:
    """How many examples each picture has, of four records, of which the first so many have their recording."""
    for i in range(present):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).normal(size=(12, SECONDS * RATE)))
    write_records(folder, [TURNS] * 4, [f"{i}.npy" for i in range(4)], split="test")
    config = fake_config(data__names=["records.jsonl"], data__root=str(folder), **keys)
    text = text_spec(config.data, "qwen2", 1, "sft", ())
    records = load_records(config.data, "test", 0)
    dataset = Dataset(records, chat_tokenizer(), text, signal_spec(config.data, 0))
    predictions = [{"id": f"records.jsonl:{i}#0", "name": "x", "answer": "yes", "truth": "yes"} for i in range(4)]
    pictures: list[int] = []
    monkeypatch.setattr(examples, "gallery", lambda shown, *_: pictures.append(len(shown)))
    examples.draw_examples(folder / "examples.png", dataset, predictions)
    return pictures


@pytest.mark.parametrize("perturb", ["noise", "zeros", "only_text"])
def test_a_missing_recording_is_left_out_of_the_picture(
    perturb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drawn(tmp_path, 3, monkeypatch, data__perturb=perturb) == [3]


def test_without_any_recording_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(tmp_path, 0, monkeypatch, data__perturb="zeros") == []
