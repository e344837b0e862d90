"""What rendering promises for every conversation, and its decisions one by one."""

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import learnt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elm_jax.errors import UserError
from elm_jax.text.render import (
    CHAT_FORMS,
    Rendered,
    TextSpec,
    Turn,
    add_tokens,
    decode,
    decode_text,
    render,
    render_prompt,
    stop_ids,
    to_prompts,
    to_turns,
)

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
SYSTEM = "You read ECGs. Think inside <think> tags; never write <|im_end|>."
# Which tiny tokenizer writes which family; "plain" needs no chat tokens, only an eos.
FAMILIES = {"llama3": "llama", "qwen2": "qwen", "gemma2": "gemma", "plain": "qwen"}


@cache
def tokenizer(family: str) -> Any:
    tok = AutoTokenizer.from_pretrained(GOLDEN / f"text_tokenizer_{FAMILIES[family]}")
    add_tokens(tok)
    return tok


def asked(*texts: str) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def answers(rendered: Rendered, family: str) -> list[str]:
    final = (
        {tokenizer(family).convert_tokens_to_ids(CHAT_FORMS[family].final)} if family == "gemma2" else set()
    )
    return [decode(run, tokenizer(family), family) for run in learnt(rendered) if set(run) != final]


def same(text: str) -> str:
    """What a tokenizer may change: it composes characters (Qwen)."""
    return unicodedata.normalize("NFC", text)


LITERALS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<signal>",
    "<eos>",
    "<|eot_id|>",
    "\n",
    "\n\n",
    " ",
    "A: ",
]
TAGS = [
    "<think>",
    "</think>\n",
    "<answer>",
    "</answer>",
    "<think>\n",
    "<end_of_turn>",
    "<ecg>",
    "image",
    "é",
    "心",
]
# U+2581 is how sentencepiece tokenizers write a space; surrogates are not text.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXT = st.lists(st.sampled_from(LITERALS + TAGS) | st.text(LETTERS, max_size=6), max_size=6).map("".join)
TURNS = st.lists(st.tuples(st.sampled_from(["human", "gpt"]), TEXT), min_size=1, max_size=6)
FAMILY = st.sampled_from(list(FAMILIES))


def said(turns: list[tuple[str, str]], family: str) -> list[str]:
    texts = [text.strip() if CHAT_FORMS[family].strip else text for who, text in turns if who == "gpt"]
    return [text for text in texts if text]


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


@settings(max_examples=150, deadline=None)
@given(FAMILY, TURNS, st.sampled_from([None, "", SYSTEM]), st.integers(0, 3), st.booleans())
def test_exactly_the_answers_are_learnt(
    family: str, turns: list[tuple[str, str]], system: str | None, n: int, thinking: bool
) -> None:
    options = {"system_prompt": system, "signal_tokens": n, "explicit_thinking": thinking, "n_ecgs": 1}
    if not said(turns, family):
        with pytest.raises(UserError, match="without an answer"):
            render(conversation(turns), tokenizer(family), family, **options)
        return
    rendered = render(conversation(turns), tokenizer(family), family, **options)
    expected = [text.removeprefix("<think>\n") if thinking else text for text in said(turns, family)]
    assert [same(text) for text in answers(rendered, family)] == [same(text) for text in expected]
    assert rendered.signal_positions.shape == (1, n)
    signal = tokenizer(family).convert_tokens_to_ids("<signal>")
    assert (rendered.ids == signal).sum() == n, "a <signal> in a message is text"
    assert rendered.ids.dtype == np.int32 and rendered.supervised.dtype == bool
    assert all(run[-1] in stop_ids(tokenizer(family), family) for run in learnt(rendered))


