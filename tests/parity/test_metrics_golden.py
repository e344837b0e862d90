"""Every metric of the reference against its goldens."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from texts import write_wordnet

from elm_jax.scoring.answers import exact_match, split_response, token_f1
from elm_jax.scoring.classification import classification, pretrain_breakdown
from elm_jax.scoring.meteor import Meteor
from elm_jax.scoring.metrics import Scorer
from elm_jax.scoring.overlap import bleu, bleu_counts, rouge_l
from elm_jax.scoring.statistics import student_t

NAMES = {"ACC": "exact_match", "F1": "token_f1", "BLEU-4": "bleu4", "ROUGE-L": "rouge_l", "METEOR": "meteor"}


@pytest.fixture
def cases(shared):
    return lambda name: json.loads((shared / f"golden/metrics_{name}/cases.json").read_text())


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """NLTK's data with the synonyms that the goldens' pairs have in WordNet: the whole of it is not everywhere."""
    folder = tmp_path_factory.mktemp("nltk")
    write_wordnet(folder / "corpora" / "wordnet", {"noun": [["dog", "hound"]], "adj": [["large", "big"]]})
    return str(folder)


def test_every_pair(cases):
    for pair in cases("strings")["pairs"]:
        hyp, ref = pair["hyp"], pair["ref"]
        assert bool(exact_match(hyp, ref)) == pair["acc"], pair
        assert token_f1(hyp, ref) == pytest.approx(pair["token_f1"], abs=1e-9), pair
        assert rouge_l(hyp, ref) == pytest.approx(pair["rougeL_f"], abs=1e-9), pair
        assert float(bleu(np.array(bleu_counts(hyp, ref)))) == pytest.approx(pair["bleu4_single"], abs=1e-9), pair


WORDS = st.lists(st.sampled_from(["a", "fast", "rhythms", "rhythm", "normal", "normally", "QRS", "12", "beats,"]))


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_package(ours, theirs):
    answer, truth = " ".join(ours), " ".join(theirs)
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(truth, answer)["rougeL"].fmeasure
    assert rouge_l(answer, truth) == expected


def test_meteor_of_every_pair(cases, wordnet):
    meteor = Meteor(wordnet)
    for pair in cases("strings")["pairs"]:
        assert meteor(pair["hyp"], pair["ref"]) == pytest.approx(pair["meteor"], abs=1e-9), pair


@pytest.mark.parametrize("protocol", ["ours", "elm-2026-08"])
def test_scores_leave_out_empty_truths_and_keep_empty_answers(cases, wordnet, protocol):
    strings, scorer = cases("strings"), Scorer(protocol, wordnet=wordnet)
    assert not scorer.unavailable
    compared = 0
    for name, case in strings["evaluate_strings"].items():
        pairs = [strings["pairs"][i] for i in case["indices"]]
        if protocol == "ours" and not all((p["hyp"] + p["ref"]).isascii() for p in pairs):
            continue  # where the reference finds no words, or one, we find characters
        compared += bool(pairs)
        lines = [{"id": str(i), "answer": p["hyp"], "truth": p["ref"]} for i, p in enumerate(pairs)]
        found = scorer.table(lines).values()
        for theirs, ours in NAMES.items():
            # Where no pair is left the reference says 0, and we say nothing.
            assert found.get(ours, 0.0) == pytest.approx(case["scores"][theirs], abs=1e-9), (name, ours)
    assert compared


def test_split_response(cases):
    for case in cases("split_response"):
        assert split_response(case["text"]) == (case["thinking"], case["answer"]), case


def test_statistics_over_runs(cases):
    for case in cases("statistics"):
        for path, expected in leaves(case["out"]):
            runs = [100 * np.mean(at(result["metrics"], path)) for result in case["results"]]
            found = student_t(runs)
            assert found["mean"] == pytest.approx(expected["mean"], abs=1e-9)
            if len(runs) == 1:
                assert found["std"] is None and found["ci95"] is None and expected["std"] == "NaN"
            else:
                assert found["std"] == pytest.approx(expected["std"], abs=1e-9)
                assert found["ci95"] == pytest.approx(expected["conf_interval"], abs=1e-9)


def test_classes_and_confusions(cases):
    for case in cases("classification"):
        found = classification(case["refs"], case["hyps"])
        assert found["accuracy"] == case["per_class_acc"]
        assert found["confusion"] == case["confusion_matrix"]
        assert found["other"] == case["other_counts"]


def test_statements_missed_and_made_up(cases):
    short = {"missed_instances": "missed_inst", "extra_instances": "extra_inst"}
    for case in cases("pretrain_breakdown"):
        found = pretrain_breakdown(case["refs"], [hyp or "" for hyp in case["hyps"]])
        for name, value in found.items():
            expected = case["out"][short.get(name, name)]
            if name.startswith("top_"):  # the order of equally frequent ones is not defined there
                value, expected = (sorted(map(tuple, pairs)) for pairs in (value, expected))
            assert value == expected, name


def leaves(tree, path=()):
    for name, value in tree.items():
        if "mean" in value:
            yield (*path, name), value
        else:
            yield from leaves(value, (*path, name))


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
