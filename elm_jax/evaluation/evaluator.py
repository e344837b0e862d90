"""Evaluate a run: generate answers on a split, score them, and score them again under controls.

The controls say what of a score is owed to the signal: `zeros` and `noise` replace every ECG, `text_only` leaves
it out, `shuffled` gives each question another recording that questions of its kind were asked about.

Records whose recording cannot be read or whose prompts do not fit are left out of all scores, within
`data.max_bad_records`.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from elm_jax.config import Config, EvalConfig
from elm_jax.data.dataset import Dataset
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.data.text import to_turns
from elm_jax.errors import UserError
from elm_jax.evaluation.metrics import aggregate, is_right, signal_dependence
from elm_jax.evaluation.paper import Example, gallery
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.training.run import read_json, write_json

SHUFFLES = 3  # ways to give each question another recording: one draw alone is a coarse estimate
EXAMPLES = 6  # ECGs in the picture


@dataclass(frozen=True)
class Question:
    """One answer to be generated: which record, which of its answers, and what is true."""

    record: int
    turn: int
    truth: str


Loaded = tuple[dict[Question, Prompt], dict[int, UserError]]  # prompts with ECGs, and records that cannot be read


def evaluate(config: Config, split: str = "test", which: str = "best") -> Path:
    """Evaluate the run in `config.workdir` on a split of `data.names`; returns the folder with the results.

    Writes `metrics.json`, `predictions.jsonl` and `examples.png` into `eval/<datasets>-<split>/`: the scores of the
    real ECGs before the controls are run, and all of it again with them.

    Raises:
        UserError: no checkpoint, no such split, or too many records that cannot be evaluated.
    """
    model, options, progress = TrainedModel(config, which), config.eval, config.log.progress
    out = results_folder(config, split)
    started = time.perf_counter()
    dataset = model.assembly.dataset(split)
    bad = _BadRecords(dataset, config.data.max_bad_records)
    asked = list(islice(_questions(dataset, model.assembly.llm.max_len - options.max_new_tokens, bad), options.limit))
    found = _predictions(model, _Source(dataset, "real"), asked, options, progress, bad)
    questions = [question for question in asked if question.record not in bad.found]
    if not questions:
        raise UserError(f"split {split}", "no question that can be asked", "at least one", "mend the data")
    conditions = {"real": [found[question] for question in questions]}

    def results() -> dict[str, Any]:
        return _results(conditions, model, split, len(bad.found), time.perf_counter() - started)

    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in conditions["real"])
        write_json(out / "metrics.json", results())
        _draw(out / "examples.png", dataset, questions, conditions["real"])
    records = sorted({question.record for question in questions})
    for name in options.controls:
        conditions[name] = []
        for draw in range(SHUFFLES if name == "shuffled" else 1):
            found = _predictions(model, _Source(dataset, name, draw, records), questions, options, progress)
            conditions[name] += [found[question] for question in questions]
    if jax.process_index() == 0:
        write_json(out / "metrics.json", whole := results())
        print(summary(whole), file=sys.stderr)
        print(f"results are in {out}", file=sys.stderr)
    return out


def is_evaluated(config: Config, split: str) -> bool:
    """Whether the results of this split are there, with all the controls asked for."""
    path = results_folder(config, split) / "metrics.json"
    return path.is_file() and set(config.eval.controls) <= set(read_json(path)["controls"])


def results_folder(config: Config, split: str) -> Path:
    """Where the evaluation of a split of `data.names` is: `eval/<datasets>-<split>` in the run's folder."""
    names = "_".join(Path(name.partition(":")[0]).stem for name in config.data.names)
    return Path(config.workdir) / "eval" / f"{names}-{split}"


def summary(results: Mapping[str, Any]) -> str:
    """The scores as a small table: with the ECG, under each control, and of the best blind answers."""
    columns = {
        "score": results["metrics"],
        **results["controls"],
        **{
            name: {m: {"value": v} for m, v in scores.items()}
            for name, scores in results["baselines"].items()
        },
    }
    width = max(len(name) for name in results["metrics"])
    lines = [" " * width + "".join(f"{name:>11}" for name in columns)]
    for metric in results["metrics"]:
        cells = (
            f"{scores[metric]['value']:>11.3f}" if metric in scores else " " * 11
            for scores in columns.values()
        )
        lines.append(f"{metric:<{width}}" + "".join(cells))
    return "\n".join(lines)


class _BadRecords:
    """Records that cannot be evaluated: each is named on stderr, and one too many is an error."""

    def __init__(self, dataset: Dataset, limit: float) -> None:
        self.dataset, self.allowed = dataset, limit * len(dataset)
        self.found: set[int] = set()

    def note(self, record: int, error: UserError) -> None:
        if record in self.found:
            return
        self.found.add(record)
        name = f"record {self.dataset.records[record].id}"
        where = error.where if error.where.startswith("record ") else f"{name}: {error.where}"
        if len(self.found) > self.allowed:
            limit = f"{self.allowed:g} records may be bad (--config.data.max_bad_records)"
            raise UserError(where, error.found, error.expected, f"{error.fix}; at most {limit}")
        if jax.process_index() == 0:
            print(f"left out: {UserError(where, error.found, error.expected, error.fix)}", file=sys.stderr)