@settings(max_examples=150, deadline=None)
@given(FAMILY, TURNS, st.integers(1, 120), st.integers(0, 3), st.integers(1, 2))
def test_truncation_keeps_length_signals_and_the_last_answer(
    family: str, turns: list[tuple[str, str]], max_len: int, n: int, n_ecgs: int
) -> None:
    turns = [(who, text.replace("<ecg>", "")) for who, text in turns]
    if not said(turns, family):
        return
    arguments = (conversation(turns), tokenizer(family), family, SYSTEM, n)
    whole = render(*arguments, n_ecgs=n_ecgs)
    try:
        short = render(*arguments, max_len=max_len, n_ecgs=n_ecgs)
    except UserError as error:
        assert "raise data.max_len" in str(error)
        assert max_len < 25 + n * n_ecgs, "only what truncation never drops is too long"
        return
    assert len(short.ids) <= max_len
    assert short.signal_positions.shape == (n_ecgs, n)
    begun, last = learnt(short), learnt(whole)
    if family == "gemma2":  # the final <eos>
        begun, last = [run for run in begun if len(run) > 1 or run != last[-1]], last[:-1]
    assert begun[-1] == last[-1][: len(begun[-1])]
    before = int(np.flatnonzero(short.supervised)[0])
    header = render(asked("", "x"), tokenizer(family), family)
    end = int(np.flatnonzero(header.supervised)[0])
    length = len(tokenizer(family)(CHAT_FORMS[family].answer[0], add_special_tokens=False)["input_ids"])
    assert short.ids[before - length : before].tolist() == header.ids[end - length : end].tolist()


@settings(max_examples=100, deadline=None)
@given(FAMILY, TEXT, TEXT, st.integers(1, 3), st.integers(1, 3))
def test_prefixes_are_the_same_for_every_question(
    family: str, one: str, other: str, n: int, n_ecgs: int
) -> None:
    one, other = one.replace("<ecg>", ""), other.replace("<ecg>", "")
    first, second = (
        render(asked(text, "yes"), tokenizer(family), family, SYSTEM, n, n_ecgs=n_ecgs)
        for text in (one, other)
    )
    assert first.signal_end == second.signal_end == first.signal_positions[-1, -1] + 1
    assert first.system_end == second.system_end <= first.signal_end
    assert (first.system_end > 0) == (family in ("llama3", "qwen2"))
    assert first.ids[: first.signal_end].tolist() == second.ids[: second.signal_end].tolist()


