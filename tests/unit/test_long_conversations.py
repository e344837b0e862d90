"""Conversations that are long in every way: shortened in few steps, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from texts import chat_tokenizer

from elm_jax.errors import UserError
from elm_jax.text import write
from elm_jax.text.render import TextSpec, clean_text, render, to_prompt, to_prompts, to_tokens


@pytest.mark.parametrize("asked, answered", [(1, 1), (4000, 1), (1, 4000)])
def test_thousands_of_turns_are_shortened_in_few_steps(
    asked: int, answered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts: list[int] = []

    def counted(*args: Any) -> Any:
        drafts.append(1)
        return chat_draft(*args)

    chat_draft = write.chat_draft
    monkeypatch.setattr(write, "chat_draft", counted)
    roles = (["user"] * asked + ["assistant"] * answered) * (4000 // (asked + answered))
    roles = roles or ["user"] * asked + ["assistant"] * answered
    conversation = [{"role": role, "content": f"a{number}"} for number, role in enumerate(roles)]
    found = render(conversation, chat_tokenizer(), "qwen2", max_len=128)
    assert len(found.ids) <= 128 and found.supervised.any() and f"a{len(roles) - 1}" in found.prompt
    assert len(drafts) < 40


def test_a_prompt_before_any_question_is_shortened_too() -> None:
    turns = ["one", "two " * 90]
    conversation = [{"role": "assistant", "content": text} for text in turns] + [{"role": "user", "content": "c"}]
    conversation.append({"role": "assistant", "content": "d"})
    spec = TextSpec("qwen2", 1, "", max_len=64)
    assert all(len(prompt.ids) <= 64 for prompt, _ in to_prompts(conversation, chat_tokenizer(), spec))


def test_blanks_that_are_no_speaker_are_read_once() -> None:
    """A pattern that tried every part of them took minutes."""
    assert clean_text(" " * 200_000) == " " * 200_000
    assert clean_text(" user : assistant:\n x") == "x"


def test_ecgs_that_leave_no_room_are_refused_in_phase_pretrain_too() -> None:
    spec = TextSpec("qwen2", 32, phase="pretrain", max_len=16)
    for write_it in (to_prompt, to_prompts, to_tokens):
        with pytest.raises(UserError, match=r"data\.max_len"):
            write_it("sinus rhythm", chat_tokenizer(), spec)
