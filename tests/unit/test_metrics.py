"""Scores, intervals and baselines of generated answers."""

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_jax.errors import UserError
from elm_jax.evaluation.results import perfect_note
from elm_jax.scoring import dependence as dependence_module
from elm_jax.scoring import metrics
from elm_jax.scoring.answers import exact_match, first_integer, same_words, split_response, token_f1, within_5_bpm
from elm_jax.scoring.dependence import signal_dependence
from elm_jax.scoring.metrics import Scorer
from elm_jax.scoring.overlap import rouge_l, rouge_l_in_any_script, stemmer
from elm_jax.scoring.statistics import FLIPS, Patients, p_text
from elm_jax.scoring.summary import best_constant, scores_of


def prediction(id, answer, truth, name="heart_rate", **more):
    return {"id": str(id), "name": name, "answer": answer, "truth": truth, **more}


def aggregate(predictions, scorer=None):
    return scores_of((scorer or Scorer()).table(predictions))


def dependence(real, controls):
    scorer = Scorer()
    return signal_dependence(scorer.table(real), {name: scorer.table(lines) for name, lines in controls.items()})


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("72", "77", 1),
        ("72", "78", 0),
        ("about 72 bpm", "70", 1),
        ("", "70", 0),
        ("fast", "70", 0),
        ("72.9", "67", 1),
    ],
)
def test_heart_rate_is_the_first_number_and_may_be_five_off(answer, truth, expected):
    assert within_5_bpm(answer, truth) == expected


def test_metrics_of_the_package_are_not_replaced() -> None:
    for name in ("exact_match", "meteor", "bert_f1", "answer_set_match"):
        with pytest.raises(UserError, match="a name of the package"):
            metrics.register_metric(name, lambda answer, truth: 1.0)


def test_first_integer_reads_ascii_digits_only():
    assert first_integer("a 072b") == 72
    assert first_integer("٧٢") is None


@given(st.text(), st.text())
def test_scores_are_symmetric_and_between_zero_and_one(a, b):
    for metric in (exact_match, token_f1, same_words):
        assert metric(a, b) == metric(b, a)
        assert 0 <= metric(a, b) <= 1
        assert metric(a, a) == 1


def test_empty_answers_count_as_wrong_and_empty_truths_are_left_out():
    result = aggregate([prediction(0, "", "70"), prediction(1, "70", "70"), prediction(2, "5", "")])
    assert result["n"] == 2
    assert result["metrics"]["exact_match"]["value"] == 0.5
    assert result["metrics"]["heart_rate.within_5_bpm"]["value"] == 0.5


def test_only_the_answer_part_is_scored():
    result = aggregate([prediction(0, "<think>60, no</think><answer> 72 </answer>", "72")])
    assert result["metrics"]["exact_match"]["value"] == 1
    assert split_response("<think>60, no</think><answer> 72 </answer>") == ("60, no", "72")


def test_named_metrics_score_their_own_questions():
    rates = [prediction(i, "70", "70") for i in range(3)]
    kinds = [prediction(f"k{i}", "Noise.", "noise", "signal_type") for i in range(2)]
    other = [prediction("o", "no", "yes", "verify")]
    result = aggregate(rates + kinds + other)
    assert result["metrics"]["heart_rate.within_5_bpm"]["value"] == 1
    assert result["metrics"]["signal_type.accuracy"]["value"] == 1
    assert result["metrics"]["exact_match"]["value"] == pytest.approx(3 / 6)
    levels = result["by"]["name"]
    assert set(levels["heart_rate"]) - set(levels["verify"]) == {"heart_rate.within_5_bpm"}
    assert set(levels["verify"]) - {"meteor"} == {"exact_match", "token_f1", "bleu4", "rouge_l"}
    assert levels["signal_type"]["exact_match"] == {"value": 0.0, "ci95": [0.0, 0.0], "n": 2}


def test_without_predictions_there_are_no_scores():
    result = aggregate([])
    assert result["n"] == 0
    assert result["metrics"] == {}
    assert result["baselines"] == {"constant": {}, "majority": {}}


def test_best_constant_rate_is_the_strongest_number_even_one_that_never_occurs():
    truths = ["60", "61", "69", "70", "120"]
    answer, score = best_constant(truths, within_5_bpm, numbers=True)
    assert answer == "65"
    assert score == 0.8
    every = [np.mean([within_5_bpm(str(rate), truth) for truth in truths]) for rate in range(40, 151)]
    assert score == max(every)


def test_baselines_of_exact_match():
    predictions = [prediction(i, "x", "60") for i in range(3)]
    predictions += [prediction(f"k{i}", "x", "noise", "signal_type") for i in range(4)]
    predictions += [prediction("last", "x", "ecg", "signal_type")]
    baselines = aggregate(predictions)["baselines"]
    assert baselines["constant"]["exact_match"] == 4 / 8
    assert baselines["majority"]["exact_match"] == 7 / 8
    assert baselines["constant"]["signal_type.accuracy"] == 4 / 5


