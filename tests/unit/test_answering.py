"""Which questions are asked together, what is read and rendered for them, and several processes that read them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_model import RATE, SECONDS, Asked, fake_config

from elm_jax.data.dataset import Dataset
from elm_jax.data.ecg_tokens import EcgTokens
from elm_jax.data.represent import SignalSpec
from elm_jax.errors import UserError
from elm_jax.evaluation import answering, evaluator
from elm_jax.evaluation.answering import chunks_of
from elm_jax.evaluation.controls import Question, Source
from elm_jax.runtime import distributed

RECORDINGS, PER, BATCH = 9, 5, 2  # three questions about a recording are one record's; a chunk has 16
CONDITIONS = ("real", "zeros", "noise", "text_only", "shuffled")


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    """A model with questions of many lengths; records of one recording stand far from each other."""
    for name in ("write_report", "draw_examples"):
        monkeypatch.setattr(evaluator, name, lambda *_: None)
    rng, texts = np.random.default_rng(0), []
    for turns in (3, 1, 1):
        for _ in range(RECORDINGS):
            words = [" ".join(["Is it so"] * int(rng.integers(1, 9))) for _ in range(turns)]
            texts.append([{"from": who, "value": said} for w in words for who, said in (("human", w), ("gpt", "yes"))])
    rows = [
        {"ecg_path": f"ecg_{i % RECORDINGS}.npy", "text": text, "name": "x", "patient_id": str(i % RECORDINGS),
         "split": "test"}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(RECORDINGS):
        np.save(tmp_path / f"ecg_{i}.npy", rng.normal(size=(12, SECONDS * RATE)))

    def make(**keys: Any) -> Asked:
        data = {"data__names": ["records.jsonl"], "data__root": str(tmp_path), "log__progress": False}
        settings = {**data, "workdir": str(tmp_path / "run"), "eval__batch_size": BATCH}
        model = Asked(fake_config(**{**settings, **keys}), 512)
        monkeypatch.setattr(evaluator, "TrainedModel", lambda *_: model)
        return model

    return make


def question_answers(dataset: Dataset) -> list[Question]:
    return [
        Question(record, turn, truth, len(prompt.ids))
        for record in range(len(dataset))
        for turn, (prompt, truth) in enumerate(dataset.prompts(record))
    ]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("draw", [0, 1])
def test_the_questions_about_an_ecg_are_asked_together_under_every_condition(
    ask: Callable[..., Asked], condition: str, draw: int
) -> None:
    dataset = ask().dataset("test")
    source, questions = Source(dataset, condition, draw), question_answers(dataset)
    chunks = chunks_of(source, questions, 16)
    assert sorted((q.record, q.turn) for chunk in chunks for q in chunk) == [(q.record, q.turn) for q in questions]
    assert max(map(len, chunks)) <= 16 and len(chunks) == 3, "chunks are as full as whole recordings make them"
    homes: dict[Any, set[int]] = {}
    for number, chunk in enumerate(chunks):
        for question in chunk:
            homes.setdefault(source.about(question.record), set()).add(number)
    assert len(homes) == RECORDINGS and all(len(found) == 1 for found in homes.values())
    longest = [max(q.tokens for q in chunk) for chunk in chunks]
    assert longest == sorted(longest)
    assert chunks_of(source, questions, 16) == chunks


def test_an_ecg_with_more_questions_than_a_chunk_has_chunks_of_its_own(ask: Callable[..., Asked]) -> None:
    dataset = ask().dataset("test")
    chunks = chunks_of(Source(dataset, "real"), question_answers(dataset), 4)
    assert [len(chunk) for chunk in chunks] == [4, 1] * RECORDINGS
    assert chunks_of(Source(dataset, "real"), [], 4) == []


def test_each_condition_reads_a_recording_once_and_renders_a_record_once(
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, rendered = Counter[str](), Counter[int]()
    load, prompts = SignalSpec.load, Dataset.prompts
    monkeypatch.setattr(SignalSpec, "load", lambda s, path, *rest: read.update([path]) or load(s, path, *rest))
    monkeypatch.setattr(Dataset, "prompts", lambda self, i: rendered.update([i]) or prompts(self, i))
    model = ask()
    evaluator.evaluate(model.config)
    asked = 3 + evaluator.SHUFFLES  # with an ECG
    assert len(model.prompts) == RECORDINGS * PER * (asked + 1)
    assert set(read.values()) == {asked} and len(read) == RECORDINGS
    # To measure it, and each time that it is asked; of the first alone it is seen whether it goes without an ECG.
    assert rendered == {i: 1 + asked + 1 + (i == 0) for i in range(3 * RECORDINGS)}


def second_process(monkeypatch: pytest.MonkeyPatch, condition: str) -> None:
    """Another process that cannot read the recording of record 7 under a condition, and sees the rest as this one."""
    now, load = [""], Source.load

    def loaded(self: Source, questions: Any) -> Any:
        now[0] = self.condition if any(question.record == 7 for question in questions) else ""
        return load(self, questions)

    def gather(value: Any) -> list[Any]:
        unread = value == [] and now[0] == condition
        return [value, [[7, "far/ecg_7.npy", "no file", "a recording", "copy it"]] if unread else value]

    monkeypatch.setattr(Source, "load", loaded)
    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(answering, "_read_ahead", lambda source, chunks: map(source.load, chunks))


def test_what_another_process_cannot_read_is_left_out_here_too(
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second_process(monkeypatch, "real")
    model = ask(eval__controls=["zeros"], data__max_bad_records=0.1)
    out = evaluator.evaluate(model.config)
    lost = model.dataset("test").records[7].id
    assert f"left out: record {lost}: far/ecg_7.npy: found no file" in capsys.readouterr().err
    lines = (out / "predictions.jsonl").read_text() + (out / "controls" / "zeros.jsonl").read_text()
    assert f'"{lost}#' not in lines and len(lines.splitlines()) == len(model.prompts)
    assert len(model.prompts) == (RECORDINGS * PER - 3) * 2

    with pytest.raises(UserError, match=rf"record {lost}: far/ecg_7.npy: .*data.max_bad_records"):
        evaluator.evaluate(ask(eval__controls=[], workdir=str(out / "none may be bad")).config)


def test_what_another_process_cannot_read_under_a_control_ends_both(
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    second_process(monkeypatch, "zeros")
    with pytest.raises(UserError, match=r"far/ecg_7.npy: found no file"):
        evaluator.evaluate(ask(eval__controls=["zeros"], data__max_bad_records=0.1).config)


def test_processes_that_would_ask_other_questions_are_an_error(
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value + 1 if isinstance(value, int) else value])
    model = ask()
    with pytest.raises(UserError, match="process 1 than in process 0"):
        evaluator.evaluate(model.config)
    assert not model.prompts


class Symbols(EcgTokens):
    """A flat line is two symbols, any other ECG 150: of these `least` are kept."""

    def encode(self, signal: np.ndarray, eps: float) -> np.ndarray:
        return np.full(2 if np.ptp(signal) == 0 else 150, 5, np.int32)


def test_a_question_that_any_ecg_would_make_too_long_is_left_out_before_the_first_answer(
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ask(data__max_bad_records=0.99)
    tokens = Symbols(SimpleNamespace(fingerprint=""), np.arange(3), 100)  # type: ignore[arg-type]
    model.assembly.text = replace(model.assembly.text, signal_tokens=1)
    model.assembly.signal = replace(model.assembly.signal, representation="symbolic", tokens=tokens, perturb="zeros")
    model.assembly.llm.max_len = 240
    lengths = [(q.record, q.tokens) for q in question_answers(model.dataset("test"))]
    long = {record for record, length in lengths if length + 99 + 8 > 240}
    assert long and all(length + 1 + 8 <= 240 for _, length in lengths), "with their own flat lines all fit"
    out = evaluator.evaluate(model.config)
    assert json.loads((out / "metrics.json").read_text())["bad"] == len(long)
    kept = sum(record not in long for record, _ in lengths)
    assert kept and len(model.prompts) == kept * (4 + evaluator.SHUFFLES)


def test_a_prompt_that_is_nothing_without_its_ecg_is_an_error_before_any_answer(ask: Callable[..., Asked]) -> None:
    model = ask(phase="pretrain")
    model.assembly.text = replace(model.assembly.text, family="plain")
    model.assembly.tokenizer.bos_token = None
    with pytest.raises(UserError, match="condition text_only: found a prompt without a token"):
        evaluator.evaluate(model.config)
    assert not model.prompts
