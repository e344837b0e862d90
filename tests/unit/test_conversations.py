"""Conversations in our own words, with the ids and what is learnt of them on record: `python test_conversations.py`
writes these anew.

They stand for the shared goldens where these are absent: what is on record here was written by the code that renders
those exactly (`parity/test_text_golden.py`).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_jax.errors import UserError
from elm_jax.text.render import add_tokens, render
from elm_jax.text.vocabulary import load_tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
FAMILIES = {"llama": "llama3", "qwen": "qwen2", "gemma": "gemma2"}
CASES = json.loads((DATA / "conversations" / "cases.json").read_text(encoding="utf-8"))


@cache
def tokenizer(name: str, phase: str) -> Any:
    tok = load_tokenizer(DATA / "golden" / f"text_tokenizer_{name}")
    add_tokens(tok, phase)
    return tok


def on_record(name: str) -> Path:
    return DATA / "conversations" / f"{name}.json"


def outcome(case: dict[str, Any], name: str) -> dict[str, Any]:
    """What rendering gives: text, ids, the runs of learnt ids [start, end), the places of the ECGs; or its refusal."""
    options = {"signal_tokens": 1, "phase": "sft", **case.get("settings", {})}
    try:
        found = render(case["text"], tokenizer(name, options["phase"]), FAMILIES[name], **options)
    except UserError as error:
        return {"error": str(error)}
    edges = np.flatnonzero(np.diff(np.concatenate([[False], found.supervised, [False]]).astype(int)))
    return {
        "prompt": found.prompt,
        "ids": found.ids.tolist(),
        "learnt": edges.reshape(-1, 2).tolist(),
        "signals": found.signal_positions.tolist(),
        "prefixes": [found.system_end, found.signal_end],
    }


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_has_the_ids_that_are_on_record(name: str, case: dict[str, Any]) -> None:
    assert outcome(case, name) == json.loads(on_record(name).read_text(encoding="utf-8"))[case["name"]]


if __name__ == "__main__":
    for family in FAMILIES:
        lines = [f"{json.dumps(c['name'])}: {json.dumps(outcome(c, family), ensure_ascii=False)}" for c in CASES]
        on_record(family).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
