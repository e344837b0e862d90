"""What each published protocol does otherwise, and that a number says how it was made."""

from __future__ import annotations

import pytest

from elm_jax.config import resolve
from elm_jax.errors import UserError
from elm_jax.evaluation.results import results_of
from elm_jax.scoring.metrics import Scorer
from elm_jax.scoring.overlap import rouge_l_of_sets, rouge_n_of_sets
from elm_jax.scoring.protocols import PROTOCOLS
from elm_jax.scoring.summary import scores_of

END = "<|eot_id|>"
FACTS = {"split": "test", "step": 1, "bad": 0}


def line(id, answer, truth, **more):
    return {"id": str(id), "name": "x", "answer": answer, "truth": truth, **more}


def score(protocol, lines, metric="exact_match"):
    return Scorer(protocol, end_token=END).table(lines).values().get(metric)


def test_a_config_names_a_protocol_and_a_result_says_which():
    assert set(PROTOCOLS) == {"ours", "elm-2026-08", "elm-2026-04", "ecg-bench-2025"}
    assert resolve({"eval": {"protocol": "elm-2026-04"}}).eval.protocol == "elm-2026-04"
    with pytest.raises(UserError, match="eval.protocol"):
        resolve({"eval": {"protocol": "elm-2025"}})
    for name in PROTOCOLS:
        assert scores_of(Scorer(name).table([line(0, "a", "a")]))["protocol"] == name


@pytest.mark.parametrize(
    ("protocol", "expected"), [("ours", 1 / 3), ("elm-2026-08", 1 / 3), ("elm-2026-04", 0.5), ("ecg-bench-2025", 0.5)]
)
def test_who_leaves_out_empty_answers_scores_higher(protocol, expected):
    lines = [line(0, "yes", "yes"), line(1, "no", "yes"), line(2, "", "yes"), line(3, "said", "")]
    assert score(protocol, lines) == pytest.approx(expected)


def test_april_removed_the_tags_and_so_compared_thoughts_as_well():
    thought = [line(0, "<think>fast</think><answer>yes</answer>", "<think>slow</think><answer>yes</answer>")]
    assert score("ours", thought) == score("elm-2026-08", thought) == 1.0
    assert score("elm-2026-04", thought) == 0.0
    assert score("elm-2026-04", [line(0, "<answer>yes</answer>", "yes")]) == 1.0


def test_in_2025_an_answer_that_did_not_end_by_itself_was_never_equal():
    right = [line(0, "yes", "yes", ended=True), line(1, "yes", "yes", ended=False)]
    assert score("ecg-bench-2025", right) == 0.5
    assert score("ours", right) == score("elm-2026-08", right) == 1.0


def test_in_2025_rouge_counted_different_words_once():
    assert rouge_n_of_sets("a a a b", "a b b", 1) == pytest.approx(1.0)
    assert rouge_n_of_sets("a b c", "a b d", 2) == pytest.approx(0.5)
    assert rouge_l_of_sets("the cat sat.", "the cat ran.") == pytest.approx(2 / 3)
    assert set(Scorer("ecg-bench-2025").metrics) >= {"rouge_package_1", "rouge_package_2", "rouge_package_l"}
    assert "rouge_l" not in Scorer("ecg-bench-2025").metrics and "token_f1" not in Scorer("ecg-bench-2025").metrics


@pytest.mark.parametrize("protocol", ["elm-2026-04", "ecg-bench-2025"])
def test_bertscore_that_cannot_be_computed_is_said(protocol):
    result = scores_of(Scorer(protocol).table([line(0, "a", "a")]))
    if "bert_f1" not in result["metrics"]:  # this machine has no RoBERTa
        assert "roberta-large" in result["unavailable"]["bert_f1"] or "PyTorch" in result["unavailable"]["bert_f1"]
    assert "bert_f1" not in Scorer("ours").unavailable, "not asked for"
    with pytest.raises(UserError, match="eval.bert_model"):
        Scorer(protocol, bert_model="/nowhere/roberta-large")


def test_a_named_wordnet_that_is_not_there_is_an_error_and_else_its_want_is_said(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="eval.wordnet"):
        Scorer("ours", wordnet=str(tmp_path))
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nowhere")])
    scorer = Scorer("ours")
    assert "meteor" not in scorer.metrics and "nltk.downloader" in scorer.unavailable["meteor"]


def test_published_intervals_are_students_over_runs_and_ours_are_over_patients():
    first = [line(i, "yes", "yes", seed=1337) for i in range(20)]
    lines = [*first, *(line(i, "yes" if i % 2 else "no", "yes", seed=1338) for i in range(20))]
    theirs = results_of({"real": lines}, Scorer("elm-2026-08"), FACTS, {})
    assert theirs["metrics"]["exact_match"]["value"] == 0.75
    half = 12.706204736432095 * (0.25 * 2**0.5) / 2**0.5  # t of one degree of freedom
    assert theirs["metrics"]["exact_match"]["ci95"] == pytest.approx([0.75 - half, 0.75 + half])
    ours = results_of({"real": lines}, Scorer("ours"), FACTS, {})
    assert ours["over_runs"]["exact_match"]["ci95"] == theirs["metrics"]["exact_match"]["ci95"]
    low, high = ours["metrics"]["exact_match"]["ci95"]
    assert 0.5 < low < 0.75 < high < 1
    assert [run["seed"] for run in ours["runs"]] == [1337, 1338]


def test_thinking_is_scored_apart_where_the_truth_thinks():
    lines = [line(0, "<think>a b</think>yes", "<think>a c</think>yes"), line(1, "no", "no")]
    result = scores_of(Scorer("ours").table(lines))
    assert result["thinking"]["n"] == 1 and result["n"] == 2
    assert result["thinking"]["metrics"]["token_f1"]["value"] == 0.5
    assert "thinking" not in scores_of(Scorer("elm-2026-04").table(lines))