@settings(max_examples=100, deadline=None)
@given(FAMILY, TURNS, st.booleans())
def test_prompts_are_beginnings_of_what_is_trained(
    family: str, turns: list[tuple[str, str]], thinking: bool
) -> None:
    if not said(turns, family):
        return
    options = {"system_prompt": SYSTEM, "explicit_thinking": thinking}
    trained = render(conversation(turns), tokenizer(family), family, **options)
    prompts = to_prompts(conversation(turns), tokenizer(family), TextSpec(family, **options))
    assert len(prompts) == len(said(turns, family))
    for (prompt, gold), text in zip(prompts, said(turns, family), strict=True):
        assert not prompt.supervised.any()
        assert prompt.ids.tolist() == trained.ids[: len(prompt.ids)].tolist()
        assert not trained.supervised[len(prompt.ids) - 1] and trained.supervised[len(prompt.ids)]
        assert gold == (text.removeprefix("<think>\n") if thinking else text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_forms_say_the_same(family: str) -> None:
    forms = [
        [{"from": "human", "value": "Rate?"}, {"from": "gpt", "value": "72 bpm"}],
        [{"role": "user", "content": "Rate?"}, {"role": "assistant", "content": "72 bpm"}],
        ["single-query", "Rate?", ["72", "bpm"]],
        ["single-query", "Rate?", "72 bpm"],
        (Turn("user", "Rate?"), Turn("assistant", "72 bpm")),
    ]
    forms += [json.dumps(form) for form in forms[:4]]
    ids = [render(form, tokenizer(family), family).ids.tolist() for form in forms]
    assert all(one == ids[0] for one in ids)
    alone = render("72 bpm", tokenizer(family), family)
    assert answers(alone, family) == ["72 bpm"] and alone.signal_positions.shape == (1, 1)
    assert alone.ids.tolist() == render(asked("", "72 bpm"), tokenizer(family), family).ids.tolist()


def test_several_answers_are_joined_by_a_space() -> None:
    assert (
        to_turns(["single-query", "Which?", ["qt interval", "p duration"]])[1].text
        == "qt interval p duration"
    )


@pytest.mark.parametrize("raw", ["sinus rhythm; normal", "42", "true", "{broken", "[1, 2", ""])
def test_text_that_is_not_json_of_a_form_stays_a_string(raw: str) -> None:
    assert decode_text(raw) == raw


@pytest.mark.parametrize(
    "wrong, found",
    [
        ([], r"\[\]"),
        ({"role": "user"}, "role"),
        (["a", "b"], "'a', 'b'"),
        (["type", 3, "b"], "3"),
        ([{"from": "human"}], "the keys from"),
        ([{"value": "x"}], "the keys value"),
        ([{"from": "human", "value": ["x"]}], "x"),
        ([{"from": "human", "value": "x"}, "y"], "'y'"),
        ([{"from": "human", "value": "\ud800"}], "half of a surrogate pair at character 0"),
        (None, "None"),
    ],
)
def test_a_conversation_of_no_form_is_an_error_that_shows_it(wrong: Any, found: str) -> None:
    with pytest.raises(UserError, match=f"text.*: found .*{found}"):
        render(wrong, tokenizer("qwen2"), "qwen2")


def test_several_ecgs_go_to_their_markers_in_order() -> None:
    turns = asked("Compare <ecg>\nwith < ECG > please.", "Same.", "And?", "No.")
    rendered = render(turns, tokenizer("qwen2"), "qwen2", "", signal_tokens=2, n_ecgs=2)
    assert "user\nCompare <signal><signal>\nwith <signal><signal>\nplease.<|im_end|>" in rendered.prompt
    assert rendered.signal_positions.shape == (2, 2) and rendered.signal_end == 0
    assert (np.diff(rendered.signal_positions.ravel()) > 0).all()


def test_without_markers_all_ecgs_precede_the_first_question() -> None:
    rendered = render(asked("Compare.", "Same."), tokenizer("qwen2"), "qwen2", "", 2, n_ecgs=2)
    assert "user\n<signal><signal>\n<signal><signal>\nCompare.<|im_end|>" in rendered.prompt
    marked = render(
        asked("<ecg>\n<ecg>\nUser: Compare.", "Same."), tokenizer("qwen2"), "qwen2", "", 2, n_ecgs=2
    )
    assert marked.ids.tolist() == rendered.ids.tolist() and marked.signal_end == rendered.signal_end > 0


def test_markers_in_later_questions_hold_their_ecg() -> None:
    turns = asked("First <ecg> here", "yes", "then <ecg> there", "no")
    rendered = render(turns, tokenizer("qwen2"), "qwen2", n_ecgs=2)
    assert "then <signal>\nthere" in rendered.prompt
    prompts = to_prompts(turns, tokenizer("qwen2"), TextSpec("qwen2"), n_ecgs=2)
    assert [prompt.signal_positions.shape for prompt, _ in prompts] == [(1, 1), (2, 1)]
    short = render(turns, tokenizer("qwen2"), "qwen2", n_ecgs=2, max_len=len(rendered.ids) - 2)
    assert "user\n<signal>\nthen <signal>\nthere" in short.prompt, "the dropped turn's ECG comes first"


def test_one_marker_for_two_ecgs_is_an_error() -> None:
    with pytest.raises(UserError, match="1 <ecg> markers for 2 ECGs"):
        render(asked("<ecg> Compare.", "Same."), tokenizer("qwen2"), "qwen2", n_ecgs=2)


def test_one_ecg_precedes_the_first_question_wherever_its_marker_is() -> None:
    rendered = render(asked("What is <ecg> this?", "An ECG."), tokenizer("qwen2"), "qwen2")
    assert "user\n<signal>\nWhat is this?<|im_end|>" in rendered.prompt


def test_without_signal_tokens_there_are_no_placeholders() -> None:
    rendered = render(
        asked("<ecg>\nCompare <ecg>", "x"), tokenizer("qwen2"), "qwen2", signal_tokens=0, n_ecgs=2
    )
    assert "<signal>" not in rendered.prompt and "user\nCompare" in rendered.prompt
    assert rendered.signal_positions.shape == (2, 0) and rendered.signal_end == 0


def test_a_leading_system_turn_takes_the_place_of_the_system_prompt() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *asked("Rate?", "72")]
    rendered = render(turns, tokenizer("qwen2"), "qwen2", "Be long.")
    assert rendered.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    with pytest.raises(UserError, match="a later system turn"):
        render([*turns, turns[0]], tokenizer("qwen2"), "qwen2")


