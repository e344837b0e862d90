"""Runs that answered the same questions, side by side."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from texts import write_wordnet

from elm_jax import cli
from elm_jax.compare import main
from elm_jax.errors import UserError
from elm_jax.evaluation.comparison import compare, html_of, text_of
from elm_jax.folders import json_lines
from elm_jax.scoring.metrics import Scorer
from elm_jax.scoring.overlap import bleu
from elm_jax.scoring.statistics import FLIPS


def run(folder: Path, right: float, n: int = 120, name: str = "demo-test", **more: str) -> Path:
    """A run folder whose evaluation got this share of the questions right."""
    out = folder / "eval" / name
    out.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    lines = [{"id": f"q{i}", "name": "x", "patient": str(i), "prompt": "", "truth": "it is so",
              "answer": "it is so" if i < right * n else "it is not", **more} for i in range(n)]  # fmt: skip
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "metrics.json").write_text(json.dumps({"end_token": "</s>"}))
    return folder


def test_a_difference_is_told_with_its_interval_and_whether_it_is_chance(tmp_path):
    folders = [run(tmp_path / name, right) for name, right in (("a", 0.9), ("b", 0.5), ("c", 0.5))]
    found = compare(folders)
    assert found["n"] == 120 and list(found["runs"]) == ["a", "b", "c"]
    assert found["control"] is None and found["runs"]["a"]["signal_dependence"] is None, "no control was run"
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


def answer_controls(folder: Path, control: str, answer: str) -> Path:
    """Let the run have this answer to every question under a control."""
    out = folder / "eval" / "demo-test"
    (out / "controls").mkdir(exist_ok=True)
    lines = [line | {"answer": answer} for line in json_lines(out / "predictions.jsonl", "")]
    (out / "controls" / f"{control}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_signal_dependence_is_of_the_questions_that_all_answered(tmp_path):
    # Of the first 60 questions a has 54 right, of the others none.
    a, b = (answer_controls(run(tmp_path / name, 0.45, n), "shuffled", "") for name, n in (("a", 120), ("b", 60)))
    found = compare([a, b])
    owed = found["runs"]["a"]["signal_dependence"]
    assert found["n"] == owed["n"] == 60 and found["control"] == "shuffled"
    assert owed["value"] == pytest.approx(54 / 60) and owed["p"] < 0.001
    assert owed["ci95"][0] < 54 / 60 < owed["ci95"][1]


@pytest.mark.parametrize("protocol", ["elm-2026-04", "ecg-bench-2025"])
def test_empty_answers_under_a_control_do_not_end_the_comparison(tmp_path, protocol):
    folders = [answer_controls(run(tmp_path / name, right), "shuffled", "") for name, right in (("a", 0.9), ("b", 0.5))]
    owed = compare(folders, protocol=protocol)["differences"][0]["signal_dependence"]
    assert owed["value"] == pytest.approx(0.4) and owed["p_holm"] < 0.05


def test_the_control_is_one_that_all_runs_have(tmp_path):
    folders = [answer_controls(run(tmp_path / name, 0.5), "zeros", "") for name in "ab"]
    found = compare([answer_controls(folders[0], "shuffled", ""), folders[1]])
    assert found["control"] == "zeros" and "less zeros" in text_of(found)


def test_meteor_is_scored_with_the_wordnet_that_runs_or_flags_name(tmp_path, monkeypatch):
    folders = [run(tmp_path / name, 0.5) for name in "ab"]
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nowhere")])
    assert "meteor" in compare(folders)["unavailable"]
    write_wordnet(tmp_path / "nltk" / "corpora" / "wordnet")
    found = compare(folders, wordnet=str(tmp_path / "nltk"))
    assert "meteor" in found["differences"][0]["metrics"] and "meteor" not in found["unavailable"]
    (folders[1] / "config.json").write_text(json.dumps({"eval": {"wordnet": str(tmp_path / "nltk")}}))
    assert "meteor" in compare(folders)["runs"]["a"]["metrics"]
    (folders[1] / "config.json").write_text(json.dumps({"eval": {"wordnet": str(tmp_path / "gone")}}))
    assert "gone" in compare(folders)["unavailable"]["meteor"], "the runs' machine had it"
    with pytest.raises(UserError, match="gone"):
        compare(folders, wordnet=str(tmp_path / "gone"))


def test_answers_may_hold_any_character(tmp_path):
    a, b = (run(tmp_path / name, 0.5) for name in "ab")
    path = a / "eval" / "demo-test" / "predictions.jsonl"
    lines = json_lines(path, "")
    lines[0]["answer"] = "one\u2028two\u0085three\x0bfour"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert json_lines(path, "") == lines and compare([a, b])["n"] == 120
    path.write_text("no answer\n")
    with pytest.raises(UserError, match="predictions.jsonl, line 1"):
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


def test_greedy_answers_are_not_compared_with_those_of_several_seeds(tmp_path):
    folders = [run(tmp_path / "greedy", 0.9), run(tmp_path / "drawn", 0.5, seed="1")]
    with pytest.raises(UserError, match=r"beside drawn ones of several seeds.*eval\.temperature=0"):
        compare(folders)


def of_patients(folder: Path, patients: int, answer: str, each: int = 5) -> Path:
    """A run that has this answer to all questions about so many patients."""
    run(folder, 1.0, 0)
    lines = [{"id": f"q{i}", "name": "x", "patient": str(i % patients), "prompt": "", "truth": "it is so",
              "answer": answer} for i in range(each * patients)]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "eval" / "demo-test" / "predictions.jsonl").write_text(text)
    return folder


def test_with_five_patients_no_metric_has_a_star_and_that_is_said(tmp_path):
    found = compare([of_patients(tmp_path / name, 5, said) for name, said in (("a", "it is so"), ("b", "no"))])
    metrics = found["differences"][0]["metrics"]
    assert {"exact_match", "bleu4", "rouge_l"} <= set(metrics) and found["patients"] == 5
    assert {name: d["p"] for name, d in metrics.items()} == dict.fromkeys(metrics, 2 / 2**5)
    text = text_of(found)
    assert "*" not in text and "25 questions about 5 patients" in text and "no difference can be significant" in text
    assert "no difference can be significant" in html_of(found) and "5 patients" in html_of(found)


def test_with_many_patients_every_metric_can_have_a_star(tmp_path):
    found = compare([of_patients(tmp_path / name, 20, said, 1) for name, said in (("a", "it is so"), ("b", "no"))])
    metrics = found["differences"][0]["metrics"]
    assert {name: d["p"] for name, d in metrics.items()} == dict.fromkeys(metrics, 1 / (FLIPS + 1))
    assert text_of(found).count("*") == len(metrics) and "can be significant" not in text_of(found)


def test_the_p_of_a_corpus_score_swaps_the_answers_of_patients():
    rng = np.random.default_rng(0)
    words = ["it", "is", "so", "a", "fast", "rhythm"]
    truths = [" ".join(rng.choice(words, 6)) for _ in range(12)]
    said = [[" ".join(rng.choice(words, 6)) if rng.random() < part else t for t in truths] for part in (0.4, 0.8)]
    patients = [str(i // 2) for i in range(12)]

    def score(answers):
        lines = [{"id": str(i), "patient": patients[i], "answer": a, "truth": truths[i]} for i, a in enumerate(answers)]
        return Scorer().table(lines)

    def difference(swapped):
        first = [said[swapped[i // 2]][i] for i in range(12)]
        second = [said[1 - swapped[i // 2]][i] for i in range(12)]
        return score(first).values()["bleu4"] - score(second).values()["bleu4"]

    every = [abs(difference(swapped)) for swapped in itertools.product((0, 1), repeat=6)]
    mine, theirs = (score(answers).rows["bleu4"] for answers in said)
    found = score(said[0]).patients.swap_p(mine, theirs, bleu)
    assert found == np.mean(np.array(every) >= every[0] - 1e-9) and 2 / 2**6 < found < 1