def _questions(dataset: Dataset, room: int, bad: _BadRecords) -> Iterator[Question]:
    """The questions of all records whose prompts leave room for an answer: have at most `room` tokens."""
    for record in range(len(dataset)):
        try:
            prompts = dataset.prompts(record)
            _check_lengths(f"record {dataset.records[record].id}", [len(prompt.ids) for prompt, _ in prompts], room)
        except UserError as error:
            bad.note(record, error)
            continue
        for turn, (_, truth) in enumerate(prompts):
            yield Question(record, turn, truth)


def _check_lengths(where: str, lengths: Sequence[int], room: int) -> None:
    if max(lengths) > room:
        expected = f"at most {room}, the model's context less eval.max_new_tokens"
        fix = "shorten it, or lower --config.eval.max_new_tokens"
        raise UserError(where, f"a prompt of {max(lengths)} tokens", expected, fix)
    if min(lengths) == 0:
        fix = "leave text_only out of --config.eval.controls, or use a tokenizer with a bos token"
        raise UserError(where, "a prompt without a token", "a token to go on from", fix)


def _predictions(
    model: TrainedModel,
    source: _Source,
    questions: Sequence[Question],
    options: EvalConfig,
    progress: bool,
    bad: _BadRecords | None = None,
) -> dict[Question, dict[str, Any]]:
    """What was answered: id, name, patient, prompt, answer, truth, seconds. Bad records go to `bad`, or raise."""
    lengths = [len(source.prompt(q).ids) for q in questions]
    if lengths:
        _check_lengths(f"condition {source.condition}", lengths, model.assembly.llm.max_len - options.max_new_tokens)
    order = np.argsort(lengths, kind="stable")  # like lengths together: less padding, few shapes
    starts = range(0, len(order), options.batch_size)
    batches = [[questions[i] for i in order[start : start + options.batch_size]] for start in starts]
    predictions: dict[Question, dict[str, Any]] = {}
    shown = tqdm(_read_ahead(source, batches), source.condition, len(batches), disable=not progress, unit="batch")
    for number, (loaded, unread) in enumerate(shown):
        prompts: dict[Question, Prompt] = {}
        for question, prompt in loaded.items():
            try:
                prompts[question] = model.written(prompt, options.max_new_tokens)
            except UserError as error:
                unread[question.record] = error
        for record, error in unread.items():
            if bad is None:
                raise error
            bad.note(record, error)
        if not prompts:
            continue
        begun = time.perf_counter()
        answers = model.answers(list(prompts.values()), options, seed=number)
        seconds = (time.perf_counter() - begun) / len(prompts)
        for (question, prompt), answer in zip(prompts.items(), answers, strict=True):
            predictions[question] = _prediction(source.dataset, question, prompt.rendered.prompt, answer, seconds)
    return predictions


def _read_ahead(source: _Source, batches: Sequence[Sequence[Question]]) -> Iterator[Loaded]:
    """What each batch loads; the next one is read while the model answers this one."""
    with ThreadPoolExecutor(1) as reader:
        pending: deque[Future[Loaded]] = deque()
        for batch in batches:
            pending.append(reader.submit(source.load, batch))
            if len(pending) == 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _prediction(
    dataset: Dataset, question: Question, prompt: str, answer: str, seconds: float
) -> dict[str, Any]:
    record = dataset.records[question.record]
    return {
        "id": f"{record.id}#{question.turn}",
        "name": record.name,
        "patient": record.patient,
        "prompt": prompt,
        "answer": answer,
        "truth": question.truth,
        "seconds": round(seconds, 6),
    }


