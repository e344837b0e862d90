"""The forms that the reference has not: Llama 2's, and ours for GPT-2 and OPT. And where answers end."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elm_jax.text.forms import CHAT_FORMS
from elm_jax.text.render import TextSpec, add_tokens, decode, render, render_prompt, stop_ids, to_prompts

TALK = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Once <ecg> upon\n"},
    {"from": "gpt", "value": " a time "},
    {"from": "human", "value": "more"},
    {"from": "gpt", "value": "the end"},
]
# As the model's own published template writes it.
LLAMA2 = (
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<signal>\nOnce upon [/INST] a time </s>"
    "<s>[INST] more [/INST] the end </s>"
)
GPT2 = (
    "<|endoftext|>Be brief.<|endoftext|>\nUser:\n<signal>\nOnce upon\n<|endoftext|>\nAssistant:\n a time "
    "<|endoftext|>\nUser:\nmore<|endoftext|>\nAssistant:\nthe end<|endoftext|>\n"
)


@cache
def tokenizer(folder: Path) -> Any:
    tok = AutoTokenizer.from_pretrained(folder)
    add_tokens(tok)
    return tok


@pytest.fixture
def llama2(shared: Path) -> Any:
    """A SentencePiece tokenizer that puts a space before every run of text, as Llama 2's."""
    return tokenizer(shared / "real" / "models" / "stories260K")


@pytest.fixture
def gpt2(shared: Path) -> Any:
    return tokenizer(shared / "real" / "tokenizers" / "gpt2")


def learnt(rendered: Any, tok: Any, family: str) -> list[str]:
    """The answers that are learnt, each without its end token."""
    answers, run = [], []
    for token, supervised in zip(rendered.ids.tolist(), rendered.supervised, strict=True):
        if supervised:
            run.append(token)
        elif run:
            answers, run = [*answers, run], []
    answers += [run] if run else []
    assert all(run[-1] in stop_ids(tok, family) for run in answers)
    return [decode(run, tok, family) for run in answers]


def test_llama2_has_its_system_prompt_in_the_first_question_and_the_ids_of_the_whole_text(llama2):
    rendered = render(TALK, llama2, "llama2")
    assert rendered.prompt == LLAMA2
    assert rendered.ids.tolist() == llama2(LLAMA2, add_special_tokens=False)["input_ids"]
    assert learnt(rendered, llama2, "llama2") == ["a time", "the end"]
    assert rendered.signal_end == rendered.signal_positions[0, 0] + 1


def test_llama2_without_a_system_prompt_begins_with_the_question(llama2):
    assert render(TALK[1:], llama2, "llama2").prompt.startswith("<s>[INST] <signal>\nOnce upon [/INST]")
    opened = [TALK[0], {"from": "gpt", "value": "Hello."}, *TALK[1:3]]
    expected = "<s> Hello. </s><s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<signal>\nOnce upon [/INST]"
    assert render(opened, llama2, "llama2").prompt.startswith(expected), "in the first question, wherever that is"


@pytest.mark.parametrize("family", ["llama2", "gpt2"])
def test_prompts_are_the_beginnings_of_what_is_learnt(family, request):
    tok = request.getfixturevalue(family)
    whole = render(TALK, tok, family).ids.tolist()
    prompts = to_prompts(TALK, tok, TextSpec(family))
    assert [gold.strip() for _, gold in prompts] == ["a time", "the end"]
    for prompt, _ in prompts:
        assert prompt.ids.tolist() == whole[: len(prompt.ids)]


def test_vicuna_writes_the_ids_of_the_published_training_code(golden, llama2):
    """Conversations of the golden that begin with a question; there each ECG is the id -200. The sentence before them
    is given, or the form's own."""
    told = json.loads((golden("gem_fusion") / "templates.json").read_text())
    signal, seen = llama2.convert_tokens_to_ids("<signal>"), 0
    for case in told["cases"]:
        system = case["prompt"].partition(" USER: ")[0]
        turns = [{"from": who, "value": text} for who, text in case["after_preprocess_multimodal"]]
        if turns[0]["from"] == "gpt" or "</s>" in str(turns):
            continue
        for form, prompt in (("vicuna", system), (case["template"], None)):
            text = {"system_prompt": prompt, "signal_tokens": int(case["has_image"])}
            rendered, theirs = render(turns, llama2, form, **text), case["stories260K"]
            assert np.where(rendered.ids == signal, -200, rendered.ids).tolist() == theirs["input_ids"], case["name"]
            assert rendered.supervised.tolist() == [bool(learnt) for learnt in theirs["labelled"]], case["name"]
        seen += 1
    assert seen >= 4


def test_gemma3_mistral_and_phi3_write_as_their_templates():
    """As the published templates make them; of Phi-3's, what its tokenizer leaves."""
    forms = ("gemma3", "mistral", "phi3")
    words = {word: i for i, word in enumerate(["<unk>", *sorted({t for f in forms for t in CHAT_FORMS[f].tokens})])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", additional_special_tokens=[*words][1:])
    add_tokens(tok)
    written = {form: render(TALK, tok, form, signal_tokens=0).prompt for form in forms}
    assert written["gemma3"] == (
        "<bos><start_of_turn>user\nBe brief.\n\nOnce upon<end_of_turn>\n<start_of_turn>model\na time<end_of_turn>\n"
        "<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\nthe end<end_of_turn>\n"
    )
    assert written["mistral"] == "<s>[INST] Be brief.\n\nOnce upon [/INST] a time</s>[INST] more [/INST] the end</s>"
    assert written["phi3"] == (
        "<|system|>Be brief.<|end|><|user|>Once upon\n<|end|><|assistant|> a time <|end|>"
        "<|user|>more<|end|><|assistant|>the end<|end|>"
    )


def test_vicuna_asks_without_a_space_that_no_answer_follows(llama2):
    rendered = render_prompt(TALK[:2], llama2, "vicuna")
    assert rendered.prompt == "<s>Be brief. USER: <signal>\nOnce upon\n ASSISTANT:"
    assert rendered.ids.tolist() == llama2(rendered.prompt, add_special_tokens=False)["input_ids"]


def test_gpt2_ends_every_turn_with_its_end_of_text_token(gpt2):
    rendered = render(TALK, gpt2, "gpt2")
    assert rendered.prompt == GPT2
    assert learnt(rendered, gpt2, "gpt2") == [" a time ", "the end"]
    assert rendered.system_end == 5 and rendered.ids[4] == gpt2.eos_token_id, "the system prompt can be shared"
    assert stop_ids(gpt2, "gpt2") == (gpt2.eos_token_id,)


def test_a_base_model_stops_at_the_end_of_a_turn_and_at_its_own_end_token(shared: Path):
    tok = AutoTokenizer.from_pretrained(shared / "real" / "tokenizers" / "qwen2.5")
    tok.eos_token = "<|endoftext|>"  # as the base models have it, though turns end with <|im_end|>
    assert set(stop_ids(tok, "qwen2")) == set(tok.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
