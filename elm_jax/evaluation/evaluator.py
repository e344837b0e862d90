"""Evaluate a run: generate answers on a split, score them, and score them again under controls.

The controls say what of a score is owed to the signal: `zeros` and `noise` replace every ECG, `text_only` leaves
it out, `shuffled` gives each question another recording that questions of its kind were asked about.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from elm_jax.config import Config, EvalConfig
from elm_jax.data.dataset import Dataset
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.data.text import to_turns
from elm_jax.evaluation.metrics import aggregate, is_right, signal_dependence
from elm_jax.evaluation.paper import Example, gallery
from elm_jax.inference.model import Prompt, TrainedModel

SHUFFLES = 3  # ways to give each question another recording: one draw alone is a coarse estimate
EXAMPLES = 6  # ECGs in the picture


@dataclass(frozen=True)
class Question:
    """One answer to be generated: which record, which of its answers, and what is true."""

    record: int
    turn: int
    truth: str


def evaluate(config: Config, split: str = "test", which: str = "best") -> Path:
    """Evaluate the run in `config.workdir` on a split of `data.names`; returns the folder with the results.

    Writes `metrics.json`, `predictions.jsonl` and `examples.png` into `eval/<datasets>-<split>/`.

    Raises:
        UserError: no checkpoint, no such split, or a context too short.
    """
    model, options = TrainedModel(config, which), config.eval
    out = results_folder(config, split)
    started = time.perf_counter()
    dataset = model.assembly.dataset(split)
    questions = list(_questions(dataset))[: options.limit]
    conditions: dict[str, list[dict[str, Any]]] = {}
    for name in ("real", *options.controls):
        draws = range(SHUFFLES if name == "shuffled" else 1)
        sources = [_Source(dataset, name, seed) for seed in draws]
        answered = [_predictions(model, source, questions, options, config.log.progress) for source in sources]
        conditions[name] = [prediction for predictions in answered for prediction in predictions]
    results = _results(conditions, model, split, time.perf_counter() - started)
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in conditions["real"])
        (out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        _draw(out / "examples.png", dataset, questions, conditions["real"])
        print(summary(results), file=sys.stderr)
        print(f"results are in {out}", file=sys.stderr)
    return out


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


def _questions(dataset: Dataset) -> Iterator[Question]:
    for record in range(len(dataset)):
        for turn, (_, truth) in enumerate(dataset.prompts(record)):
            yield Question(record, turn, truth)


def _predictions(
    model: TrainedModel, source: _Source, questions: Sequence[Question], options: EvalConfig, progress: bool
) -> list[dict[str, Any]]:
    """One object per question, in order: id, name, patient, prompt, answer, truth, seconds."""
    lengths = [len(source.prompt(q).ids) for q in questions]
    order = np.argsort(lengths, kind="stable")  # like lengths together: less padding, few shapes
    batches = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
    predictions: dict[int, dict[str, Any]] = {}
    with ThreadPoolExecutor(1) as reader:  # reads the next batch while the model answers this one
        pending = reader.submit(source.load, [questions[i] for i in batches[0]])
        for number, batch in enumerate(tqdm(batches, desc=source.condition, disable=not progress, unit="batch")):
            prompts = pending.result()
            if number + 1 < len(batches):
                pending = reader.submit(source.load, [questions[i] for i in batches[number + 1]])
            begun = time.perf_counter()
            answers = model.answers(prompts, options, options.batch_size, seed=number)
            seconds = (time.perf_counter() - begun) / len(batch)
            for i, prompt, answer in zip(batch, prompts, answers, strict=True):
                predictions[int(i)] = _prediction(
                    source.dataset, questions[i], prompt.rendered.prompt, answer, seconds
                )
    return [predictions[i] for i in range(len(questions))]


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
    """Prompts with ECGs under one condition: `real` or a control."""

    def __init__(self, dataset: Dataset, condition: str, seed: int = 0) -> None:
        self.condition = condition
        text, signal = dataset.text, dataset.signal
        if condition == "text_only":
            text = replace(text, signal_tokens=0)
        elif condition in ("zeros", "noise"):
            signal = replace(signal, perturb=condition)
        self.dataset = Dataset(dataset.records, dataset.tokenizer, text, signal)
        self.other = shuffled_recordings(dataset, seed) if condition == "shuffled" else None

    def prompt(self, question: Question) -> Any:
        return self.dataset.prompts(question.record)[question.turn][0]

    def load(self, questions: Sequence[Question]) -> list[Prompt]:
        """Prompts with their ECGs; a recording that several questions are about is read once."""
        read: dict[tuple[str, int], np.ndarray] = {}
        prompts = []
        for question in questions:
            rendered = self.prompt(question)
            signals = []
            for path, key in self._recordings(question.record)[: len(rendered.signal_positions)]:
                at = (path, key if path in (NOISE, FLATLINE) or self.dataset.signal.perturb == "noise" else 0)
                if at not in read:
                    read[at] = self.dataset.signal.load(path, key)
                signals.append(read[at])
            prompts.append(Prompt(rendered, signals))
        return prompts

    def _recordings(self, record: int) -> list[tuple[str, int]]:
        if self.dataset.text.signal_tokens == 0:
            return []
        if self.other is not None:
            return self.other[record]
        paths = self.dataset.records[record].ecg_paths
        return [(path, self.dataset.key(record, place)) for place, path in enumerate(paths)]


def shuffled_recordings(dataset: Dataset, seed: int = 0) -> dict[int, list[tuple[str, int]]]:
    """Record -> the recordings (path, noise key) that it is asked about instead: those of another patient.

    Within records of one `name` and number of ECGs, patients are put in random order and all recordings move on by as
    many places as the patient with the most has. So each recording is given away once, answers of each kind stay as
    frequent as they were, and a question keeps its patient only where one patient has half of the recordings.
    """
    kinds: dict[tuple[str, int], dict[str, dict[Any, list[int]]]] = {}
    for i, record in enumerate(dataset.records):
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
    conditions: Mapping[str, list[dict[str, Any]]], model: TrainedModel, split: str, seconds: float
) -> dict[str, Any]:
    results = aggregate(conditions["real"])
    controls = {name: aggregate(p)["metrics"] for name, p in conditions.items() if name != "real"}
    result = {
        **results,
        "controls": controls,
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
    """A picture of questions with ECGs: every kind of question in turn, spread over the split."""
    by_name: dict[str, list[int]] = {}
    for i, prediction in enumerate(predictions):
        if dataset.records[questions[i].record].ecg_paths:
            by_name.setdefault(prediction["name"], []).append(i)
    if not by_name:
        return
    chosen: list[int] = []
    for place in range(EXAMPLES):  # the kinds take turns, each moving on through the split
        group = list(by_name.values())[place % len(by_name)]
        chosen.append(group[place * len(group) // EXAMPLES])
    examples = []
    for i in dict.fromkeys(chosen):
        question, record = questions[i], dataset.records[questions[i].record]
        prediction = predictions[i]
        asked = [turn.text for turn in to_turns(record.text) if turn.role == "user"]
        signal = dataset.signal.load_raw(record.ecg_paths[0], dataset.key(question.record))
        right = is_right(record.name, prediction["answer"], prediction["truth"])
        text = asked[min(question.turn, len(asked) - 1)] if asked else ""
        examples.append(Example(signal, text, prediction["answer"], prediction["truth"], right))
    gallery(examples, dataset.signal.sampling_rate, path)
