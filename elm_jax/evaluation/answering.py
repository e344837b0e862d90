"""Asking a model: questions in chunks, under a condition, with answers kept as they come."""

from __future__ import annotations

import itertools
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
from tqdm import tqdm

from elm_jax import stopping
from elm_jax.config import EvalConfig
from elm_jax.data.dataset import Dataset
from elm_jax.errors import UserError
from elm_jax.evaluation.controls import Loaded, Question, Recording, Source
from elm_jax.evaluation.store import AnswerFile
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.inference.speaker import Answer
from elm_jax.runtime import distributed
from elm_jax.scoring.ecg_qa import answer_list, is_ecg_qa
from elm_jax.text.turns import steps, to_turns

BATCHES = 8  # of a chunk: what is asked again at most after a stop, and what is read ahead


class BadRecords:
    """Records that cannot be evaluated: each is named on stderr, and one too many is an error.

    keep: what else to do with a new one.
    """

    def __init__(self, dataset: Dataset, limit: float) -> None:
        self.dataset, self.allowed = dataset, limit * len(dataset)
        self.found: set[int] = set()
        self.keep: Callable[[int, UserError], None] | None = None

    def note(self, record: int, error: UserError) -> None:
        """Leave a record out. Raises UserError if there are too many."""
        if record in self.found:
            return
        self.found.add(record)
        name = f"record {self.dataset.records[record].id}"
        where = error.where if error.where.startswith("record ") else f"{name}: {error.where}"
        if len(self.found) > self.allowed:
            limit = f"{self.allowed:g} records may be bad (--config.data.max_bad_records)"
            raise UserError(where, error.found, error.expected, f"{error.fix}; at most {limit}")
        told = UserError(where, error.found, error.expected, error.fix)
        if jax.process_index() == 0:
            tqdm.write(f"left out: {told}", file=sys.stderr)
        if self.keep is not None:
            self.keep(record, told)


@dataclass(frozen=True)
class Task:
    """Questions to be asked under one condition. `marks` tell its answers from those of other runs in the file."""

    source: Source
    questions: Sequence[Question]
    seed: int
    marks: dict[str, int]


class Asker:
    """Asks the tasks of an evaluation, one after the other, with a bar that shows the time left for all of them."""

    def __init__(self, model: TrainedModel, options: EvalConfig, total: int, progress: bool) -> None:
        self.model, self.options = model, options
        self._bar = tqdm(total=total, unit="answers", disable=not progress or jax.process_index() > 0, smoothing=0)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def answers(self, task: Task, file: AnswerFile | None, bad: BadRecords | None = None) -> dict[Question, Any]:
        """Question -> prediction. Known ones are taken out of `file`, others added to it.

        A process without a file takes part and gets nothing: it does not know what was answered before. A record that
        cannot be read goes to `bad`, or raises.
        """
        self._bar.set_description(task.source.condition)
        chunks = chunks_of(task.source, task.questions, BATCHES * self.options.batch_size)
        known = bad.found if bad else set()
        ids = {q: _id(task, q) for q in task.questions}
        asked_for = [[ids[q] for q in chunk if q.record not in known] for chunk in chunks]
        left_out = {ids[q] for q in task.questions if q.record in known}
        kept = file.take(asked_for, left_out) if file else []
        done = int(distributed.gather(file.whole if file else 0)[0])
        by_id = {line["id"]: line for line in kept}
        predictions = {q: by_id[ids[q]] for q in task.questions if ids[q] in by_id}
        self._pass_over(sum(len(chunk) for chunk in chunks[:done]))
        seed = zlib.crc32(f"{task.seed}:{task.source.condition}".encode())
        rest = [[q for q in chunk if q.record not in known] for chunk in chunks[done:]]
        for loaded in _read_ahead(task.source, rest):
            prompts = self._prompts(ids, loaded, bad)
            asked = list(prompts)
            self.model.engine.prefills.forget()  # so that a chunk comes out the same whatever went before it
            stream = self.model.stream(prompts.values(), self.options, seed) if prompts else ()
            for answer in stopping.each(stream, f"{task.source.condition} answer"):
                question = asked[answer.number]
                if file:
                    predictions[question] = _prediction(task, ids[question], question, prompts[question], answer)
                    file.append(predictions[question])
                self._bar.update()
        return predictions

    def _pass_over(self, count: int) -> None:
        """Answers that are there already: the rate, and so the time left, is that of answers made now."""
        self._bar.update(count)
        if not self._bar.disable:
            self._bar.initial += count

    def _prompts(
        self, ids: Mapping[Question, str], loaded: Loaded, bad: BadRecords | None
    ) -> dict[Question, Prompt]:
        """The prompts of a chunk, but for those that a process cannot read. All of them must call it together."""
        unread = _anywhere(loaded[1])
        for record, error in unread.items():
            if bad is None:
                raise error
            bad.note(record, error)
        # What is drawn depends on the question, not on those that are asked beside it.
        return {
            q: replace(self.model.written(prompt, self.options.max_new_tokens), draws=(_number(ids[q]),))
            for q, prompt in loaded[0].items()
            if q.record not in unread
        }