def test_the_default_system_prompt_is_the_family_s() -> None:
    assert "system\nYou are a helpful assistant." in render("x", tokenizer("qwen2"), "qwen2").prompt
    assert "system" not in render("x", tokenizer("llama3"), "llama3").prompt
    assert render("x", tokenizer("llama3"), "llama3").system_end == 0


def test_the_system_prefix_ends_with_a_special_token() -> None:
    for family in ("llama3", "qwen2"):
        rendered = render(asked("Rate?", "72"), tokenizer(family), family, SYSTEM)
        end = tokenizer(family).convert_tokens_to_ids(CHAT_FORMS[family].stops[0])
        assert rendered.ids[rendered.system_end - 1] == end
        assert (rendered.ids[: rendered.system_end] == end).sum() == 1, "the one in the prompt is text"


def test_truncation_goes_in_the_order_that_is_documented() -> None:
    turns = asked("One two three?", "First answer.", "Four five six seven?", "A somewhat longer last answer.")

    def prompt(max_len: int) -> str:
        return render(turns, tokenizer("qwen2"), "qwen2", SYSTEM, 2, max_len=max_len).prompt

    whole = render(turns, tokenizer("qwen2"), "qwen2", SYSTEM, 2)
    size = len(whole.ids)
    assert prompt(size) == whole.prompt
    assert prompt(size - 1) == whole.prompt.removesuffix("\n"), "nothing is lost that is learnt"
    without_first = render(turns[2:], tokenizer("qwen2"), "qwen2", SYSTEM, 2)
    assert (
        prompt(size - 2) == without_first.prompt.removesuffix("\n")
        or prompt(size - 2) == without_first.prompt
    )
    bare = prompt(len(without_first.ids) - 2)
    assert "system" not in bare and "<signal><signal>\nFour five six seven?" in bare
    bare_size = len(tokenizer("qwen2")(bare, add_special_tokens=False)["input_ids"])
    trimmed = prompt(bare_size - 4)
    assert "seven?" in trimmed and "Four" not in trimmed and "last answer.<|im_end|>" in trimmed
    cut = prompt(20)
    assert cut.startswith("<|im_start|>user\n<signal><signal>\n<|im_end|>\n<|im_start|>assistant\nA ")
    assert "<|im_end|>" not in cut.split("assistant\n")[1], "an answer that is cut does not learn to end"
    with pytest.raises(
        UserError, match="data.max_len: found 5; expected at least .* 2 of them the ECG's; raise"
    ):
        prompt(5)


def test_the_oldest_of_two_answers_is_dropped_not_the_last() -> None:
    turns = [*asked("Read.", "normal " * 10), {"from": "gpt", "value": "and sinus rhythm"}]
    short = render(turns, tokenizer("qwen2"), "qwen2", "", max_len=30)
    assert answers(short, "qwen2") == ["and sinus rhythm"] and "Read." in short.prompt


def test_what_follows_the_last_answer_is_left_out_of_training() -> None:
    turns = asked("Rate?", "72", "Sure?", "")
    rendered = render(turns, tokenizer("qwen2"), "qwen2")
    assert rendered.ids.tolist() == render(turns[:2], tokenizer("qwen2"), "qwen2").ids.tolist()
    chat = render_prompt(turns[:3], tokenizer("qwen2"), "qwen2")
    assert chat.prompt.endswith("Sure?<|im_end|>\n<|im_start|>assistant\n")


def test_explicit_thinking_opens_every_response() -> None:
    chat = render_prompt(asked("Rate?"), tokenizer("qwen2"), "qwen2", explicit_thinking=True)
    assert chat.prompt.endswith("<|im_start|>assistant\n<think>\n")
    newline = render(
        asked("Rate?", "<think>\n\nHm.</think>"), tokenizer("qwen2"), "qwen2", explicit_thinking=True
    )
    assert newline.ids[: len(chat.ids)].tolist() == chat.ids.tolist(), "oddity 3: also before another newline"
    assert answers(newline, "qwen2") == ["\nHm.</think>"]


