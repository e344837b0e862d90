"""A conversation -> token ids, and which of them are learnt: decided while writing, never searched for.

Record text -> turns (text.py) -> messages with their ECGs in place (messages.py) -> segments (write.py)
-> ids (vocabulary.py). A segment is one special token, the placeholders of one ECG, or a run of text that is
tokenised in one piece: the ids are those of the whole prompt tokenised at once, except that an answer never
merges with the header before it. Special tokens written in a message or a system prompt are text; think and
answer tags are tokens in answers and in the system prompt.

To fit `max_len` tokens these go, each only if what went before was not enough:
1. what follows the last learnt token;
2. the oldest turns: a question with its answers; in the last exchange earlier questions, then the answers
   before the last one (ECGs of dropped turns move before the first question that is left);
3. the system prompt, whole;
4. the start of the last question;
5. the end of the last answer and its end token; at least one token of it stays.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from elm_jax import compat as behaviours
from elm_jax.errors import UserError, nearest
from elm_jax.text.forms import CHAT_FORMS, ChatForm
from elm_jax.text.messages import Message, answered, place, without_empty_answers
from elm_jax.text.turns import Turn, clean_text, count_marks, decode_text, to_turns
from elm_jax.text.vocabulary import SIGNAL_TOKEN, THINK_TOKENS, Vocabulary, backend_of, vocabulary
from elm_jax.text.write import THINK_PREFIX, Draft, Style, TextSpec, Writer, fitted_chat, fitted_text

__all__ = [
    "CHAT_FORMS",
    "SIGNAL_TOKEN",
    "THINK_TOKENS",
    "ChatForm",
    "Rendered",
    "Turn",
    "add_tokens",
    "answer_ids",
    "clean_text",
    "decode",
    "decode_text",
    "TextSpec",
    "render",
    "render_prompt",
    "stop_ids",
    "to_prompt",
    "to_prompts",
    "to_tokens",
    "to_turns",
]

PHASES = ("pretrain", "sft", "rl")


@dataclass(frozen=True, eq=False)
class Rendered:
    """A rendered conversation of T tokens.

    prompt: the text of the ids (with compat `truncate_tokens`, the text before truncation; where an ECG's symbols
    stand in the ids, its placeholder stands here).
    ids: int32 (T,). supervised: bool (T,), what is learnt.
    signal_positions: int32 (n_ecgs, N), where the placeholders of each ECG are.
    system_end: tokens [0, system_end) end with the special token after the system prompt; 0 without one.
    signal_end: tokens [0, signal_end) end with the last placeholder if all ECGs precede any question; else 0.
    """

    prompt: str
    ids: np.ndarray
    supervised: np.ndarray
    signal_positions: np.ndarray
    system_end: int
    signal_end: int


def render(
    conversation: Any,
    tokenizer: Any,
    family: str,
    system_prompt: str | None = None,
    signal_tokens: int = 1,
    phase: str = "sft",
    explicit_thinking: bool = False,
    max_len: int | None = None,
    compat: Iterable[str] = (),
    n_ecgs: int | None = None,
) -> Rendered:
    """The conversation (one of the four forms, or JSON of one) as training tokens; every answer is learnt.

    `signal_tokens` N placeholders stand for each of `n_ecgs` ECGs (None: as many as the user's `<ecg>` markers, at
    least one); with 0 the ECGs are left out. Several ECGs go where the markers are, without markers all before the
    first question. `system_prompt` None is the family's default; a system turn at the start replaces it. A string
    answers an empty question. Phase "pretrain" learns the answers as one text without a chat form. With
    `explicit_thinking` a "<think>" and newline at the start of an answer belong to the prompt. What follows the last
    answer is left out.

    Raises UserError if there is nothing to learn or `max_len` cannot be kept.
    """
    spec = TextSpec(family, signal_tokens, system_prompt, phase, explicit_thinking, max_len, tuple(compat))
    return to_tokens(conversation, tokenizer, spec, n_ecgs)


def render_prompt(
    conversation: Any,
    tokenizer: Any,
    family: str,
    system_prompt: str | None = None,
    signal_tokens: int = 1,
    phase: str = "sft",
    explicit_thinking: bool = False,
    max_len: int | None = None,
    compat: Iterable[str] = (),
    n_ecgs: int | None = None,
) -> Rendered:
    """The whole conversation and the header of the response that comes next. Arguments as in `render`.

    With `explicit_thinking` the response is given its "<think>\\n".
    """
    spec = TextSpec(family, signal_tokens, system_prompt, phase, explicit_thinking, max_len, tuple(compat))
    return to_prompt(conversation, tokenizer, spec, n_ecgs)


def to_tokens(conversation: Any, tokenizer: Any, spec: TextSpec, n_ecgs: int | None = None) -> Rendered:
    """`render`, of a spec."""
    style, messages, n_ecgs = _opened(conversation, tokenizer, spec, n_ecgs)
    if spec.phase == "pretrain":
        return _rendered(style, fitted_text(style, n_ecgs, _answers(messages)), n_ecgs)
    messages = messages if style.by_ids else answered(messages)
    return _rendered(style, fitted_chat(style, messages), n_ecgs)


def to_prompt(conversation: Any, tokenizer: Any, spec: TextSpec, n_ecgs: int | None = None) -> Rendered:
    """`render_prompt`, of a spec."""
    style, messages, n_ecgs = _opened(conversation, tokenizer, spec, n_ecgs)
    if spec.phase == "pretrain":
        return _rendered(style, fitted_text(style, n_ecgs, None), n_ecgs)
    opening = THINK_PREFIX if spec.explicit_thinking else ""
    return _rendered(style, fitted_chat(style, without_empty_answers(messages), opening), n_ecgs)


def to_prompts(
    conversation: Any, tokenizer: Any, spec: TextSpec, n_ecgs: int | None = None
) -> list[tuple[Rendered, str]]:
    """For each non-empty answer: the true history with the header of the response, and the answer.

    With `explicit_thinking` a prompt ends in "<think>\\n" where its answer begins so, and the answer is what follows. A
    prompt holds the ECGs that came up until then. Nothing in it is supervised.

    Raises UserError as `render`.
    """
    style, messages, n_ecgs = _opened(conversation, tokenizer, spec, n_ecgs)
    if spec.phase == "pretrain":
        return [(_rendered(style, fitted_text(style, n_ecgs, None), n_ecgs), _answers(messages))]
    messages, prompts = answered(messages), []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            given = THINK_PREFIX if spec.explicit_thinking and message.text.startswith(THINK_PREFIX) else ""
            draft = fitted_chat(style, messages[:i], given)
            prompts.append((_rendered(style, draft, n_ecgs), message.text.removeprefix(given)))
    return prompts


def add_tokens(tokenizer: Any, phase: str = "sft") -> list[str]:
    """Adds `<signal>`, and but for phase "pretrain" the think and answer tags, where they are missing.

    Returns what was added, in the order of the new ids.
    """
    backend = backend_of(tokenizer)
    wanted = (SIGNAL_TOKEN,) if phase == "pretrain" else (SIGNAL_TOKEN, *THINK_TOKENS)
    missing = [token for token in wanted if backend.token_to_id(token) is None]
    added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in missing]
    tokenizer.add_tokens(added, special_tokens=True)
    return missing


def stop_ids(tokenizer: Any, family: str) -> tuple[int, ...]:
    """The ids that end a response: the family's end tokens that the tokenizer has, and its own eos."""
    words = vocabulary(tokenizer)
    ids = [words.id(token) for token in (*_form(family).stops, *filter(None, [words.eos]))]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def answer_ids(text: str, tokenizer: Any, family: str) -> np.ndarray:
    """The ids (n,) int32 that an answer has behind its header, without its end token."""
    writer = Writer(_style(vocabulary(tokenizer), TextSpec(family, 0)))
    writer.tagged(text, edge=True)
    return np.asarray(writer.draft().ids, np.int32)


