"""Rendering against the reference: equal with compat; by default equal but where it is at fault."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_log import record
from texts import learnt

from elm_jax.errors import UserError
from elm_jax.text.render import (
    CHAT_FORMS,
    Rendered,
    TextSpec,
    add_tokens,
    clean_text,
    decode,
    render,
    render_prompt,
    stop_ids,
    to_prompts,
    to_turns,
)
from elm_jax.text.vocabulary import load_tokenizer, vocabulary

# All out of one set of goldens, the shared one; conversations of our own are in unit/test_conversations.py.
SHARED = Path(os.environ.get("ELM_JAX_SHARED") or Path(__file__).resolve().parents[3] / "shared")
GOLDEN = SHARED / "golden"
FAMILIES = {"llama": "llama3", "qwen": "qwen2", "gemma": "gemma2"}

# Base case -> the oddity of the reference (golden ODDITIES.md) and the families where ours differs.
DIFFERENT: dict[str, tuple[int, tuple[str, ...]]] = {
    "pretrain_trunc": (1, ("llama", "qwen", "gemma")),
    "trunc96": (1, ("llama", "qwen", "gemma")),
    "trunc64": (1, ("llama", "qwen", "gemma")),
    "trunc48": (1, ("llama", "qwen", "gemma")),
    "mildtrunc_long_over2": (1, ("llama", "qwen", "gemma")),
    "mildtrunc_long_over9": (1, ("llama", "qwen", "gemma")),
    "mildtrunc_long_over23": (1, ("llama", "qwen", "gemma")),
    "mildtrunc_first_over2": (1, ("llama", "qwen", "gemma")),
    "mildtrunc_first_over9": (1, ("llama", "qwen", "gemma")),
    "mildtrunc_first_over23": (1, ("llama", "qwen", "gemma")),
    "newline_start": (3, ("qwen", "gemma")),
    "two_assistant": (4, ("qwen", "gemma")),
    "assistant_first": (4, ("gemma",)),
    "multi3": (5, ("llama", "qwen", "gemma")),
    "role_content": (5, ("llama", "qwen", "gemma")),
    "prefix_only": (5, ("llama", "qwen", "gemma")),
    "images_plural": (5, ("llama", "qwen", "gemma")),
    "special_in_text": (34, ("llama", "qwen", "gemma")),
    "empty_last": (48, ("llama", "qwen", "gemma")),
}


@cache
def tokenizer(name: str, phase: str) -> Any:
    tok = load_tokenizer(GOLDEN / f"text_tokenizer_{name}")
    add_tokens(tok, phase)
    return tok


@pytest.fixture(autouse=True)
def needs_goldens(shared: Path) -> None:
    """Skips where there are none, as everywhere; fails in CI."""


def cases() -> list[Any]:
    found = []
    for name in FAMILIES if GOLDEN.is_dir() else ():
        for case in json.loads((GOLDEN / f"text_pipeline_{name}" / "cases.json").read_text()):
            found.append(pytest.param(name, case, id=f"{name}-{case['id']}"))
    return found


def base(case: dict[str, Any]) -> str:
    return case["id"].removesuffix("_binary").removesuffix("_n4").removesuffix("_n3").removesuffix("_n8")


def differs(name: str, case: dict[str, Any]) -> int | None:
    oddity, families = DIFFERENT.get(base(case), (0, ()))
    return oddity if name in families else None


def settings(name: str, case: dict[str, Any]) -> dict[str, Any]:
    said = case["settings"]
    prompt = (GOLDEN / f"text_pipeline_{name}" / said["system_prompt"]).read_text()
    return {
        "tokenizer": tokenizer(name, said["train_phase"]),
        "family": FAMILIES[name],
        "system_prompt": prompt,
        "signal_tokens": 0 if said["perturb"] == "only_text" else said["num_encoder_tokens"],
        "phase": said["train_phase"],
        "explicit_thinking": said["explicit_thinking"],
        "max_len": said["llm_input_len"] if said["mode"] == "train" else None,
    }


def differences(rendered: Rendered, case: dict[str, Any]) -> list[str]:
    """What of a rendering is not the golden's."""
    ours = {
        "prompt": rendered.prompt,
        "input_ids": rendered.ids.tolist(),
        "labels": np.where(rendered.supervised, rendered.ids, -100).tolist(),
        "signal_id_indices": rendered.signal_positions.ravel().tolist() or [-1],
    }
    return [what for what, found in ours.items() if found != case[what]]