def chunks_of(source: Source, questions: Sequence[Question], size: int) -> list[list[Question]]:
    """The questions in chunks of at most `size`. What this depends on is the questions and their ECGs alone.

    Those about the same ECGs stand together in one chunk, unless they alone are more than a chunk: an ECG is read, and
    goes through the model, once a chunk. ECGs whose longest prompts are of like length follow each other: less
    padding, few shapes.
    """
    by_ecgs: dict[tuple[Recording, ...], list[Question]] = {}
    for record, asked in itertools.groupby(questions, lambda question: question.record):
        by_ecgs.setdefault(source.about(record), []).extend(asked)
    chunks: list[list[Question]] = [[]]
    for together in sorted(by_ecgs.values(), key=lambda asked: max(question.tokens for question in asked)):
        for part in (together[start : start + size] for start in range(0, len(together), size)):
            if len(chunks[-1]) + len(part) > size:
                chunks.append([])
            chunks[-1] += part
    return [chunk for chunk in chunks if chunk]


def _anywhere(errors: Mapping[int, UserError]) -> dict[int, UserError]:
    """Record -> what is wrong with it, of all processes: one that cannot read a file must not go its own way."""
    found: dict[int, UserError] = {}
    for part in distributed.gather([(record, *error.parts) for record, error in errors.items()]):
        for record, *parts in part:
            found.setdefault(record, UserError(*parts))
    return dict(sorted(found.items()))


def check_lengths(where: str, lengths: Sequence[int], room: int, key: str = "eval.max_new_tokens") -> None:
    """Raise UserError unless all prompts have a token and at most `room`: what `key` leaves of the context."""
    if max(lengths) > room:
        expected = f"at most {room}, the model's context less {key}"
        fix = f"shorten it, or lower --config.{key} (or data.min_ecg_tokens, where ECGs are symbols)"
        raise UserError(where, f"a prompt of {max(lengths)} tokens", expected, fix)
    if min(lengths) == 0:
        fix = "leave text_only out of --config.eval.controls, or use a tokenizer with a bos token"
        raise UserError(where, "a prompt without a token", "a token to go on from", fix)


def question_answers(text: Any) -> list[tuple[str, str]]:
    """(question, answer) for each answer that a record's text has; a text without questions has empty ones."""
    found, question = [], ""
    for turn in to_turns(text):
        if turn.role == "user":
            question = turn.text
        elif turn.role == "assistant" and turn.text:
            found.append((question, turn.text))
    return found


def _read_ahead(source: Source, chunks: Sequence[Sequence[Question]]) -> Iterator[Loaded]:
    """What each chunk loads; the next one is read while the model answers this one."""
    with ThreadPoolExecutor(1) as reader:
        pending: deque[Future[Loaded]] = deque()
        for chunk in chunks:
            pending.append(reader.submit(source.load, chunk))
            if len(pending) == 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _number(name: str) -> int:
    return zlib.crc32(name.encode()) >> 1


def _id(task: Task, question: Question) -> str:
    return f"{task.source.dataset.records[question.record].id}#{question.turn}"


def _prediction(task: Task, name: str, question: Question, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    record = task.source.dataset.records[question.record]
    asked = question_answers(record.text)
    answers = answer_list(record.text)
    # In a table that names its records otherwise, the text itself says what type of ECG-QA a question is.
    kind = {"question_type": record.text[0]} if answers and is_ecg_qa(str(record.text[0])) else {}
    named = steps(record.text)
    return {
        "id": name,
        **task.marks,
        "name": named[min(question.turn, len(named) - 1)] or record.name if named else record.name,
        "patient": record.patient,
        **kind,
        **record.fields,
        "question": asked[min(question.turn, len(asked) - 1)][0] if asked else "",
        "prompt": prompt.rendered.prompt,
        "answer": answer.text,
        "truth": question.truth,
        **({"answers": answers} if answers else {}),
        "ended": answer.ended,
        **({"ecg_tokens_cut": prompt.cut} if prompt.cut else {}),
        "seconds": round(answer.seconds, 6),
    }