def test_interval_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    answers = np.where(rng.random(2000) < 0.8, "70", "100")
    score = aggregate(prediction(i, answer, "70") for i, answer in enumerate(answers))["metrics"][
        "exact_match"
    ]
    half = 1.96 * np.sqrt(score["value"] * (1 - score["value"]) / 2000)
    assert score["ci95"] == pytest.approx([score["value"] - half, score["value"] + half], abs=0.003)


def test_questions_about_one_patient_are_not_independent():
    answers = ["70" if i % 2 else "100" for i in range(50)]
    alone = [prediction(f"{i}-{k}", answers[i], "70") for i in range(50) for k in range(8)]
    together = [p | {"patient": p["id"].split("-")[0]} for p in alone]
    widths = [np.ptp(aggregate(p)["metrics"]["exact_match"]["ci95"]) for p in (alone, together)]
    assert widths[1] == pytest.approx(widths[0] * 8**0.5, rel=0.15)


def test_intervals_are_reproducible():
    predictions = [prediction(i, str(60 + i), "70") for i in range(40)]
    assert aggregate(predictions) == aggregate(predictions)


def test_signal_dependence_finds_a_difference_and_finds_none():
    real = [prediction(i, "70", "70") for i in range(100)]
    blind = [prediction(i, "70" if i % 2 else "80", "70") for i in range(100)]
    found = dependence(real, {"zeros": blind})
    assert found is not None and found["control"] == "zeros" and found["mcnemar_p"] == 2 * 0.5**50
    assert found["value"] == 0.5
    assert found["ci95"][0] > 0.35
    assert found["p"] < 0.01
    none = dependence(real, {"shuffled": list(reversed(real)), "zeros": blind})
    assert none is not None and none["control"] == "shuffled", "it tells most, so it is taken where it is there"
    assert (none["value"], none["ci95"], none["p"], none["mcnemar_p"]) == (0.0, [0.0, 0.0], 1.0, 1.0)
    assert none["by_control"]["zeros"]["value"] == 0.5 and none["by_name"]["heart_rate"]["value"] == 0.0
    assert dependence(real, {}) is None


def test_signal_dependence_counts_several_answers_under_the_control_as_their_mean():
    real = [prediction(i, "70", "70") for i in range(40)]
    draws = [prediction(i, "70" if draw else "80", "70", draw=draw) for draw in range(2) for i in range(40)]
    found = dependence(real, {"shuffled": draws})
    assert found is not None and found["value"] == 0.5 and "mcnemar_p" not in found


def test_a_patient_with_many_questions_is_one_witness():
    real = [prediction(i, "70", "70", patient="one") for i in range(100)]
    found = dependence(real, {"zeros": [p | {"answer": ""} for p in real]})
    assert found is not None and found["value"] == 1.0 and found["p"] == 1.0


def test_signal_dependence_needs_the_same_questions():
    with pytest.raises(AssertionError, match="lacks predictions"):
        dependence([prediction(0, "70", "70")], {"zeros": [prediction(1, "70", "70")]})


def test_named_and_unnamed_questions_have_a_majority_each():
    named = [prediction(i, "x", "60") for i in range(3)]
    unnamed = [prediction(f"u{i}", "x", truth, name="") for i, truth in enumerate(("a", "a", "b"))]
    del unnamed[2]["name"]
    assert aggregate(named + unnamed)["baselines"]["majority"]["exact_match"] == 5 / 6


def test_a_truth_of_which_the_protocol_sees_nothing_is_no_truth():
    lines = [prediction(0, "60", "<think>hm</think>"), prediction(1, "60", "60")]
    lines.append(prediction(2, "<think></think>", "60"))
    assert aggregate(lines)["n"] == 2, "the second answer is empty, and wrong"
    assert aggregate(lines)["metrics"]["exact_match"]["value"] == 0.5
    april = aggregate(lines, Scorer("elm-2026-04"))
    assert (april["n"], april["empty_answers"]) == (2, 1), "there a thought is an answer; tags are none"


def test_an_answer_to_a_truth_is_scored_once_in_all_tables_of_a_scorer(monkeypatch):
    compared = []

    def score(answer, truth):
        compared.append((answer, truth))
        return 1.0

    monkeypatch.setitem(metrics._PLAIN, "rouge_l", metrics._mean_of(score))
    scorer = Scorer()
    for _ in range(2):
        scores_of(scorer.table([prediction(i, "a b", f"a {i % 3}", name="x") for i in range(9)]))
    assert len(compared) == len(set(compared)) == 3 + 3, "three answers, and the majority's answer to each truth"


def test_a_control_is_gone_through_once_for_all_kinds_of_question(monkeypatch):
    real = [prediction(i, "70", "70", name=f"kind {i % 20}") for i in range(40)]
    seen, by_question = [], dependence_module.by_question
    monkeypatch.setattr(dependence_module, "by_question", lambda t, m: seen.append(len(t.pairs)) or by_question(t, m))
    found = dependence(real, {"shuffled": [line | {"draw": draw} for draw in range(3) for line in real]})
    assert found is not None and len(found["by_name"]) == 20
    assert seen.count(120) <= 2 + len(found["by_metric"])


