"""What a record says: its `text` in any of the four forms -> turns, and the cleaning of user text.

Forms: turns with `from`/`value`, turns with `role`/`content`, `[question_type, question, answer(s)]`, string.
The cleaning rules are the reference's (golden text_clean).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from elm_jax.errors import UserError
from elm_jax.json_text import parse_json

CONVERSATIONS = "turns with from and value, or role and content, or [question_type, question, answer]"
_FORMS = f"{CONVERSATIONS} or a string"
_TAG = re.compile(r"<\s*(?:ecg|image)\s*>\s*", re.IGNORECASE)
_ECG_MARK = re.compile(r"<\s*ecg\s*>\s*", re.IGNORECASE)
_PICTURE = re.compile(r"\b(?:image|picture)\b", re.IGNORECASE)
_SPEAKER = re.compile(r"\s*(?:(?:(?:user|assistant|human|gpt|model|system|q|a)\s*)?[:：]\s*)+", re.IGNORECASE)


class Turn(NamedTuple):
    """One message; `role` is "user", "assistant" or "system"."""

    role: str
    text: str


def decode_text(raw: Any) -> Any:
    """A record's `text` as one of the four forms; a string that is not JSON of one of them stays a string."""
    if not isinstance(raw, str):
        return raw
    try:
        value = parse_json(raw)
    except ValueError:
        return raw
    return value if isinstance(value, str | list | dict) else raw


def to_turns(conversation: Any) -> list[Turn]:
    """Any of the four forms (or Turns) -> turns.

    A string is one assistant turn; several answers are joined by a space.

    The speakers "human" and "user" are the user, "system" is the system prompt, all others the assistant.
    Raises UserError for anything else, and for text that is not valid Unicode.
    """
    if isinstance(conversation, str):
        return [Turn("assistant", _string(conversation, "text"))]
    if not isinstance(conversation, list | tuple) or not conversation:
        raise UserError("text", _shown(conversation), _FORMS, "mend the record")
    if isinstance(conversation[0], Turn):
        return list(conversation)
    if isinstance(conversation[0], Mapping):
        return [_turn(item, f"text, turn {i}") for i, item in enumerate(conversation)]
    if len(conversation) != 3 or not isinstance(conversation[1], str):
        raise UserError("text", _shown(conversation), _FORMS, "mend the record")
    _, question, answer = conversation
    answers = answer if isinstance(answer, list | tuple) else [answer]
    said = " ".join(_string(one, "text, answer") for one in answers)
    return [Turn("user", _string(question, "text, question")), Turn("assistant", said)]


def steps(conversation: Any) -> list[str]:
    """Of each answer that is not empty what its turn calls its `step`; "" where it does not."""
    named = conversation if isinstance(conversation, list) and isinstance(conversation[0], Mapping) else ()
    turns = [(turn, item) for turn, item in zip(to_turns(conversation), named, strict=False)]
    return [str(item.get("step") or "") for turn, item in turns if turn.role == "assistant" and turn.text]


def last_answer(conversation: Any) -> tuple[list[Turn], str]:
    """The turns before the last answer that is not empty, and that answer; all turns and "" where there is none."""
    turns = to_turns(conversation)
    end = max((i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.text), default=len(turns))
    return turns[:end], "".join(turn.text for turn in turns[end : end + 1])


def clean_text(text: str) -> str:
    """Text without `<ecg>`/`<image>` tags and leading speakers ("user:"); the word image becomes signal."""
    return _without_speaker(_words(_TAG.sub("", text)))


def count_marks(text: str) -> int:
    """How many `<ecg>` markers the text holds."""
    return len(_ECG_MARK.findall(text))


class Words(NamedTuple):
    """What is written of an ECG: `behind` it in the user's words, and behind the prompt of the `system`."""

    behind: str = ""
    system: str = ""


def with_words(conversation: Any, words: Sequence[Words], system: str | None = None) -> list[Turn]:
    """The turns, with the words about each ECG behind its mark; without marks all before the user's first text. Words
    for the system stand behind the system's turn, or where there is none behind the prompt `system`."""
    turns, left = to_turns(conversation), iter(one.behind for one in words)
    if told := "".join(one.system for one in words):
        prompt = turns.pop(0).text if turns[0].role == "system" else system
        turns.insert(0, Turn("system", f"{prompt}\n{told}" if prompt else told))
    if not any(one.behind for one in words):
        return turns
    asked = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if any(count_marks(turns[i].text) for i in asked):
        for i in asked:
            turns[i] = turns[i]._replace(text=_ECG_MARK.sub(lambda mark: mark[0] + next(left, ""), turns[i].text))
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    if turns[first].role != "user":
        turns.insert(first, Turn("user", ""))
    turns[first] = turns[first]._replace(text="".join(left) + turns[first].text)
    return turns


def clean_around_marks(text: str) -> list[str]:
    """`clean_text` of what stands before, between and after the `<ecg>` markers: one more than these."""
    parts = [_words(_TAG.sub("", part)) for part in _ECG_MARK.split(text)]
    first = next((i for i, part in enumerate(parts) if part.strip()), 0)
    parts[first] = _without_speaker(parts[first])
    return parts


def _words(text: str) -> str:
    return _PICTURE.sub(lambda word: "Signal" if word[0][0].isupper() else "signal", text)


def _without_speaker(text: str) -> str:
    speaker = _SPEAKER.match(text)
    return text[speaker.end() :] if speaker else text


def _turn(item: Any, where: str) -> Turn:
    if not isinstance(item, Mapping):
        raise UserError(where, _shown(item), "a turn with from/value or role/content", "mend the record")
    speaker, text = item.get("from", item.get("role")), item.get("value", item.get("content"))
    if not isinstance(speaker, str) or ("value" not in item and "content" not in item):
        expected = "the keys from and value, or role and content"
        raise UserError(where, f"the keys {', '.join(map(str, item))}", expected, "mend the record")
    name = speaker.strip().lower()
    role = "user" if name in ("human", "user") else "system" if name == "system" else "assistant"
    return Turn(role, "" if text is None else _string(text, where))


def _string(value: Any, where: str) -> str:
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(where, _shown(value), "text", "mend the record")
    try:
        value.encode()
    except UnicodeEncodeError as broken:
        found = f"half of a surrogate pair at character {broken.start}"
        raise UserError(where, found, "valid Unicode", "mend the record") from None
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