def decode(ids: Sequence[int] | np.ndarray, tokenizer: Any, family: str) -> str:
    """The answer that generated ids spell, up to the first end token or negative id; tags stay."""
    stops, words = set(stop_ids(tokenizer, family)), vocabulary(tokenizer)
    answer = [int(token) for token in ids]
    end = next((i for i, token in enumerate(answer) if token < 0 or token in stops), len(answer))
    text, ending = words.text(answer[:end]), _form(family).answer[1]
    return text.removesuffix(" ") if ending.startswith(" ") else text


@lru_cache(maxsize=8)
def _style(words: Vocabulary, spec: TextSpec) -> Style:
    if spec.phase not in PHASES:
        fix = nearest(spec.phase, PHASES) or "mend the phase"
        raise UserError("phase", repr(spec.phase), f"one of {', '.join(PHASES)}", fix)
    behaviours.check(spec.compat)
    form = _form(spec.family)
    if spec.signal_tokens:
        words.require(SIGNAL_TOKEN, "an ECG language model", "call add_tokens(tokenizer, phase) first")
    known = form.reference_start is not None  # the reference has no plain form, so nothing to be faithful to
    return Style(
        spec=spec,
        words=words,
        form=form,
        system=None,
        clean_answers=behaviours.enabled("clean_answers", spec.compat),
        by_ids=known and behaviours.enabled("response_by_ids", spec.compat),
        by_tokens=known and behaviours.enabled("truncate_tokens", spec.compat),
        specials=behaviours.enabled("special_tokens_in_text", spec.compat),
    )