def test_mcnemar_is_for_questions_that_were_answered_once():
    real = [prediction(i, "70", "70", seed=seed) for seed in range(5) for i in range(20)]
    blind = [p | {"answer": "80"} for p in real]
    found = dependence(real, {"zeros": blind})
    assert found is not None and found["value"] == 1.0 and "mcnemar_p" not in found, "five answers to a question"


def test_the_stem_of_a_word_is_found_once():
    stem = stemmer().stem
    rouge_l("rhythms of rhythms", "a rhythms")
    before = stem.cache_info()
    rouge_l("rhythms again", "rhythms of rhythms")
    assert stem.cache_info().hits >= before.hits + 3 and stem.cache_info().misses <= before.misses + 1


def p_of(differences, patients=None):
    """The p of paired differences, one patient each."""
    rows = np.stack([differences, np.ones(len(differences))], axis=1)
    people = Patients([str(i) for i in range(len(differences))] if patients is None else patients)
    return people.swap_p(rows, rows * [0, 1], metrics.ratio), people.least_p


@pytest.mark.parametrize("n", [1, 2, 5, 14])
def test_the_least_p_of_few_patients_is_two_of_all_ways_to_flip_their_signs(n):
    assert p_of(np.ones(n)) == (2 / 2**n,) * 2
    assert p_of(np.concatenate([np.ones(n), np.zeros(30)]))[0] == 2 / 2**n, "those without a difference are no witness"
    assert p_of(np.zeros(n))[0] == 1.0


def test_the_least_p_of_many_patients_is_one_of_the_flips_and_the_scores_themselves():
    assert p_of(np.ones(15)) == (pytest.approx(2 / 2**15, abs=2e-4), 1 / (FLIPS + 1))
    assert p_of(np.ones(200)) == (1 / (FLIPS + 1),) * 2


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_p_is_the_share_of_sign_flips_with_a_sum_as_large(differences):
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))]
    assert p_of(np.array(differences, float))[0] == np.mean(np.array(flips) >= abs(sum(differences)))


def test_random_flips_agree_with_all_flips():
    differences = np.random.default_rng(0).normal(0.4, 1, 18)
    signs = 1 - 2 * (np.arange(2**18)[:, None] >> np.arange(18) & 1)
    exact = np.mean(abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
    assert p_of(differences)[0] == pytest.approx(exact, abs=0.02)


def test_a_p_is_never_said_to_be_zero():
    told = {0.0: "< 0.0001", 3e-20: "< 0.0001", 1e-4: "0.0001", 0.0312: "0.031", 1.0: "1", None: ""}
    assert {p: p_text(p) for p in told} == told


SAME = {
    "Chinese": "正常窦性心律",
    "Japanese": "正常洞調律です",
    "Korean": "정상 동리듬 입니다 지금",
    "German": "größe über dem mittel",
    "Hindi": "हृदय की लय सामान्य",
    "Thai": "จังหวะปกติ",
    "Arabic": "إيقاع جيبي طبيعي الآن",
    "Russian": "ритм синусовый в норме",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_a_right_answer_in_any_script_has_full_marks(text):
    for answer, truth in itertools.product((text, unicodedata.normalize("NFD", text)), repeat=2):
        values = Scorer().table([prediction(0, answer, truth, name="x")]).values()
        assert {name: round(value, 9) for name, value in values.items() if name != "meteor"} == dict.fromkeys(
            ("exact_match", "token_f1", "bleu4", "rouge_l"), 1.0)  # fmt: skip


def test_other_letters_are_another_word_and_some_characters_in_common_are_some():
    values = Scorer().table([prediction(0, "gräße öber", "größe über", name="x")]).values()
    assert values["rouge_l"] == values["token_f1"] == values["bleu4"] == 0.0
    values = Scorer().table([prediction(0, "正常心律", "正常窦性心律", name="x")]).values()
    assert values["rouge_l"] == values["token_f1"] == pytest.approx(0.8)


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_texts_are_those_of_the_reference(answer, truth):
    assert rouge_l_in_any_script(answer, truth) == rouge_l(answer, truth)
    lines = [prediction(0, answer, truth, name="x")]
    ours, theirs = (Scorer(name).table(lines).values() for name in ("ours", "elm-2026-08"))
    assert ours == theirs


def test_answer_sets_and_the_majority_are_compared_composed():
    composed, apart = "löst", unicodedata.normalize("NFD", "löst")
    line = prediction(0, apart, composed, name="single-query", answers=[composed])
    assert Scorer().table([line]).values()["answer_set_match"] == 1.0
    assert metrics.is_right("x", apart, composed)


def test_what_short_right_answers_have_of_bleu_is_said():
    result = aggregate(prediction(i, "yes", "yes", name="x") for i in range(100))
    assert result["metrics"]["bleu4"]["value"] == result["perfect"]["bleu4"] == pytest.approx(0.001**0.75)
    assert "bleu4 0.0056" in perfect_note(result)
    assert perfect_note(aggregate([prediction(0, "no", "sinus rhythm at 70 bpm", name="x")])) == ""
