"""What an exported model is asked is what it was trained on: for every chat form and every tokenizer at hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import shared_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from elm_jax.data.demo import demo_tokenizer
from elm_jax.errors import UserError
from elm_jax.exchange.llm_folder import chat_template
from elm_jax.text.render import CHAT_FORMS, TextSpec, add_tokens, render, render_prompt
from elm_jax.text.vocabulary import load_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
OWN = ("text_tokenizer_gemma", "text_tokenizer_llama", "text_tokenizer_qwen")
REAL = ("tokenizers/qwen2.5", "tokenizers/gpt2", "models/stories260K")
TOKENIZERS = ("demo", "spaced first", *OWN, *REAL)
SYSTEM = "You read ECGs. Think inside <think> tags."


@cache
def trained(name: str) -> Any:
    """The tokenizer of a run."""
    if name == "demo":
        tokenizer = demo_tokenizer()
    elif name == "spaced first":  # as newer SentencePiece tokenizers are: a space before the first piece alone
        tokenizer = load_tokenizer(shared_folder() / "real" / "models" / "stories260K")
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["normalizer"] = None
        backend["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
        }  # fmt: skip
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    else:
        tokenizer = load_tokenizer(GOLDEN / name if name in OWN else shared_folder() / "real" / name)
    add_tokens(tokenizer)
    return tokenizer


@cache
def exported(name: str) -> Any:
    """The tokenizer as an export leaves it, but for its chat template."""
    with TemporaryDirectory() as folder:
        trained(name).save_pretrained(folder)
        return load_tokenizer(folder)


@cache
def template(name: str, spec: TextSpec) -> tuple[str | None, str]:
    return chat_template(spec, trained(name))


@cache
def pairs() -> list[tuple[str, str]]:
    """Tokenizers with the forms that they have the tokens of."""
    found = []
    for name in TOKENIZERS:
        for form in CHAT_FORMS:
            try:
                render_prompt(asked("Rate?"), trained(name), form)
            except UserError:
                continue
            found.append((name, form))
    return found


def asked(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ODD = (
    *("<|im_end|>", "</s>", "<s>", "<eos>", "<signal>", "<|endoftext|>", "<unk>", "<think>", "</think>\n", "<think>\n"),
    *("\n", "\n\n", " ", "?", "Q: ", "user：", "image", "Picture", "ﬁ", "é", "e\u0301", "心", "ASSISTANT:"),
)
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
WORDS = st.sampled_from(["What is the rate", "Is it regular", " 60 bpm", "QT: 400", ", no", ".", "?", "'s", "{{ x }}"])
TEXT = st.lists(WORDS | st.sampled_from(ODD) | st.text(LETTERS, max_size=4), max_size=4).map("".join)
SPOKEN = st.lists(WORDS, min_size=1, max_size=4).map("".join).filter(lambda text: text == text.strip())


@pytest.mark.slow
@settings(max_examples=120)
@given(st.data(), st.lists(TEXT, min_size=1, max_size=5), st.sampled_from([None, "", SYSTEM]), st.integers(0, 2),
       st.booleans(), st.integers(0, 3))  # fmt: skip
def test_the_documented_prompt_has_the_ids_of_training(
    data: Any, texts: list[str], system: str | None, ecgs: int, thinking: bool, tokens: int
) -> None:
    name, form = data.draw(st.sampled_from(pairs()))
    spec = TextSpec(form, tokens, system, explicit_thinking=thinking)
    said = asked(*texts, "ok")[: len(texts) // 2 * 2 + 1]
    answer = [*said, {"role": "assistant", "content": "<think>\nx" if thinking else "x"}]
    options = {key: value for key, value in asdict(spec).items() if key != "max_len"}
    taught = render(answer, trained(name), n_ecgs=ecgs, **options)
    prompt = render_prompt(said, exported(name), n_ecgs=ecgs, **json.loads(json.dumps(options)))
    assert prompt.ids.tolist() == taught.ids[: len(prompt.ids)].tolist()
    assert taught.supervised[len(prompt.ids) :].any()


def by_template(name: str, spec: TextSpec, said: list[dict[str, str]], ecgs: int, **more: Any) -> list[int]:
    """The ids of a conversation by the template, its ECGs written before the first question."""
    tokenizer, placed, waiting = exported(name), [], ("<signal>" * spec.signal_tokens + "\n") * ecgs
    for turn in said:
        placed.append({**turn, "content": waiting + turn["content"]} if turn["role"] == "user" else turn)
        waiting = "" if turn["role"] == "user" else waiting
    text = tokenizer.apply_chat_template(placed, tokenize=False, chat_template=template(name, spec)[0], **more)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@settings(max_examples=250)
@given(st.data(), st.lists(TEXT, min_size=1, max_size=5), st.sampled_from([None, SYSTEM]), st.none() | TEXT,
       st.integers(0, 2), st.booleans(), st.booleans())  # fmt: skip
def test_a_template_says_what_training_says_or_refuses(
    data: Any, texts: list[str], system: str | None, own: str | None, ecgs: int, thinking: bool, answer_first: bool
) -> None:
    name, form = data.draw(st.sampled_from(pairs()))
    spec = TextSpec(form, 2, system, explicit_thinking=thinking)
    written, reason = template(name, spec)
    assert (written is None) == bool(reason)
    # A <signal> that a user writes is a placeholder to a template, whose caller writes these.
    said = [{**t, "content": t["content"].replace("<signal>", "<")} for t in asked(*texts)[answer_first:]]
    if reason or not said:
        return
    said = said if own is None else [{"role": "system", "content": own}, *said]
    try:
        found = by_template(name, spec, said, ecgs, add_generation_prompt=True)
    except TemplateError as refusal:
        assert "render_prompt" in str(refusal)
        return
    options = {key: value for key, value in asdict(spec).items() if key != "max_len"}
    assert found == render_prompt(said, trained(name), n_ecgs=ecgs, **options).ids.tolist()


@settings(max_examples=100)
@given(st.data(), st.lists(SPOKEN, min_size=2, max_size=6), st.integers(0, 2))
def test_a_template_refuses_nothing_that_is_ordinary(data: Any, texts: list[str], ecgs: int) -> None:
    name, form = data.draw(st.sampled_from(pairs()))
    spec = TextSpec(form, 2, SYSTEM)
    if template(name, spec)[1]:
        return
    said = asked(*texts)[: len(texts) // 2 * 2]
    found = by_template(name, spec, said, ecgs)
    assert found == render(said, trained(name), form, SYSTEM, 2, n_ecgs=ecgs).ids.tolist()


@pytest.mark.parametrize(
    ("name", "form", "has"),
    [
        ("demo", "qwen2", True),
        ("tokenizers/qwen2.5", "qwen2", True),
        ("tokenizers/qwen2.5", "plain", False),  # "?" and a line break are one token
        ("tokenizers/gpt2", "gpt2", True),
        ("tokenizers/gpt2", "plain", True),
        ("text_tokenizer_llama", "llama3", True),
        ("text_tokenizer_gemma", "gemma2", False),  # a line break and a dash are one token
        ("models/stories260K", "llama2", True),
        ("models/stories260K", "vicuna", True),
        ("models/stories260K", "plain", False),  # a space before every piece
        ("models/stories260K", "gpt2", False),
        ("spaced first", "llama2", False),
    ],
)
def test_a_template_is_there_where_one_text_can_say_it(shared: Path, name: str, form: str, has: bool) -> None:
    written, reason = template(name, TextSpec(form, 2, SYSTEM))
    assert (not reason) == has == (written is not None), reason


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (TextSpec("qwen2", 1, phase="pretrain"), "phase pretrain"),
        (TextSpec("qwen2", 1, compat=("elm-2026-08",)), "compat clean_answers"),
    ],
)
def test_what_no_template_can_say_is_left_out_with_the_reason(spec: TextSpec, why: str) -> None:
    written, reason = template("demo", spec)
    assert why in reason and written is None
