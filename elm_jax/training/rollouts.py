"""Samples that the model makes itself: answers to the prompts of a step, scored, in the places that are planned.

What is drawn depends on (seed, step, record, answer) and on the weights alone, so that a run that goes on makes what
an unbroken one makes. Every process answers all prompts of a step, together; each lays out its own rows.

Several steps may learn from the same answers (`Experience.updates`): the first of them makes them. A checkpoint is
written behind the last of them only, so that no answers need to be saved.

P prompts of a step, G answers of each.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax import stopping
from elm_jax.assemble import Assembly
from elm_jax.data.batch import Conversation, Group
from elm_jax.data.dataset import Dataset
from elm_jax.data.loader import BadRecord, Loaded, StepSource
from elm_jax.data.packing import LengthIndex
from elm_jax.data.samples import Experience
from elm_jax.errors import Absent, UserError
from elm_jax.folders import write_atomic
from elm_jax.inference.speaker import Prompt, Speaker
from elm_jax.models.functional import Arrays
from elm_jax.objectives.policy import told_apart
from elm_jax.runtime import distributed
from elm_jax.scoring.rewards import judged
from elm_jax.text.render import decode

_SHOWN = 4  # prompts of a table


class _Scored(NamedTuple):
    """A prompt with its answers."""

    sample: int  # the record that was asked about
    prompt: Prompt
    truth: str
    answers: list[list[int]]  # ids, with their end tokens
    log_probs: list[list[float]]  # of these when they were drawn, at the temperature, among all tokens
    texts: list[str]
    parts: list[dict[str, float]]  # of each answer's reward

    @property
    def rewards(self) -> np.ndarray:
        return np.asarray([sum(parts.values()) for parts in self.parts], np.float64)


class Rollouts:
    """Makes the steps of an objective that has an `experience`.

    Args:
        folder: where tables of answers are written, where the experience asks for them.
    """

    def __init__(self, assembly: Assembly, mesh: Mesh, folder: Path | None = None) -> None:
        assert assembly.objective.samples.experience is not None
        self.assembly, self.mesh, self.experience = assembly, mesh, assembly.objective.samples.experience
        self.folder = folder
        self.options = replace(
            assembly.config.eval, temperature=self.experience.temperature, top_p=self.experience.top_p,
            repetition_penalty=1.0, max_new_tokens=self.experience.tokens, batch_size=self.experience.rows,
        )  # fmt: skip
        self.speaker: Speaker | None = None

    def steps(self, source: StepSource, first: int, arrays: Callable[[], Arrays]) -> Iterator[Loaded]:
        """The steps from `first` on, `source.updates` from each step of the source: answers are made when the first of
        these is asked for, with the `arrays` that the model has then."""
        updates = source.updates
        assert first % updates == 0, "a run stops and goes on where new answers are made"
        for step in range(first // updates, len(source)):
            with jax.transfer_guard("allow"):
                loaded, scored = self._step(source, step, arrays())
                self._show(source, step, scored)
            for update in range(updates):
                yield loaded._replace(step=step * updates + update)

    def _step(self, source: StepSource, step: int, arrays: Arrays) -> tuple[Loaded, dict[int, _Scored]]:
        if self.speaker is None:
            self.speaker = Speaker(self.assembly, self.mesh, arrays)
        else:
            self.speaker.use(arrays)
        planned = [i for row in source.plan.rows(step) for group in row for i in group.samples]
        bad: list[BadRecord] = []
        scored = self._scored(source, step, {i: i for i in planned}, bad)
        for attempt in range(1, _experience(source).resample + 1):
            again = [i for i in scored if _alike(scored[i].rewards)]
            others = {i: _other(source.plan.index, i, (self.assembly.config.seed, step, attempt)) for i in again}
            scored |= {
                i: found
                for i, found in self._scored(source, step, others, [], attempt).items()
                if not _alike(found.rewards)
            }
        nothing, nowhere = np.zeros(1, np.int32), np.zeros((0, 0), np.int32)
        made = {i: [Group(0, [Conversation(i, nothing, nothing > 0, nowhere, None)])] for i in planned}
        made |= self._groups(source.dataset, scored)
        return source.fill(step, lambda group: made[group.samples[0]], bad), scored

    def _scored(
        self, source: StepSource, step: int, asked: Mapping[int, int], bad: list[BadRecord], attempt: int = 0
    ) -> dict[int, _Scored]:
        """By the planned sample: the record that is asked about in its place, answered; those that cannot are `bad`."""
        dataset, epoch = source.dataset, source.plan.epoch_of(step)
        prompts: dict[int, tuple[Prompt, str]] = {}
        unread: dict[int, UserError] = {}
        for place, i in asked.items():
            try:
                rendered, truth = dataset.prompts(i)[-1]
                prompt = Prompt(rendered, dataset.signals(i, epoch), draws=self._draws(step, attempt, place))
                assert self.speaker is not None
                prompts[place] = self.speaker.written(prompt, self.experience.tokens), truth
            except Absent:
                raise
            except UserError as error:
                unread[place] = error
        # One that cannot read a file, or whose reward is another, must not go its own way.
        wrong = dict(pair for part in distributed.gather([(k, str(e)) for k, e in unread.items()]) for pair in part)
        prompts = {place: found for place, found in prompts.items() if place not in wrong}
        answers, log_probs = self._answers({place: prompt for place, (prompt, _) in prompts.items()})
        texts = {place: [self._text(ids) for ids in answers[place]] for place in prompts}
        parts_of = None
        if jax.process_index() == 0:
            parts_of = [self._judged(dataset, asked[place], texts[place], prompts[place][1]) for place in prompts]
        found = {}
        for place, parts in zip(list(prompts), distributed.broadcast(parts_of, 0), strict=True):
            if isinstance(parts, str):
                wrong[place] = parts
            else:
                given = *prompts[place], answers[place], log_probs[place], texts[place], parts
                found[place] = _Scored(asked[place], *given)
        bad += [BadRecord(dataset.records[asked[place]].id, wrong[place]) for place in sorted(wrong)]
        return found

    def _judged(self, dataset: Dataset, sample: int, texts: Sequence[str], truth: str) -> list[dict[str, float]] | str:
        """The parts of each answer's reward, or what is wrong with one."""
        try:
            return [judged(self.experience.reward, dataset.records[sample], text, truth) for text in texts]
        except UserError as error:
            return str(error)

    def _groups(self, dataset: Dataset, scored: Mapping[int, _Scored]) -> dict[int, list[Group]]:
        """What is learnt in the place of each planned sample."""
        experience, places = self.experience, list(scored)
        if not places:
            return {}
        rewards = np.stack([scored[i].rewards for i in places])
        lengths = np.asarray([[len(ids) for ids in scored[i].answers] for i in places])
        rewards = rewards if experience.shaped is None else experience.shaped(rewards, lengths)
        advantages = np.asarray(experience.advantages(rewards), np.float64)
        made = {}
        for row, i in enumerate(places):
            one, branches = scored[i], []
            degenerate = _alike(rewards[row])
            for g, ids in enumerate(one.answers):
                truncated = not self._ended(ids)
                learnt = not (truncated and experience.skip_truncated or degenerate and experience.resample)
                told = {
                    "reward": rewards[row, g], "advantage": advantages[row, g], "learnt": learnt,
                    "degenerate": degenerate, "truncated": truncated, "empty": not one.texts[g].strip(),
                    **{f"reward.{name}": value for name, value in one.parts[g].items()},
                }  # fmt: skip
                extras: dict[str, Any] = {name: float(told.get(name, 0.0)) for name in dataset.samples.extras}
                if "old" in extras:
                    extras["old"] = one.log_probs[g]
                branches.append(_sample(one.sample, one.prompt, ids, extras))
            made[i] = [Group(len(one.prompt.rendered.ids), branches)]
        return made

    def _draws(self, step: int, attempt: int, place: int) -> tuple[int, ...]:
        of = f"{step}:" if attempt == 0 else f"{step}:{attempt}:"
        return tuple(zlib.crc32(f"{of}{place}:{g}".encode()) >> 1 for g in range(self.experience.answers))

    def _answers(
        self, prompts: Mapping[int, Prompt]
    ) -> tuple[dict[int, list[list[int]]], dict[int, list[list[float]]]]:
        """The ids of the answers to each prompt, with their end tokens, and the log probabilities of these."""
        assert self.speaker is not None
        ids: dict[int, list[list[int]]] = {i: [[] for _ in range(self.experience.answers)] for i in prompts}
        log_probs: dict[int, list[list[float]]] = {i: [[] for _ in answers] for i, answers in ids.items()}
        places, events = list(prompts), self.speaker.events(prompts.values(), self.options, self.assembly.config.seed)
        for event in stopping.each(events, "part of an answer"):
            ids[places[event.number]][event.answer] += event.tokens
            log_probs[places[event.number]][event.answer] += event.log_probs
        return ids, log_probs

    def _ended(self, ids: Sequence[int]) -> bool:
        assert self.speaker is not None
        return bool(ids) and ids[-1] in self.speaker.stops

    def _text(self, ids: Sequence[int]) -> str:
        return decode(ids, self.assembly.tokenizer, self.assembly.text.family)

    # -- for people ----------------------------------------------------------------------------------------------

    def _show(self, source: StepSource, step: int, scored: Mapping[int, _Scored]) -> None:
        """Write a table of some answers with their rewards."""
        every, updates = _experience(source).show_every, source.updates
        if self.folder is None or not every or step * updates % every >= updates or jax.process_index():
            return
        lines = [f"# Answers of step {step * updates}", ""]
        for one in list(scored.values())[:_SHOWN]:
            asked = self.assembly.tokenizer.decode(one.prompt.rendered.ids).strip()
            lines += [f"**Record {one.sample}**, truth: {_cell(one.truth)}", "", f"> {_cell(asked[-400:])}", ""]
            lines += [f"| reward | {' | '.join(one.parts[0])} | answer |", "|---" * (len(one.parts[0]) + 2) + "|"]
            for parts, text in zip(one.parts, one.texts, strict=True):
                numbers = " | ".join(f"{value:.3g}" for value in parts.values())
                lines.append(f"| {sum(parts.values()):.3g} | {numbers} | {_cell(text)} |")
            lines.append("")
        path = self.folder / f"step-{step * updates:06d}.md"
        write_atomic(path, lambda file: file.write("\n".join(lines).encode()))


def _experience(source: StepSource) -> Experience:
    assert source.dataset.samples.experience is not None
    return source.dataset.samples.experience


def _cell(text: str) -> str:
    """Text that stays within a cell of a Markdown table, and shows no control character."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return kept.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") or "(empty)"


def _alike(rewards: np.ndarray) -> bool:
    return not told_apart(rewards[None]).all()


def _other(index: LengthIndex, sample: int, draw: tuple[int, int, int]) -> int:
    """Another sample that fits into the place of `sample`: a pure function of the draw."""
    fits = (index.length > 0) & (index.length <= index.length[sample]) & (index.ecgs <= index.ecgs[sample])
    found = np.flatnonzero(fits)
    return int(np.random.default_rng((*draw, sample)).choice(found))


def _sample(index: int, prompt: Prompt, answer: Sequence[int], extras: Mapping[str, Any]) -> Conversation:
    """A prompt with an answer that is learnt."""
    rendered = prompt.rendered
    ids = np.asarray([*rendered.ids, *answer], np.int32)
    return Conversation(
        index, ids, np.arange(len(ids)) >= len(rendered.ids), rendered.signal_positions, list(prompt.signals), extras
    )