class _Source:
    """Prompts with ECGs under one condition: `real` or a control; `records`: whose recordings are shuffled."""

    def __init__(
        self, dataset: Dataset, condition: str, seed: int = 0, records: Iterable[int] | None = None
    ) -> None:
        self.condition = condition
        text, signal = dataset.text, dataset.signal
        if condition == "text_only":
            text = replace(text, signal_tokens=0)
        elif condition in ("zeros", "noise"):
            signal = replace(signal, perturb=condition)
        self.dataset = Dataset(dataset.records, dataset.tokenizer, text, signal)
        self.other = shuffled_recordings(dataset, seed, records) if condition == "shuffled" else None

    def prompt(self, question: Question) -> Any:
        return self.dataset.prompts(question.record)[question.turn][0]

    def load(self, questions: Sequence[Question]) -> Loaded:
        """Prompts with their ECGs; a recording that several questions are about is read once."""
        read: dict[tuple[str, int], Any] = {}
        prompts: dict[Question, Prompt] = {}
        unread: dict[int, UserError] = {}
        for question in questions:
            rendered = self.prompt(question)
            recordings = self._recordings(question.record)[: len(rendered.signal_positions)]
            try:
                prompts[question] = Prompt(rendered, [self._signal(path, key, read) for path, key in recordings])
            except UserError as error:
                unread[question.record] = error
        return prompts, unread

    def _signal(self, path: str, key: int, read: dict[tuple[str, int], Any]) -> Any:
        at = (path, key if path in (NOISE, FLATLINE) else 0)
        if at not in read:
            read[at] = self.dataset.signal.load(path, key)
        return read[at]

    def _recordings(self, record: int) -> list[tuple[str, int]]:
        if self.dataset.text.signal_tokens == 0:
            return []
        if self.other is not None:
            return self.other[record]
        paths = self.dataset.records[record].ecg_paths
        return [(path, self.dataset.key(record, place)) for place, path in enumerate(paths)]


def shuffled_recordings(
    dataset: Dataset, seed: int = 0, among: Iterable[int] | None = None
) -> dict[int, list[tuple[str, int]]]:
    """Record -> the recordings (path, noise key) that it is asked about instead: those of another patient.

    Only the records `among` (None: all) take part.

    Within records of one `name` and number of ECGs, patients are put in random order and all recordings move on by as
    many places as the patient with the most has. So each recording is given away once, answers of each kind stay as
    frequent as they were, and a question keeps its patient only where one patient has half of the recordings.
    """
    kinds: dict[tuple[str, int], dict[str, dict[Any, list[int]]]] = {}
    for i in range(len(dataset.records)) if among is None else among:
        record = dataset.records[i]
        blank = any(path in (NOISE, FLATLINE) for path in record.ecg_paths)
        recording = (record.ecg_paths, record.id if blank else "")
        patients = kinds.setdefault((record.name, len(record.ecg_paths)), {})
        patients.setdefault(record.patient, {}).setdefault(recording, []).append(i)
    rng = np.random.default_rng(seed)
    given: dict[int, list[tuple[str, int]]] = {}
    for patients in kinds.values():
        people = [list(patients.values())[i] for i in rng.permutation(len(patients))]
        places = [(recording, asked) for recordings in people for recording, asked in recordings.items()]
        step = max(len(recordings) for recordings in people)
        for place, (_, asked) in enumerate(places):
            (paths, _), source = places[(place + step) % len(places)]
            instead = [(path, dataset.key(source[0], n)) for n, path in enumerate(paths)]
            given |= dict.fromkeys(asked, instead)
    return given


def _results(
    conditions: Mapping[str, list[dict[str, Any]]], model: TrainedModel, split: str, bad: int, seconds: float
) -> dict[str, Any]:
    results = aggregate(conditions["real"])
    controls = {name: aggregate(p)["metrics"] for name, p in conditions.items() if name != "real"}
    result = {
        **results,
        "controls": controls,
        "bad": bad,
        "split": split,
        "step": model.step,
        "seconds": round(seconds, 1),
    }
    if "shuffled" in conditions:
        result["signal_dependence"] = signal_dependence(conditions["real"], conditions["shuffled"])
    return result


def _draw(
    path: Path, dataset: Dataset, questions: Sequence[Question], predictions: Sequence[Mapping[str, Any]]
) -> None:
    """A picture of questions with ECGs: every kind of question in turn, spread over the split.

    The ECGs are drawn as recorded, whatever the model was shown; one that cannot be read is left out.
    """
    by_name: dict[str, list[int]] = {}
    for i, prediction in enumerate(predictions):
        if dataset.records[questions[i].record].ecg_paths:
            by_name.setdefault(prediction["name"], []).append(i)
    chosen: list[int] = []
    for place in range(EXAMPLES if by_name else 0):  # the kinds take turns, each moving on through the split
        group = list(by_name.values())[place % len(by_name)]
        chosen.append(group[place * len(group) // EXAMPLES])
    examples = []
    for i in dict.fromkeys(chosen):
        question, record = questions[i], dataset.records[questions[i].record]
        prediction = predictions[i]
        asked = [turn.text for turn in to_turns(record.text) if turn.role == "user"]
        try:
            signal = dataset.signal.load_raw(record.ecg_paths[0], dataset.key(question.record))
        except UserError:  # with data.perturb nothing has read it before
            continue
        right = is_right(record.name, prediction["answer"], prediction["truth"])
        text = asked[min(question.turn, len(asked) - 1)] if asked else ""
        examples.append(Example(signal, text, prediction["answer"], prediction["truth"], right))
    if examples:
        gallery(examples, dataset.signal.sampling_rate, path)