def _opened(
    conversation: Any, tokenizer: Any, spec: TextSpec, n_ecgs: int | None
) -> tuple[Style, list[Message], int]:
    """The style with its system prompt, the conversation's messages with their ECGs, and how many these are."""
    style, turns = _style(vocabulary(tokenizer), spec), to_turns(decode_text(conversation))
    form, prompt = style.form, spec.system_prompt
    if style.by_ids:  # to the reference every speaker but the user is the assistant
        turns = [turn._replace(role="assistant") if turn.role == "system" else turn for turn in turns]
    elif turns[0].role == "system":
        prompt, turns = turns[0].text, turns[1:]
    if any(turn.role == "system" for turn in turns):
        raise UserError("text", "a later system turn", "at most one, at the start", "mend the record")
    prompt = form.default_system if prompt is None else prompt
    has_system = form.system is not None and (prompt or form.default_system is not None)
    if n_ecgs is None:
        n_ecgs = max(1, sum(count_marks(turn.text) for turn in turns if turn.role == "user"))
    messages = place(turns, n_ecgs, style.clean_answers, strip=form.strip and spec.phase != "pretrain")
    if not spec.signal_tokens:
        messages = [Message(message.role, (message.text,)) for message in messages]
    return _with_system(style, prompt if has_system else None), messages, n_ecgs


@lru_cache(maxsize=64)
def _with_system(style: Style, system: str | None) -> Style:
    return replace(style, system=system)


def _answers(messages: list[Message]) -> str:
    return "\n".join(message.text for message in messages if message.role == "assistant")


def _rendered(style: Style, draft: Draft, n_ecgs: int) -> Rendered:
    ids = np.asarray(draft.ids, np.int32)
    if style.spec.signal_tokens:
        positions = np.flatnonzero(ids == style.words.id(SIGNAL_TOKEN)).astype(np.int32)
        expected = draft.ecgs * style.spec.signal_tokens
        if len(positions) != expected:
            fix = "take <signal> out of the text, or raise data.max_len"
            found = f"{len(positions)} {SIGNAL_TOKEN} tokens"
            raise UserError("text", found, f"{expected} for the ECGs", fix)
        positions = positions.reshape(draft.ecgs, style.spec.signal_tokens)
    else:
        positions = np.zeros((n_ecgs, 0), np.int32)
    learn = np.frombuffer(draft.learn, bool)
    return Rendered(draft.prompt, ids, learn, positions, draft.system_end, draft.signal_end)


def _form(family: str) -> ChatForm:
    if family not in CHAT_FORMS:
        expected = f"one of {', '.join(CHAT_FORMS)}"
        fix = nearest(family, CHAT_FORMS) or 'use "plain" for a model without a chat form'
        raise UserError("llm.family", repr(family), expected, fix)
    return CHAT_FORMS[family]
