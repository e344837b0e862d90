"""ECG-QA's sets of answers and ECGBench's tasks."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest

from elm_jax.config import Config
from elm_jax.evaluation.results import asked_with, results_of, summary
from elm_jax.scoring.ecg_qa import QuestionOnly, answer_list, macro_f1, set_matches
from elm_jax.scoring.ecgbench import (
    LABELS,
    chosen_letter,
    ecgbench,
    listed_options,
    named_letter,
    said_labels,
    same_options,
    true_labels,
)
from elm_jax.scoring.metrics import Scorer

FACTS = {"split": "test", "step": 1, "bad": 0, "asked_with": asked_with(Config())}


def test_a_set_of_answers_is_right_in_any_order_and_only_whole():
    truth = ["qt interval", "p duration"]
    said = ["p duration qt interval", "QT interval, P duration.", "qt interval", "qt interval p duration noise", ""]
    assert set_matches(said, [truth] * 5).tolist() == [1, 1, 0, 0, 0]


def test_an_answer_with_a_comma_of_its_own_is_one_answer():
    known = "conduction disturbance, complete"
    assert set_matches([known, "none"], [[known], ["none"]]).tolist() == [1, 1]


def test_answers_with_commas_of_their_own_stand_beside_others(shared):
    with (shared / "real/text/ecgqa/ptbxl/answers.csv").open() as file:
        classes = [row["class"] for row in csv.DictReader(file)]
    (known,) = [name for name in classes if "," in name]
    pairs = [pair for pair in itertools.permutations(classes, 2) if known in pair]
    for separator in (" ", ", ", ",", "; ", "\n"):
        assert set_matches([separator.join(pair) for pair in pairs], pairs).all(), repr(separator)
    assert set_matches([" ".join(pair).replace(",", "") for pair in pairs], pairs).all()
    others = [pairs[-1], *pairs[:-1]]
    for wrong in ([" ".join(pair) for pair in others], [pair[0] for pair in pairs], [f"{a} {b} x" for a, b in pairs]):
        assert not set_matches(wrong, pairs).any()


def test_a_comma_between_two_answers_keeps_them_apart():
    assert set_matches(["a, b", "a b", "b,a"], [["a", "b"], ["a b"], ["a", "b"]]).tolist() == [1, 1, 1]


def test_answers_of_a_record_are_those_of_its_third_part():
    assert answer_list(["single-query", "Which?", ["a", "b"]]) == ["a", "b"]
    assert answer_list(["x", "Which?", "a"]) == ["a"] and answer_list("a report") == [] and answer_list(["a"] * 2) == []


def test_ecg_qa_is_scored_by_type_template_and_attribute_beside_blind_answers():
    kinds = {"single-verify": ("yes", "no"), "single-choose": ("a", "both"), "single-query": ("x y", "none")}
    lines = []
    for kind, (right, other) in kinds.items():
        for i in range(10):
            truth = right if i < 6 else other
            said = truth if i % 2 else "nonsense"
            fields = {"name": kind, "question_type": kind, "template_id": str(i % 2), "attribute": "noise"}
            lines.append({"id": f"{kind}{i}", "answer": said, "truth": truth, "answers": [truth], **fields,
                          "question": "Q?"})  # fmt: skip
    known = {"asked": [(kind, "q", right) for kind, (right, _) in kinds.items()]}
    result = results_of({"real": lines}, Scorer(), FACTS, known)
    assert result["by"]["question_type"]["single-query"]["answer_set_match"]["value"] == 0.5
    assert result["by"]["template_id"]["1"]["answer_set_match"] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 15}
    assert set(result["by"]["attribute"]) == {"noise"}
    assert result["ecg_qa"]["average_of_single_types"] == pytest.approx(0.5)
    assert result["baselines"]["majority"]["answer_set_match"] == pytest.approx(0.6)
    assert result["baselines"]["question_only"]["answer_set_match"] == pytest.approx(0.6)
    assert result["ecg_qa"]["baselines"] == {"majority": pytest.approx(0.6), "question_only": pytest.approx(0.6)}
    assert set(result["baselines_by"]) == set(result["by"])
    assert result["baselines_by"]["name"]["single-query"]["majority"]["exact_match"] == pytest.approx(0.6)
    assert result["by"]["template_id"]["1"]["macro_f1"] == {"value": 1.0, "n": 15}
    assert result["ecg_qa"]["template_macro_f1"] == {"unweighted": pytest.approx(0.5), "weighted": pytest.approx(0.5)}


def test_a_table_that_names_its_records_otherwise_is_scored_by_the_type_in_its_text():
    lines = [{"id": kind, "name": "ecg-qa-ptbxl", "question_type": kind, "answer": "a, b", "truth": "b a",
              "answers": ["b", "a"]} for kind in ("single-verify", "single-choose", "single-query")]  # fmt: skip
    result = results_of({"real": lines}, Scorer(), FACTS, {})
    assert result["metrics"]["answer_set_match"]["value"] == 1.0
    assert result["ecg_qa"]["average_of_single_types"] == 1.0


def test_what_training_knew_is_seen_as_the_protocol_sees_answers():
    line = {"name": "x", "question": "Q?", "answer": "no", "truth": "<think>so</think>yes"}
    lines = [{**line, "id": name} for name in "ab"]
    known = {"asked": [("x", "q", "<think>other</think> yes")]}
    for protocol in ("ours", "elm-2026-08"):
        result = results_of({"real": lines}, Scorer(protocol), FACTS, known)
        assert result["baselines"]["question_only"]["exact_match"] == 1.0
    lines = [{**line, "truth": "yes", "ended": True} for line in lines]
    known = {"asked": [("x", "q", "yes")]}
    result = results_of({"real": lines}, Scorer("ecg-bench-2025", end_token="</s>"), FACTS, known)
    assert result["baselines"]["question_only"]["exact_match"] == 1.0


def test_ids_may_have_slashes_and_names_may_lack():
    lines = [{"id": f"a/b.jsonl:{i}#0", "fold": 1, "question": "Q?", "answer": "yes", "truth": "no"} for i in range(3)]
    named = [{**line, "id": f"c{i}", "name": "x"} for i, line in enumerate(lines)]
    result = results_of({"real": lines + named}, Scorer(), FACTS, {"asked": [("x", "q", "no")]})
    assert result["baselines"]["question_only"]["exact_match"] == 1.0
    assert set(result["top_wrong"]) == {"", "x"}


def test_where_nothing_is_scored_the_summary_says_so():
    lines = [{"id": "a", "name": "x", "fold": fold, "answer": "", "truth": "no"} for fold in (1, 2)]
    result = results_of({"real": lines, "zeros": lines}, Scorer("elm-2026-04"), FACTS, {})
    assert result["n"] == 0 and result["metrics"] == {} and "nothing was scored" in summary(result)
    said = [{**lines[0], "id": str(i), "answer": "no"} for i in range(3)]
    result = results_of({"real": [*said, lines[1]]}, Scorer("elm-2026-04"), FACTS, {})
    assert [run["n"] for run in result["runs"]] == [3, 0]
    assert result["metrics"]["exact_match"]["value"] == 1.0 and "exact_match" in summary(result)


def test_the_blind_baseline_learns_from_the_words_of_a_question():
    blind = QuestionOnly([("v", "Is it A?", "yes"), ("v", "Is it B?", "no"), ("v", "is it b", "no")])
    assert blind.answer("v", "IS IT A") == "yes" and blind.answer("v", "new") == "no" and blind.answer("w", "?") == "no"
    assert not QuestionOnly([])


def test_macro_f1_over_the_answers_of_a_template():
    assert macro_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("C. Sinus rhythm", "C"),
        ("The answer is B.", "B"),
        ("I think it is C. Atrial fibrillation", "C"),
        ("Rather D. than B.", "B"),  # the first of the alphabet
        ("A normal ECG. Answer: B", "G"),
        ("The correct option is D", "D"),
        ("The correct option is A, no: The correct option is B", "B"),
        ("The correct option is (B), Answer: B", None),
        ("Reasons. Answer: A", "A"),
        ("Answer: option D", "D"),
        ("Answer: A, no: Answer: flutter, C", "C"),
        ("Answer: none", None),
        ("answer: B", None),
        ("Because", None),
        ("(B)", None),
        ("Option I.", None),
    ],
)
def test_letters_are_found_by_the_rules_of_pulse(text, letter):
    assert named_letter(text) == letter
    assert chosen_letter(text, "ABCD") == (letter or chosen_letter("", "ABCD"))


def test_an_answer_without_a_letter_draws_one_always_the_same():
    drawn = [chosen_letter("it is unclear", "ABCDEFGH", f"q{i}") for i in range(64)]
    assert drawn == [chosen_letter("it is unclear", "ABCDEFGH", f"q{i}") for i in range(64)] and len(set(drawn)) == 8
    assert chosen_letter("Because", "ABCD", "k") in "ABCD", "a word is no letter"


def test_labels_are_substrings_and_abnormal_holds_norm():
    assert said_labels("ptb-test", "ABNORMAL. Answer: STTC") == [True, False, True, False, False]
    assert said_labels("ptb-test", "norm") == [False] * 5
    assert true_labels("ptb-test", "ABNORMAL, MI") == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("text", "said", "true"),
    [
        ("NORM", {"NORM"}, {"NORM"}),
        ("ABNORMAL", {"ABNORMAL"}, {"ABNORMAL"}),
        ("NORM, SB", {"NORM", "SB"}, {"SB"}),
        ("ABNORMAL, RBBB", {"ABNORMAL", "RBBB"}, {"RBBB"}),
        ("ABNORMAL or NORM", {"ABNORMAL"}, set()),
        ("AF? Answer: LBBB? Answer: RBBB", {"RBBB"}, {"AF", "LBBB", "RBBB"}),
        ("ABNORMAL. Answer: NORM", {"NORM"}, set()),
    ],
)
def test_norm_and_abnormal_exclude_each_other_in_code15(text, said, true):
    names = LABELS["code15-test"]
    assert {name for name, holds in zip(names, said_labels("code15-test", text), strict=True) if holds} == said
    assert {name for name, holds in zip(names, true_labels("code15-test", text), strict=True) if holds} == true


def test_an_answer_names_the_true_options_and_no_other():
    options = ["yes", "no", "not sure", "QT interval"]
    assert same_options("It is YES.", "yes", options) and not same_options("yes or no", "yes", options)
    assert same_options("qt interval and yes", "yesQT interval", options), "true options are joined without separators"
    assert not same_options("on", "no", ["no", "on"]) and not same_options("lead II", "lead I", ["lead I", "lead II"])
    assert same_options("not sure", "not sure", options), "an option within the right one makes nothing wrong"
    assert not same_options("", "", options) and not same_options("maybe", "maybe", options)


def test_options_are_those_behind_the_last_mark_without_the_order():
    order = "Only answer based on the given Options without any explanation."
    for rest in ("", ".", f". {order}", f" {order}", f"\n\n{order}", f"\n{order}\nASSISTANT: "):
        assert listed_options(f"Options: a, b. Which? Options: yes, no, not sure{rest}") == ["yes", "no", "not sure"]
    assert listed_options("Options: yes,\nno") == ["yes", "no"] and listed_options("yes, no") == []
    line = {"id": "a", "name": "ecgqa-test", "question": f"Is it? Options: yes, no {order}", "truth": "no"}
    found = ecgbench([{**line, "answer": "No."}, {**line, "answer": "yes"}])["ecgbench"]["ecgqa-test"]
    assert found["accuracy"]["value"] == 0.5


def test_label_tasks_have_macro_f1_auc_and_hamming_loss():
    truths, answers = ["NORM", "MI", "MI, CD", "HYP"], ["NORM", "MI", "MI", "NORM"]
    lines = [{"id": str(i), "name": "ptb-test", "truth": t, "answer": a}
             for i, (t, a) in enumerate(zip(truths, answers, strict=True))]  # fmt: skip
    found = ecgbench(lines)["ecgbench"]["ptb-test"]
    assert found["macro_f1"]["value"] == pytest.approx(np.mean([2 / 3, 1, 0, 0]))
    assert found["hamming_loss"]["value"] == pytest.approx(3 / 16)
    assert found["macro_auc"]["value"] == pytest.approx(np.mean([(1 + 2 / 3) / 2, 1, 0.5, 0.5]))
    assert ecgbench([{"name": "other"}]) == {}
    letters = [{"id": "a", "name": "mmmu-ecg", "truth": "B", "answer": "B. x"}]
    assert ecgbench(letters)["ecgbench"]["mmmu-ecg"]["accuracy"]["value"] == 1.0


def test_averages_are_over_the_labels_that_occur_in_the_truths():
    truths, answers = ["NORM", "MI", "MI"], ["NORM, HYP", "MI, HYP", "NORM"]
    lines = [{"id": str(i), "name": "ptb-test", "truth": t, "answer": a}
             for i, (t, a) in enumerate(zip(truths, answers, strict=True))]  # fmt: skip
    found = ecgbench(lines)["ecgbench"]["ptb-test"]
    assert found["macro_f1"]["value"] == pytest.approx(2 / 3) and found["macro_auc"]["value"] == pytest.approx(3 / 4)
    assert found["hamming_loss"]["value"] == pytest.approx(2 / 6), "HYP is in no truth and counts nowhere"
    nothing = ecgbench([{**lines[0], "truth": "none of these"}])["ecgbench"]["ptb-test"]
    assert [score["value"] for score in nothing.values()] == [None] * 3


def test_the_truth_of_a_choice_is_its_first_character():
    lines = [{"id": "q", "name": "csn-test-no-cot", "truth": "B. Not A. Normal ECG.", "answer": "B"}]
    assert ecgbench(lines)["ecgbench"]["csn-test-no-cot"]["accuracy"]["value"] == 1.0


def test_a_truth_without_a_letter_is_never_right():
    lines = [{"id": f"q{i}", "name": "mmmu-ecg", "truth": "none of these", "answer": "who knows"} for i in range(20)]
    assert ecgbench(lines)["ecgbench"]["mmmu-ecg"]["accuracy"]["value"] == 0.0


def test_an_area_that_is_undefined_is_null():
    lines = [{"id": str(i), "name": "ptb-test", "truth": "NORM", "answer": "NORM"} for i in range(4)]
    found = ecgbench(lines)["ecgbench"]["ptb-test"]
    assert found["macro_auc"] == {"value": None, "ci95": None, "n": 4} and found["hamming_loss"]["value"] == 0.0
    json.dumps(found, allow_nan=False)
