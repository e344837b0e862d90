"""What of a record is learnt: its samples, before they are tokens. No jax here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from elm_jax.data.batch import Conversation, Group, Shown, ecgs_before
from elm_jax.data.sources import Record
from elm_jax.errors import UserError
from elm_jax.registry import qualified_name
from elm_jax.text.reports import padded_ids
from elm_jax.text.turns import last_answer, to_turns

if TYPE_CHECKING:
    from elm_jax.data.dataset import Dataset

REPORT, LABEL = "report", "label"  # phases of Samples
Measured = tuple[int, int, int]  # tokens, supervised tokens and signal slots


@dataclass(frozen=True)
class Sample:
    """One thing that is learnt of a record, with the record's ECGs.

    text: in one of the four forms of a record's text. extras: a number for all its supervised tokens, by name. last:
    only the last of its answers is learnt.
    """

    text: Any
    extras: Mapping[str, float] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True)
class Experience:
    """How prompts become scored answers, which the model itself gives while it is trained.

    The prompt is a record's, up to its last answer, which is the truth. Beside the reward, extras of an answer may be
    "advantage"; "learnt", 0 of answers that only count; the parts of the reward; "degenerate", 1 in a group of equal
    rewards; "empty" and "truncated", 1 of answers without a word or without an end; and "old", the log probability of
    each token when it was drawn.

    Args:
        reward: (record, answer, truth) -> how good the answer is: a number, or its parts by name, which are summed.
        advantages: rewards (P prompts, G answers) -> (P, G).
        answers: G; tokens: the most of an answer; temperature, top_p: how they are drawn; rows: how many at once.
        updates: steps that learn from the same answers.
        shaped: (rewards, tokens of the answers), both (P, G) -> rewards: what length takes away; None is nothing.
        resample: how often a prompt with a degenerate group is replaced by another one. What is left of these is not
            learnt, where it is above 0.
        skip_truncated: truncated answers are not learnt.
        show_every: steps between tables of answers in the run's folder; 0 writes none.
    """

    reward: Callable[[Record, str, str], float | Mapping[str, float]]
    advantages: Callable[[np.ndarray], np.ndarray]
    answers: int
    tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    rows: int = 32
    updates: int = 1
    shaped: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    resample: int = 0
    skip_truncated: bool = False
    show_every: int = 0


@dataclass(frozen=True)
class Samples:
    """What of each record is learnt.

    Args:
        of: a record's samples, which are branches of one group: what they begin with is computed once, and a step has
            all of them or none. None: the record's own text, which may share its beginning with other records'.
        phase: the form of the text, as `text.render` has it. REPORT: what was written of the record's one ECG, for a
            text tower. None: there is no text, only the record's ECGs.
            LABEL: the number of the record's class, below `classes`.
        extras: names of the numbers that the samples have.
        experience: where the model makes the samples itself.
    """

    of: Callable[[Record], list[Sample]] | None = None
    phase: str | None = "sft"
    extras: tuple[str, ...] = ()
    experience: Experience | None = None
    classes: int = 0

    @property
    def plain(self) -> bool:
        """Whether a record is one conversation that is learnt as it stands."""
        return self.of is None and not self.alone and self.experience is None

    @property
    def alone(self) -> bool:
        """Whether each record has a row to itself, which holds no conversation."""
        return self.phase in (None, REPORT, LABEL)

    @property
    def unit(self) -> str:
        """What the records are, to people."""
        return "recordings" if self.alone else "conversations"

    def beside(self, record: Record) -> Any:
        """What of a record, beside its text, is learnt."""
        if self.of is not None:
            return _answered_alike(record) or None  # which versions before this one learnt: in another order
        return {REPORT: record.report or None, LABEL: record.label}.get(str(self.phase))

    @property
    def updates(self) -> int:
        """Steps that learn from the same samples."""
        return 1 if self.experience is None else self.experience.updates

    @property
    def judged(self) -> Samples:
        """The same where nothing is learnt: of answers the first are judged, once, and shown to nobody."""
        if self.experience is None:
            return self
        return replace(self, experience=replace(self.experience, updates=1, resample=0, show_every=0))

    @property
    def fingerprint(self) -> str:
        """Changes with what decides how long a record's samples are."""
        of = None if self.of is None else qualified_name(self.of)
        made = None if self.experience is None else (self.experience.answers, self.experience.tokens)
        return repr((of, self.phase, made))

    def measure(self, dataset: Dataset, index: int) -> Measured:
        """What a row needs for the samples of a record that is not `plain`.

        Raises:
            UserError: they do not fit data.max_len together, or cannot be rendered; names the record.
        """
        problem = dataset.records[index].problem
        if self.alone and problem is not None:
            raise problem
        if self.experience is None:
            signals = dataset.signals(index) if dataset.reads_ecgs else None
            found = measured(grouped(self.conversations(dataset, index, signals, 0)))
        else:
            prompt, made = dataset.prompts(index)[-1][0], self.experience.answers * self.experience.tokens
            tokens, slots, view = len(prompt.ids) + made, len(prompt.signal_positions), dataset.signal.view
            if dataset.signal.tokens is not None:  # ECGs are symbols, each where one placeholder is
                tokens, slots = tokens + sum(len(ecg[view]) - 1 for ecg in dataset.signals(index)), 0
            found = tokens, made, slots
        if dataset.text.max_len is not None and found[0] > dataset.text.max_len:
            what, fix = "samples of one record", "raise data.max_len"
            if self.experience is not None:
                what = f"the prompt with its answers ({self.experience.answers} of up to {self.experience.tokens})"
                fix = "lower rl.max_new_tokens or rl.answers, or raise data.max_len"
            record = f"record {dataset.records[index].id}"
            raise UserError(record, f"{found[0]} tokens, {what}", f"at most data.max_len={dataset.text.max_len}", fix)
        return found

    def conversations(
        self, dataset: Dataset, index: int, signals: list[Shown] | None, length: int
    ) -> list[Conversation]:
        """The samples of a record that is not `plain`, with given signals (None: a bad record, of weight 0)."""
        record = dataset.records[index]
        if self.alone:
            ids = np.zeros(1, np.int32)
            if self.phase == LABEL:
                with dataset.naming(index):
                    ids[0] = label_of(record, self.classes)
            elif self.phase == REPORT:
                longest = dataset.text.max_len
                assert longest is not None
                with dataset.naming(index):
                    ids = padded_ids(dataset.tokenizer, report_of(record), longest)
            places = np.zeros((len(record.ecg_paths), 0), np.int32)
            return [Conversation(index, ids, np.zeros(len(ids), bool), places, signals)]
        assert self.of is not None, "the model makes these samples"
        made = []
        with dataset.naming(index):
            samples = self.of(record)
        for sample in samples:
            one = replace(dataset.conversation(index, signals, length, sample.text), extras=sample.extras)
            made.append(replace(one, supervised=_last_of(one.supervised)) if sample.last else one)
            length = 1  # of a bad record whose ECGs would be tokens nothing is known but how long all samples are
        return made


