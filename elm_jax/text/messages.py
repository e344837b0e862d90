"""Turns -> messages with their ECGs in place, and how a conversation becomes shorter. No tokens here.

A message's parts are strings and ECGs (None, in the order of the record's ECGs).
"""

from collections.abc import Iterable
from itertools import chain, pairwise
from typing import NamedTuple

from elm_jax.errors import UserError
from elm_jax.text.turns import Turn, clean_around_marks, clean_text, count_marks


class Message(NamedTuple):
    """`role` is "user" or "assistant"; an assistant's message has one string."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def ecgs(self) -> int:
        return self.parts.count(None)

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if part is not None)


def place(turns: list[Turn], n_ecgs: int, clean_answers: bool, strip: bool) -> list[Message]:
    """Messages with cleaned user text and `n_ecgs` ECGs: at the `<ecg>` markers if there are several ECGs and
    as many markers, all before the first question if there are no markers or one ECG.

    A conversation without a user turn gets an empty one, for the ECGs. UserError if markers and ECGs differ.
    """
    if not any(turn.role == "user" for turn in turns):
        turns = [Turn("user", ""), *turns]
    marks = sum(count_marks(turn.text) for turn in turns if turn.role == "user") if n_ecgs > 1 else 0
    if marks not in (0, n_ecgs):
        found = f"{marks} <ecg> markers for {n_ecgs} ECGs"
        fix = "mend the record's text or its ecg_path"
        raise UserError("text", found, "one marker for each ECG, or none", fix)
    waiting = 0 if marks else n_ecgs
    messages = []
    for turn in turns:
        if turn.role == "user":
            texts = clean_around_marks(turn.text) if marks else [clean_text(turn.text)]
            between = chain.from_iterable((text, None) for text in texts)
            messages.append(Message("user", (None,) * waiting + tuple(between)[:-1]))
            waiting = 0
        else:
            text = clean_text(turn.text) if clean_answers else turn.text
            messages.append(Message("assistant", (text.strip() if strip else text,)))
    return messages


def answered(messages: list[Message]) -> list[Message]:
    """The messages up to the last answer, without empty answers; UserError if there is no answer."""
    ends = [i for i, message in enumerate(messages) if message.role == "assistant" and message.text]
    if not ends:
        expected, fix = "a non-empty assistant turn", "leave the record out or give it an answer"
        raise UserError("text", "a conversation without an answer", expected, fix)
    return without_empty_answers(keep(messages, range(ends[-1] + 1)))


def without_empty_answers(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message.role == "user" or message.text]


def keep(messages: list[Message], indices: Iterable[int]) -> list[Message]:
    """The messages of these indices; ECGs of the others move before the first question that is kept.

    Where none is kept an empty one comes first.
    """
    chosen = set(indices)
    lost = sum(message.ecgs for i, message in enumerate(messages) if i not in chosen)
    kept = [message for i, message in enumerate(messages) if i in chosen]
    if all(message.role == "assistant" for message in kept):
        kept.insert(0, Message("user", ("",)))
    first = next(i for i, message in enumerate(kept) if message.role == "user")
    kept[first] = Message("user", (None,) * lost + kept[first].parts)
    return kept


def oldest_first(messages: list[Message]) -> list[range]:
    """The indices that may go, in this order: each exchange (questions and their answers) but the last; in that one
    each message that is neither the last question nor the last message."""
    roles = [message.role for message in messages]
    starts = [i for i in range(1, len(roles)) if roles[i] == "user" and roles[i - 1] == "assistant"]
    last_question = max((i for i, role in enumerate(roles) if role == "user"), default=None)
    spare = (i for i in range(max(starts, default=0), len(roles) - 1) if i != last_question)
    return [*(range(start, end) for start, end in pairwise([0, *starts])), *(range(i, i + 1) for i in spare)]


def trimmed(messages: list[Message], length: int) -> list[Message]:
    """With `length` characters less at the start of the first question."""
    first = next(i for i, message in enumerate(messages) if message.role == "user")
    parts: list[str | None] = []
    for part in messages[first].parts:
        parts.append(part if part is None else part[length:])
        length -= 0 if part is None else min(length, len(part))
    return [*messages[:first], Message("user", tuple(parts)), *messages[first + 1 :]]


def runs(message: Message, strip: bool) -> list[str | None]:
    """A message's ECGs (None) and the texts around them; each ECG is followed by a newline."""
    found: list[str | None] = [""]
    for part in message.parts:
        if part is None:
            found += [None, "\n"]
        else:
            found[-1] = (found[-1] or "") + part
    if strip:
        found[0] = (found[0] or "").lstrip()
        found[-1] = (found[-1] or "").rstrip()
    return found[1:] if found[0] == "" and len(found) > 1 else found