def test_an_answer_without_a_thought_is_asked_for_as_it_is_learnt() -> None:
    said = asked("Rate?", "<think>\nBeats.</think> 61", "Sure?", "Yes")
    prompts = to_prompts(said, tokenizer("qwen2"), TextSpec("qwen2", explicit_thinking=True))
    assert [gold for _, gold in prompts] == ["Beats.</think> 61", "Yes"]
    assert prompts[0][0].prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert prompts[1][0].prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_nothing_predicts_the_first_token_of_a_text_without_bos() -> None:
    tok = tokenizer("plain")
    assert tok.bos_token is None
    alone = render("72 bpm", tok, "plain", signal_tokens=0, phase="pretrain")
    assert alone.supervised.tolist() == [False] + [True] * (len(alone.ids) - 1)
    behind = render("72 bpm", tok, "plain", signal_tokens=1, phase="pretrain")
    assert learnt(behind)[0] == alone.ids.tolist()


def test_markers_say_how_many_ecgs_there_are_where_nobody_does() -> None:
    two = asked("From <ecg> to <ecg>: worse?", "no", "And from that <ecg>?", "yes")
    for write, ecgs in ((render, 3), (render_prompt, 3)):
        found = write(two, tokenizer("qwen2"), "qwen2", signal_tokens=2)
        assert found.signal_positions.shape == (ecgs, 2)
        assert found.ids.tolist() == write(two, tokenizer("qwen2"), "qwen2", signal_tokens=2, n_ecgs=3).ids.tolist()
    assert render(asked("Normal?", "no"), tokenizer("qwen2"), "qwen2").signal_positions.shape == (1, 1)
    first, second = (p for p, _ in to_prompts(two, tokenizer("qwen2"), TextSpec("qwen2", signal_tokens=2)))
    assert first.signal_positions.shape == (2, 2) and second.signal_positions.shape == (3, 2)