def _answered_alike(record: Record) -> bool:
    """Whether both answers of a pair are one."""
    with contextlib.suppress(UserError):
        return record.rejected is not None and last_answer(record.text)[1] == last_answer(record.rejected)[1]
    return False


def label_of(record: Record, classes: int) -> int:
    """The number of the record's class. Raises UserError unless it is one of so many, from 0 on."""
    whole = isinstance(record.label, float) and record.label.is_integer()  # of a column where others have none
    text = str(int(record.label) if whole else record.label).strip()
    if not re.fullmatch(r"\d{1,9}", text) or int(text) >= classes:
        found = "no label" if record.label is None else f"the label {text[:40]!r}"
        raise UserError("label", found, f"a whole number from 0 to {classes - 1}", "mend the column label")
    return int(text)


def report_of(record: Record) -> str:
    """What was written of the record's ECG: its report, else its text, of a conversation the answers.

    Raises:
        UserError: nothing was, or the record has several ECGs.
    """
    if len(record.ecg_paths) != 1:
        found = f"{len(record.ecg_paths)} ECGs"
        raise UserError("ecg_path", found, "one, to be held against its report", "leave the record out")
    said = record.report or " ".join(turn.text for turn in to_turns(record.text) if turn.role == "assistant").strip()
    if not said:
        raise UserError("report", "no words", "a column report, or a text with an answer", "leave the record out")
    return said


def _last_of(supervised: np.ndarray) -> np.ndarray:
    """The last stretch of what is learnt alone."""
    starts = np.flatnonzero(np.diff(supervised.astype(np.int8), prepend=0) == 1)
    return supervised & (np.arange(len(supervised)) >= (starts[-1] if len(starts) else 0))


def grouped(conversations: list[Conversation]) -> list[Group]:
    """One group of conversations with the same ECGs, which share what they begin with; where this is nothing, a group
    of each."""
    if len(conversations) > 1:
        prefix = min(_learnt_from(c) for c in conversations)
        first = conversations[0]
        for other in conversations[1:]:
            size = min(prefix, len(first.ids), len(other.ids))
            unlike = np.flatnonzero(first.ids[:size] != other.ids[:size])
            prefix = int(unlike[0]) if len(unlike) else size
        # An ECG stands whole in the prefix or whole behind it.
        behind = first.signal_positions[ecgs_before(first, prefix) :]
        prefix = min(prefix, int(behind[behind >= 0].min())) if behind.size else prefix
        if prefix:
            return [Group(prefix, conversations)]
    return [Group(0, [c]) for c in conversations]


def measured(groups: list[Group]) -> Measured:
    """What a row needs for groups."""
    tokens = targets = slots = 0
    for group in groups:
        shared = ecgs_before(group.conversations[0], group.prefix)
        tokens += group.prefix + sum(len(c.ids) - group.prefix for c in group.conversations)
        targets += sum(int(c.supervised.sum()) for c in group.conversations)
        slots += shared + sum(len(c.signal_positions) - shared for c in group.conversations)
    return tokens, targets, slots


def _learnt_from(c: Conversation) -> int:
    """The place of the first supervised token; the conversation's length where there is none."""
    return int(np.argmax(c.supervised)) if c.supervised.any() else len(c.ids)
