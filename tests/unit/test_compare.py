"""Runs that answered the same questions, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elm_jax import cli
from elm_jax.compare import main
from elm_jax.errors import UserError
from elm_jax.evaluation.comparison import compare, text_of
from elm_jax.evaluation.statistics import FLIPS
from elm_jax.evaluation.store import lines_in


def run(folder: Path, right: float, n: int = 120, name: str = "demo-test", **more: str) -> Path:
    """A run folder whose evaluation got this share of the questions right."""
    out = folder / "eval" / name
    out.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    lines = [{"id": f"q{i}", "name": "x", "patient": str(i), "prompt": "", "truth": "it is so",
              "answer": "it is so" if i < right * n else "it is not", **more} for i in range(n)]  # fmt: skip
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    owed = {"value": 0.1, "ci95": [0.0, 0.2], "p": 0.03, "control": "shuffled"}
    (out / "metrics.json").write_text(json.dumps({"signal_dependence": owed, "end_token": "</s>"}))
    return folder


def test_a_difference_is_told_with_its_interval_and_whether_it_is_chance(tmp_path):
    folders = [run(tmp_path / name, right) for name, right in (("a", 0.9), ("b", 0.5), ("c", 0.5))]
    found = compare(folders)
    assert found["n"] == 120 and list(found["runs"]) == ["a", "b", "c"]
    assert found["runs"]["a"]["signal_dependence"]["value"] == 0.1
    of = {(pair["a"], pair["b"]): pair["metrics"] for pair in found["differences"]}
    assert of["a", "b"]["exact_match"]["value"] == pytest.approx(0.4)
    assert of["a", "b"]["exact_match"]["p"] == pytest.approx(1 / (FLIPS + 1))
    assert of["a", "b"]["bleu4"]["p"] < 0.01 < 0.3 < of["a", "b"]["exact_match"]["ci95"][0]
    assert of["b", "c"]["exact_match"] == {"value": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "p_holm": 1.0}
    corrected = [d["p_holm"] for metrics in of.values() for d in metrics.values()]
    assert all(d["p_holm"] >= d["p"] for metrics in of.values() for d in metrics.values()) and max(corrected) <= 1
    assert "a less b" in text_of(found) and "*" in text_of(found)


def test_the_control_files_are_read_and_left_as_they_are(tmp_path):
    folders = [run(tmp_path / name, right) for name, right in (("a", 0.9), ("b", 0.5))]
    for folder in folders:
        out = folder / "eval" / "demo-test"
        (out / "controls").mkdir()
        lines = (out / "predictions.jsonl").read_text().replace("it is so\"}", "it is not\"}")
        lines = lines.replace('"answer": "it is so"', '"answer": "it is not"')
        (out / "controls" / "shuffled.jsonl").write_text(lines + '{"id": "q0", "ans')
    before = [path.read_bytes() for path in sorted(tmp_path.rglob("*.jsonl"))]
    found = compare(folders)
    owed = found["differences"][0]["signal_dependence"]
    assert owed["value"] == pytest.approx(0.4) and owed["p_holm"] >= owed["p"]
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("*.jsonl"))] == before, "another process may write them"
    assert "signal dependence" in text_of(found)


def test_answers_may_hold_any_character(tmp_path):
    a, b = (run(tmp_path / name, 0.5) for name in "ab")
    path = a / "eval" / "demo-test" / "predictions.jsonl"
    lines = lines_in(path)
    lines[0]["answer"] = "one\u2028two\u0085three\x0bfour"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert lines_in(path) == lines and compare([a, b])["n"] == 120
    path.write_text("no answer\n")
    with pytest.raises(UserError, match="predictions.jsonl:1"):
        compare([a, b])


def test_only_questions_that_all_answered_count(tmp_path):
    assert compare([run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.5, n=60)])["n"] == 60


def test_what_cannot_be_compared_is_an_error(tmp_path):
    a, b = run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.5, truth="other")
    with pytest.raises(UserError, match="other true answers"):
        compare([a, b])
    with pytest.raises(UserError, match="at least two"):
        compare([a])
    with pytest.raises(UserError, match="one evaluation that all runs have"):
        compare([a, run(tmp_path / "c", 0.5, name="else-test")])


def test_the_command_prints_the_tables_and_writes_a_page(tmp_path, capsys):
    folders = [str(run(tmp_path / name, right)) for name, right in (("a", 0.9), ("b", 0.5))]
    assert cli.guard(main, [*folders, "--out", str(tmp_path / "out")]) == 0
    assert "a less b" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["n"] == 120
    assert (tmp_path / "out" / "compare.html").read_text().startswith("<!DOCTYPE html>")
    assert cli.guard(main, [*folders, "--eval", "demo-tst"]) == 2
    assert "did you mean 'demo-test'?" in capsys.readouterr().err
