"""Pairs for preference objectives: two answers that a model draws itself, and which of them is better."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from elm_jax.config import Config, lasting
from elm_jax.data.sources import Record
from elm_jax.errors import UserError
from elm_jax.evaluation.answering import BadRecords, check_lengths
from elm_jax.evaluation.store import AnswerFile
from elm_jax.inference.model import Prompt, TrainedModel
from elm_jax.objectives.policy import judge_of
from elm_jax.scoring.rewards import judged
from elm_jax.text.turns import Turn, last_answer
from elm_jax.text.write import THINK_PREFIX
from elm_jax.weights.judge import PairJudge

Margin = Callable[[Record, str, str, str], float]  # (record, truth, one, other) -> how much better the one is
_BAD = "data.max_bad_records"
_LINE = {"id": str, "left": str, "pair": dict}  # of the file that pairs come into


class Judged(NamedTuple):
    """What has become of a record: a pair, as a record for `dpo`; or none ({}), and why it was left out."""

    record: int
    pair: dict[str, Any]
    left: str = ""


def by_rewards(config: Config) -> Margin:
    """By `rl.rewards`.

    Raises:
        UserError: there is no such reward. Of a margin: a reward fails, or is no finite number.
    """
    reward = judge_of(config)

    def margin(record: Record, truth: str, one: str, other: str) -> float:
        return sum(judged(reward, record, one, truth).values()) - sum(judged(reward, record, other, truth).values())

    return margin


def by_model(judge: PairJudge) -> Margin:
    """By a model, which reads the conversation but sees no ECG."""

    def margin(record: Record, truth: str, one: str, other: str) -> float:
        turns, _ = last_answer(record.text)
        alone = len(turns) == 1
        return judge.margin(
            "\n".join(turn.text if alone else f"{turn.role}: {turn.text}" for turn in turns), one, other
        )

    return margin


def draw_pairs(
    config: Config,
    split: str = "train",
    which: str = "best",
    margin: Margin | None = None,
    kept: Path | None = None,
    by: str = "rewards",
) -> Iterator[Judged]:
    """Of each record's last question two answers, drawn as `rl.*` says, and judged: the better one is the chosen one.

    What is drawn depends on the seed and the record. Left out are answers that are alike, of which one is empty, or
    none is better.

    Args:
        margin: by what they are judged; None: `by_rewards`. by: what tells it from others.
        kept: a file that they are written to as they come; what it holds of a call before this one comes first, and is
            not drawn again.
    Raises:
        UserError: as `TrainedModel`; rl.max_new_tokens leaves no room for a prompt; more records are bad (too long, for
            one) than data.max_bad_records allows; or what is `kept` was drawn otherwise.
    """
    margin = margin or by_rewards(config)
    model, rl = TrainedModel(config, which), config.rl
    context = model.assembly.llm.max_len
    room = context - rl.max_new_tokens
    if room < 1:
        fix = "lower --config.rl.max_new_tokens"
        raise UserError("rl.max_new_tokens", str(rl.max_new_tokens), f"less than the model's context, {context}", fix)
    dataset = model.assembly.dataset(split)
    bad = BadRecords(dataset, config.data.max_bad_records)
    options = replace(
        config.eval, temperature=rl.temperature, top_p=rl.top_p, max_new_tokens=rl.max_new_tokens,
        batch_size=rl.batch_size, repetition_penalty=1.0,
    )  # fmt: skip
    asked: list[tuple[int, str]] = []  # of each prompt its record and the truth
    settings = {name: value for name, value in lasting(config).items() if name != _BAD}  # more may be bad later on
    told = repr((settings, config.eval.ema, str(model.folder), model.step, split, dataset.fingerprint, by))
    file = kept and _opened(kept, hashlib.sha256(told.encode()).hexdigest())
    lines = file.lines[1:] if file else []
    done = {int(line["id"]): Judged(int(line["id"]), line["pair"], line["left"]) for line in lines}
    yield from done.values()

    def prompts() -> Iterator[Prompt]:
        for i in range(len(dataset)):
            if i in done:
                continue
            try:
                rendered, truth = dataset.prompts(i)[-1]
                check_lengths(f"record {dataset.records[i].id}", [dataset.room(rendered)], room, "rl.max_new_tokens")
                draws = tuple(zlib.crc32(f"{i}:{answer}".encode()) >> 1 for answer in range(2))
                prompt = model.written(Prompt(rendered, dataset.signals(i), draws=draws), rl.max_new_tokens)
            except UserError as error:
                bad.note(i, error)
                continue
            asked.append((i, truth))
            yield prompt

    first: dict[int, str] = {}  # by record, where the other is still to come
    for answer in model.stream(prompts(), options, config.seed):
        i, truth = asked[answer.number]
        if i not in first:
            first[i] = answer.text
            continue
        try:
            found = _judged(config, margin, dataset.records[i], i, truth, first.pop(i), answer.text)
        except UserError as error:
            bad.note(i, error)
            continue
        if file:
            file.append({"id": str(i), "left": found.left, "pair": found.pair})
        yield found


def _judged(config: Config, margin: Margin, record: Record, number: int, truth: str, one: str, other: str) -> Judged:
    """A pair of two answers, or why there is none. Raises UserError where they cannot be judged."""
    if one == other or not (one.strip() and other.strip()):
        return Judged(number, {}, "alike" if one == other else "empty")
    better = margin(record, truth, one, other)
    if better == 0:
        return Judged(number, {}, "equally good")
    chosen, rejected = (one, other) if better > 0 else (other, one)
    before, answer = last_answer(record.text)
    # What the prompt gave of the answer belongs to both.
    given = THINK_PREFIX if config.data.explicit_thinking and answer.startswith(THINK_PREFIX) else ""
    turns = [{"role": turn.role, "content": turn.text} for turn in (*before, Turn("assistant", given + chosen))]
    return Judged(number, {
        "ecg_path": list(record.ecg_paths), "text": turns, "rejected": given + rejected, "name": record.name,
        "patient_id": record.patient, "margin": abs(better),
    })  # fmt: skip


def _opened(path: Path, identity: str) -> AnswerFile:
    """The file of what was found so far; its first line says how it is drawn. Raises UserError where otherwise."""
    file = AnswerFile(path, _LINE)
    if not file.lines:
        file.append({"id": identity, "left": "", "pair": {}})
    if file.lines[0]["id"] != identity:
        found, fix = "pairs of another run, step, split, judge or config", "remove it, or name another --out"
        raise UserError(path, found, "what a stop left of these", fix)
    return file