def agrees(name: str, case: dict[str, Any], error: str | None, compat: tuple[str, ...] = ()) -> bool:
    """Whether the rendering is the golden's, or is refused with `error` where the reference fails."""
    if "error" in case:
        with pytest.raises(UserError, match=error):
            render(case["input"], **settings(name, case), compat=compat)
        return True
    found = differences(render(case["input"], **settings(name, case), compat=compat), case)
    if found:
        print(f"{name}-{case['id']}: {', '.join(found)}")
    return not found


def answers(rendered: Rendered, name: str) -> list[str]:
    runs = learnt(rendered)
    runs = runs[:-1] if CHAT_FORMS[FAMILIES[name]].final else runs  # gemma's final <eos> is a run of its own
    return [decode(run, tokenizer(name, "sft"), FAMILIES[name]) for run in runs]


@pytest.mark.parametrize("name", FAMILIES)
def test_with_compat_every_case_equals_the_reference(name: str) -> None:
    mine = [case.values[1] for case in cases() if case.values[0] == name]
    wrong = sum(not agrees(name, case, None, ("elm-2026-08",)) for case in mine)
    record(f"text_pipeline_{name}", f"of {len(mine)} cases, differing with compat", wrong, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_by_default_ours_equals_the_reference_where_it_is_right(name: str) -> None:
    mine = [case.values[1] for case in cases() if case.values[0] == name and not differs(*case.values)]
    wrong = sum(not agrees(name, case, "raise data.max_len") for case in mine)
    record(f"text_pipeline_{name}", f"of {len(mine)} cases where it is right, differing", wrong, 0)


@pytest.mark.parametrize("name, case", [case for case in cases() if not differs(*case.values)])
def test_prompts_end_where_the_reference_begins_to_generate(name: str, case: dict[str, Any]) -> None:
    if "error" in case:
        return
    options = settings(name, case)
    prompts = to_prompts(case["input"], options.pop("tokenizer"), TextSpec(**options))
    ends = [
        start for start, end in case["response_ranges"] if end - start > 1 or options["phase"] == "pretrain"
    ]
    assert [prompt.ids.tolist() for prompt, _ in prompts] == [case["input_ids"][:end] for end in ends]
    # The reference strips what is expected, and has an empty response for gemma's final <eos> (oddity 44b).
    assert [gold.strip() for _, gold in prompts] == case["gt_responses"][: len(ends)]
    assert not any(prompt.supervised.any() for prompt, _ in prompts)


def faulty(*oddities: int) -> list[Any]:
    return [case for case in cases() if differs(*case.values) in oddities]


@pytest.mark.parametrize("name, case", [c for c in faulty(1) if "pretrain" not in c.id])
def test_oddity_1_and_2_truncation_keeps_header_answer_and_signals(name: str, case: dict[str, Any]) -> None:
    options = settings(name, case)
    if (name, case["id"]) == ("gemma", "mildtrunc_first_over23"):
        # 11 tokens cannot hold bos, a user turn of two signals, the response's header and one token to learn.
        with pytest.raises(UserError, match="data.max_len: found 11; expected at least 13"):
            render(case["input"], **options)
        return
    whole = render(case["input"], **{**options, "max_len": None})
    short = render(case["input"], **options)
    assert len(short.ids) <= options["max_len"] < len(whole.ids)
    assert short.signal_positions.shape == (1, options["signal_tokens"])
    last, begun = learnt(whole), learnt(short)
    if CHAT_FORMS[FAMILIES[name]].final and len(begun) == len(last):
        last, begun = last[:-1], begun[:-1]
    elif CHAT_FORMS[FAMILIES[name]].final:
        last = last[:-1]
        begun = [run for run in begun if len(run) > 1]
    assert begun and last[-1][: len(begun[-1])] == begun[-1], "the last answer is learnt from its first token"
    header = vocabulary(options["tokenizer"]).encode(CHAT_FORMS[FAMILIES[name]].answer[0], True)
    start = int(np.flatnonzero(short.supervised)[0])
    assert tuple(short.ids[start - len(header) : start]) == header


@pytest.mark.parametrize("name, case", [c for c in faulty(1) if "pretrain" in c.id])
def test_oddity_1_a_truncated_text_keeps_its_beginning(name: str, case: dict[str, Any]) -> None:
    options = settings(name, case)
    whole, short = render(case["input"], **{**options, "max_len": None}), render(case["input"], **options)
    assert short.ids.tolist() == whole.ids[: options["max_len"]].tolist()
    assert short.supervised.tolist() == whole.supervised[: options["max_len"]].tolist()
    assert short.supervised.sum() > 10


@pytest.mark.parametrize("name, case", faulty(3, 4, 5, 34))
def test_oddities_3_4_5_34_every_answer_is_learnt_as_it_was_given(name: str, case: dict[str, Any]) -> None:
    given = [turn.text for turn in to_turns(case["input"]) if turn.role == "assistant"]
    assert answers(render(case["input"], **settings(name, case)), name) == given


@pytest.mark.parametrize("name, case", faulty(34))
def test_oddity_34_special_tokens_in_text_are_text(name: str, case: dict[str, Any]) -> None:
    options = settings(name, case)
    rendered = render(case["input"], **options)
    assert rendered.signal_positions.shape == (1, options["signal_tokens"])
    ends = [
        token for token in rendered.ids.tolist() if token in stop_ids(options["tokenizer"], FAMILIES[name])
    ]
    assert len(ends) == 3, (
        "system, user and assistant end once each; gemma has no system turn but a final eos"
    )


@pytest.mark.parametrize("name, case", faulty(48))
def test_oddity_48_a_conversation_without_an_answer_is_an_error(name: str, case: dict[str, Any]) -> None:
    options = settings(name, case)
    with pytest.raises(UserError, match="a conversation without an answer"):
        render(case["input"], **options)
    asked = render_prompt(case["input"], **options)
    assert asked.ids.tolist() == case["input_ids"][: len(asked.ids)], "but it is a prompt"


def test_every_entry_of_the_table_of_differences_is_a_case() -> None:
    known = {(case.values[0], base(case.values[1])) for case in cases()}
    assert known >= {(name, key) for key, (_, names) in DIFFERENT.items() for name in names}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_added_with_the_ids_of_the_reference(name: str) -> None:
    setup = json.loads((GOLDEN / f"text_pipeline_{name}" / "setup.json").read_text())
    for phase in ("pretrain", "sft"):
        assert len(tokenizer(name, phase)) == setup[f"len(tokenizer) {phase}"]
    assert tokenizer(name, "sft").convert_tokens_to_ids(list(setup["ids"])) == list(setup["ids"].values())


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_encoded_as_by_the_tokenizer(name: str) -> None:
    words = vocabulary(load_tokenizer(GOLDEN / f"text_tokenizer_{name}"))
    cases = json.loads((GOLDEN / f"text_tokenizer_{name}" / "encode_cases.json").read_text())
    wrong = [case["text"] for case in cases if list(words.encode(case["text"], True)) != case["ids"]]
    record(f"text_tokenizer_{name}", f"of {len(cases)} texts, differing", len(wrong), 0)


def test_user_text_is_cleaned_as_by_the_reference() -> None:
    cases = json.loads((GOLDEN / "text_clean" / "cases.json").read_text())
    wrong = [case["in"] for case in cases if clean_text(case["in"]) != case["out"]]
    record("text_clean", f"of {len(cases)} texts, differing", len(wrong), 0)


TEMPLATES = {"llama-3": "llama", "qwen-7b-chat": "qwen", "gemma-2": "gemma"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_forms_are_written_as_by_the_templates(template: str) -> None:
    name, seen, wrong = TEMPLATES[template], 0, 0
    for case in json.loads((GOLDEN / "text_chat_templates" / "cases.json").read_text()):
        if case["template"] != template or not case["messages"]:
            continue
        roles = {"U": "user", "A": "assistant"}
        turns = [{"role": roles[who], "content": text} for who, text in case["messages"]]
        write = render if turns[-1]["content"] else render_prompt
        prompt = write(turns, tokenizer(name, "sft"), FAMILIES[name], case["system"], signal_tokens=0).prompt
        # The reference's gemma template closes even an open response with <eos>; a prompt must not.
        final = "<eos>" if write is render_prompt and name == "gemma" else ""
        wrong += prompt + final != case["prompt"]
        seen += 1
    assert seen == 12
    record("text_chat_templates", f"{template}: of {seen} prompts, differing", wrong, 0)
