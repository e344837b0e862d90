"""docs/serve.md: its program, run as written on a tiny run, answers as our own chat does."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import runs
from export.made_runs import export_command, make_run

from elm_jax.config import to_dict
from elm_jax.text.render import THINK_TOKENS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serve.md"
QUESTION = "What does the recording show?"


def program() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


@pytest.mark.slow
@pytest.mark.parametrize("elm", ["mlp_llava", "linear_llava"])
def test_the_program_of_the_page_answers_as_the_chat(elm: str, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("torch")
    from elm_jax.inference.model import TrainedModel
    from elm_jax.inference.session import Session

    runs.prepare(monkeypatch, tmp_path / "cache")
    tiny = runs.config(tmp_path / "run", elm=elm, encoder__tokens=3, eval__max_new_tokens=64)
    config = make_run(tmp_path / "run", to_dict(tiny) | {"connector": {"hidden": 48 if elm == "mlp_llava" else None}})
    monkeypatch.chdir(tmp_path)
    assert export_command("--checkpoint", "run", "--out", "exported") == 0
    ecg = np.random.default_rng(0).normal(size=(12, 600)).astype(np.float32)
    np.save("ecg.npy", {"ecg": ecg, "target_sf": 50}, allow_pickle=True)
    session = Session(TrainedModel(config))
    session.add_ecg("ecg.npy")
    ours = session.say(QUESTION)
    capsys.readouterr()
    assert QUESTION in program()
    exec(compile(program(), str(PAGE), "exec"), {"__name__": "page"})
    for tag in THINK_TOKENS:  # which the page leaves out, as special tokens
        ours = ours.replace(tag, "")
    assert capsys.readouterr().out.strip() == ours.strip() != ""