def test_a_long_chat_forgets_its_oldest_turns() -> None:
    turns = asked("One?", "1.", "Two?", "2.", "Three?")
    whole = render_prompt(turns, tokenizer("qwen2"), "qwen2", "")
    short = render_prompt(turns, tokenizer("qwen2"), "qwen2", "", max_len=len(whole.ids) - 1)
    assert "One?" not in short.prompt and "<signal>\nTwo?" in short.prompt
    with pytest.raises(UserError, match="data.max_len"):
        render_prompt(turns, tokenizer("qwen2"), "qwen2", "", max_len=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pretraining_learns_the_whole_text(family: str) -> None:
    for text in ["sinus rhythm; normal", "\n leading newline", "<signal> <|im_end|>"]:
        rendered = render(text, tokenizer(family), family, phase="pretrain", signal_tokens=3, n_ecgs=2)
        assert answers(rendered, family) == [text]
        assert rendered.signal_end == rendered.signal_positions[-1, -1] + 1 and rendered.system_end == 0
    (prompt, gold), *_ = to_prompts(text, tokenizer(family), TextSpec(family, 3, phase="pretrain"))
    assert gold == text and prompt.prompt.endswith("<signal>\n")
    told = render(asked("Q?", "one", "R?", "two"), tokenizer(family), family, phase="pretrain")
    assert answers(told, family) == ["one\ntwo"] and "Q?" not in told.prompt


def test_plain_writes_questions_and_answers_on_lines() -> None:
    rendered = render(asked("Rate?", "72", "Axis?", "left"), tokenizer("plain"), "plain", "Be brief.")
    assert rendered.prompt == "Be brief.\n<signal>\nRate?\n72<|im_end|>\nAxis?\nleft<|im_end|>"
    assert rendered.system_end == 0 and rendered.signal_end == rendered.signal_positions[0, 0] + 1


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "yes", "no", "</s>", "<", "/s>", "?"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    add_tokens(tok)
    return tok


def test_a_vocabulary_that_spells_special_tokens_as_words_does_not_leak_them() -> None:
    tok = word_tokenizer(eos_token="</s>")
    rendered = render(asked("no", "yes </s> no"), tok, "plain")
    assert learnt(rendered)[0] == [1, 4, 5, 2, 3], "yes, <, /s>, no, and the end"


def test_plain_needs_an_end_token() -> None:
    with pytest.raises(UserError, match="a tokenizer without an eos token"):
        render("yes", word_tokenizer(), "plain")


def test_a_family_of_another_tokenizer_is_an_error() -> None:
    with pytest.raises(UserError, match=r"without <\|begin_of_text\|>"):
        render("yes", tokenizer("qwen2"), "llama3")
    with pytest.raises(UserError, match="did you mean 'qwen2'"):
        render("yes", tokenizer("qwen2"), "qwen")
    with pytest.raises(UserError, match="did you mean 'pretrain'"):
        render("yes", tokenizer("qwen2"), "qwen2", phase="pretraining")
    with pytest.raises(UserError, match="clean_answers"):
        render("yes", tokenizer("qwen2"), "qwen2", compat=("clean_answer",))


def test_a_tokenizer_without_signal_is_told_to_add_it() -> None:
    tok = AutoTokenizer.from_pretrained(GOLDEN / "text_tokenizer_qwen")
    with pytest.raises(UserError, match="without <signal>.*add_tokens"):
        render("yes", tok, "qwen2")
    assert render("yes", tok, "qwen2", signal_tokens=0).signal_positions.shape == (1, 0)
    assert add_tokens(tok, "pretrain") == ["<signal>"]
    assert add_tokens(tok) == ["<think>", "</think>", "<answer>", "</answer>"]
    assert add_tokens(tok) == []
    assert render("yes", tok, "qwen2").signal_positions.shape == (1, 1)


def test_single_compat_names_change_only_what_they_name() -> None:
    turns = asked("Is the image normal?", "A: none in this image")
    assert answers(render(turns, tokenizer("qwen2"), "qwen2", compat=("clean_answers",)), "qwen2") == [
        "none in this signal"
    ]
    merged = asked("Hi", "\n\nyes")
    assert not render(merged, tokenizer("qwen2"), "qwen2", compat=("response_by_ids",)).supervised.any()
    assert render(merged, tokenizer("qwen2"), "qwen2", compat=("truncate_tokens",)).supervised.any()
    with pytest.raises(UserError, match="2 <signal> tokens; expected 1"):
        render(asked("<signal>", "x"), tokenizer("qwen2"), "qwen2", compat=("special_tokens_in_text",))


def test_generated_ids_are_decoded_to_their_end() -> None:
    tok = tokenizer("qwen2")
    ids = tok("<think>a</think> b<|im_end|>more", add_special_tokens=False)["input_ids"]
    assert decode([*ids, -1, -1], tok, "qwen2") == "<think>a</think> b"
    assert decode([*ids[:3], -1, *ids], tok, "qwen2") == tok.decode(ids[:3])
    assert set(stop_ids(tok, "qwen2")) == {tok.eos_token_id, tok.pad_token_id}


def test_real_conversations_are_rendered_as_tokenised_at_once(shared: Path) -> None:
    tok = AutoTokenizer.from_pretrained(shared / "real" / "tokenizers" / "qwen2.5")
    add_tokens(tok)
    records = json.loads((shared / "real" / "text" / "ecgqa" / "ptbxl_any_id_sample_1500.json").read_text())
    spoken = [[record["question_type"], record["question"], record["answer"]] for record in records]
    for conversation in spoken:
        rendered = render(conversation, tok, "qwen2", SYSTEM.replace("<", "["), 3)
        assert rendered.ids.tolist() == tok(rendered.prompt, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_no_special_tokens_but_s_is_enough(shared: Path) -> None:
    tok = AutoTokenizer.from_pretrained(shared / "real" / "models" / "stories260K")
    add_tokens(tok)
    rendered = render(asked("Is it normal?", "Yes </s>."), tok, "plain", signal_tokens=2)
    assert rendered.prompt == "<s><signal><signal>\nIs it normal?\nYes </s>.</s>"
    assert rendered.ids[0] == tok.bos_token_id and rendered.ids[-1] == tok.eos_token_id
    assert decode(learnt(rendered)[0], tok, "plain") == "Yes </s>."
    assert stop_ids(tok, "plain") == (tok.eos_token_id,)
