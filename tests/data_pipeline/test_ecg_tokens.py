"""ECGs as tokens in the text: where they stand, what truncation leaves of them, which ids they have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity_log import record

from elm_jax.data.demo import demo_tokenizer
from elm_jax.data.ecg_tokens import add_ecg_tokens, cut_ecgs, kept_as_reference, reserved, write_ecgs, write_prompt
from elm_jax.errors import UserError
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.render import add_tokens, render
from elm_jax.text.vocabulary import vocabulary

TURNS = [{"from": "human", "value": "Is <ecg> like <ecg>?"}, {"from": "gpt", "value": "yes"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "ecg_byte.json"
    EcgByte([b"aa", b"ab"], order=[257, *range(256), 256]).save(path)
    return path


def ecg_tokenizer():
    made = demo_tokenizer()
    add_tokens(made, "sft")
    return made


def test_tokens_are_in_the_order_of_their_ids_or_of_the_file(file: Path) -> None:
    for compat, first in ((), "signal_0"), (("signal_token_order",), "signal_257"):
        tokenizer = ecg_tokenizer()
        before = len(tokenizer)
        tokens = add_ecg_tokens(tokenizer, file, 8, compat)
        assert len(tokenizer) == before + 258 and tokenizer.convert_ids_to_tokens(before) == first
        names = tokenizer.convert_ids_to_tokens(tokens.llm_ids.tolist())
        assert names == [f"signal_{i}" for i in range(258)]
        again = add_ecg_tokens(tokenizer, file, 8, compat)
        assert len(tokenizer) == before + 258
        np.testing.assert_array_equal(again.llm_ids, tokens.llm_ids)


def test_their_names_in_a_message_are_text(file: Path) -> None:
    tokenizer = ecg_tokenizer()
    tokens = add_ecg_tokens(tokenizer, file, 8)
    ids = vocabulary(tokenizer).encode("what is signal_12?")
    assert not set(ids) & set(tokens.llm_ids.tolist())


def test_ecgs_stand_where_their_placeholders_stood(file: Path) -> None:
    rendered = render(TURNS, ecg_tokenizer(), "qwen2", "Be brief.", n_ecgs=2)
    one, two = np.arange(1000, 1005), np.arange(2000, 2003)
    written = write_ecgs(rendered, [one, two])
    (first,), (second,) = rendered.signal_positions
    expected = [*rendered.ids[:first], *one, *rendered.ids[first + 1 : second], *two, *rendered.ids[second + 1 :]]
    assert written.ids.tolist() == expected and written.ids.dtype == np.int32
    assert written.ids[written.supervised].tolist() == rendered.ids[rendered.supervised].tolist()
    assert not written.signal_positions.size and written.system_end == rendered.system_end
    leading = render([{"from": "human", "value": "Why?"}, TURNS[1]], ecg_tokenizer(), "qwen2", "Be brief.", n_ecgs=1)
    assert write_ecgs(leading, [one]).signal_end == leading.signal_end + 4


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(0, 100))
def test_the_longest_ecgs_are_cut_first_and_no_room_is_wasted(lengths: list[int], room: int) -> None:
    kept = [len(e) for e in cut_ecgs([np.arange(n) for n in lengths], room)]
    assert sum(kept) <= max(room, 0) and all(k <= n for k, n in zip(kept, lengths, strict=True))
    if sum(kept) < sum(lengths):
        cut = [k for k, n in zip(kept, lengths, strict=True) if k < n]
        assert len(set(cut)) == 1 and max(kept) == cut[0] and room - sum(kept) < len(lengths)


def test_a_prompt_keeps_the_least_of_each_ecg() -> None:
    rendered = render(TURNS, ecg_tokenizer(), "qwen2", "Be brief.", n_ecgs=2)
    ecgs = [np.arange(50), np.arange(3)]
    text = len(rendered.ids) - 2
    assert len(write_prompt(rendered, ecgs, least=10, limit=text + 53).ids) == text + 53
    assert len(write_prompt(rendered, ecgs, least=10, limit=text + 20).ids) == text + 20
    assert len(write_prompt(rendered, ecgs, least=10, limit=text).ids) == text + 13
    assert reserved(ecgs, 10) == 9 + 2


def test_the_references_truncation(golden: Callable[[str], Path]) -> None:
    cases = json.loads((golden("ecg_byte_prompt_truncation") / "cases.json").read_text())
    wrong = 0
    for case in cases:
        sizes = [case[name] for name in ("before", "ecg", "after")]
        if case["mode"] != "train":  # nothing is cut: there is no limit
            wrong += case["total"] != sum(sizes)
        elif "error" in case:
            with pytest.raises(UserError, match="data.min_ecg_tokens"):
                kept_as_reference(*sizes, case["limit"], case["min_ecg"])
        else:
            kept = kept_as_reference(*sizes, case["limit"], case["min_ecg"])
            wrong += kept != (case["n_ecg"], case["n_after"])
    record("ecg_byte_prompt_truncation", f"differing cases of {len(cases)}", wrong, 0)
