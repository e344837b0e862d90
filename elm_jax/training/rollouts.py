"""Samples that the model makes itself: answers to the prompts of a step, scored, in the places that are planned.

What is drawn depends on (seed, step, record, answer) and on the weights alone, so that a run that goes on makes what
an unbroken one makes. Every process answers all prompts of a step, together; each lays out its own rows.

P prompts of a step, G answers of each.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax.assemble import Assembly
from elm_jax.data.batch import Conversation, Group
from elm_jax.data.loader import BadRecord, Loaded, StepSource
from elm_jax.errors import UserError
from elm_jax.inference.speaker import Prompt, Speaker
from elm_jax.models.functional import Arrays
from elm_jax.text.render import decode


class Rollouts:
    """Makes the steps of an objective that has an `experience`."""

    def __init__(self, assembly: Assembly, mesh: Mesh) -> None:
        assert assembly.objective.samples.experience is not None
        self.assembly, self.mesh, self.experience = assembly, mesh, assembly.objective.samples.experience
        self.options = replace(
            assembly.config.eval, temperature=self.experience.temperature, top_p=self.experience.top_p,
            repetition_penalty=1.0, max_new_tokens=self.experience.tokens,
        )  # fmt: skip
        self.speaker: Speaker | None = None

    def steps(self, source: StepSource, first: int, arrays: Callable[[], Arrays]) -> Iterator[Loaded]:
        """The steps from `first` on, each made when it is asked for with the `arrays` that the model has then."""
        for step in range(first, len(source)):
            with jax.transfer_guard("allow"):
                loaded = self._step(source, step, arrays())
            yield loaded

    def _step(self, source: StepSource, step: int, arrays: Arrays) -> Loaded:
        if self.speaker is None:
            self.speaker = Speaker(self.assembly, self.mesh, arrays)
        else:
            self.speaker.use(arrays)
        dataset, epoch = source.dataset, source.plan.epoch_of(step)
        planned = [i for row in source.plan.rows(step) for group in row for i in group.samples]
        prompts: dict[int, Prompt] = {}
        truths: dict[int, str] = {}
        bad: list[BadRecord] = []
        for i in planned:
            try:
                rendered, truths[i] = dataset.prompts(i)[-1]
                prompt = Prompt(rendered, dataset.signals(i, epoch))
                prompts[i] = self.speaker.written(prompt, self.experience.tokens)
            except UserError as error:
                bad.append(BadRecord(dataset.records[i].id, str(error)))
        answers = self._answers(step, prompts)
        rewards = np.asarray([
            [self.experience.reward(dataset.records[i], self._text(ids), truths[i]) for ids in answers[i]]
            for i in prompts
        ], np.float32).reshape(-1, self.experience.answers)  # fmt: skip
        scores = {"reward": rewards, "advantage": np.asarray(self.experience.advantages(rewards), np.float32)}
        nothing, nowhere = np.zeros(1, np.int32), np.zeros((0, 0), np.int32)
        made = {i: [Group(0, [Conversation(i, nothing, nothing > 0, nowhere, None)])] for i in planned}
        for row, i in enumerate(prompts):
            branches = []
            for g, ids in enumerate(answers[i]):
                extras = {name: scores[name][row, g] for name in dataset.samples.extras}
                branches.append(_sample(i, prompts[i], ids, extras))
            made[i] = [Group(len(prompts[i].rendered.ids), branches)]
        return source.fill(step, lambda group: made[group.samples[0]], bad)

    def _answers(self, step: int, prompts: dict[int, Prompt]) -> dict[int, list[list[int]]]:
        """The ids of the answers to each prompt, with their end tokens."""
        assert self.speaker is not None
        asked = [(i, g) for i in prompts for g in range(self.experience.answers)]
        drawn = (replace(prompts[i], draw=zlib.crc32(f"{step}:{i}:{g}".encode()) >> 1) for i, g in asked)
        found: dict[int, list[list[int]]] = {i: [[] for _ in range(self.experience.answers)] for i in prompts}
        for event in self.speaker.events(drawn, self.options, self.assembly.config.seed):
            i, g = asked[event.number]
            found[i][g] += event.tokens
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return decode(ids, self.assembly.tokenizer, self.assembly.text.family)


def _sample(index: int, prompt: Prompt, answer: Sequence[int], extras: dict[str, float]) -> Conversation:
    """A prompt with an answer that is learnt."""
    rendered = prompt.rendered
    ids = np.asarray([*rendered.ids, *answer], np.int32)
    return Conversation(
        index, ids, np.arange(len(ids)) >= len(rendered.ids), rendered.signal_positions, list(prompt.signals), extras
    )
