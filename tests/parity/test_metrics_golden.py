"""Exact match, token F1 and the split into thinking and answer against the reference."""

import json

import numpy as np
import pytest

from elm_jax.evaluation.metrics import exact_match, split_response, token_f1


@pytest.fixture
def strings(shared):
    return json.loads((shared / "golden/metrics_strings/cases.json").read_text())


def test_every_pair(strings):
    for pair in strings["pairs"]:
        assert bool(exact_match(pair["hyp"], pair["ref"])) == pair["acc"], pair
        assert token_f1(pair["hyp"], pair["ref"]) == pytest.approx(pair["token_f1"], abs=1e-9), pair


def test_means_leave_out_empty_truths_and_keep_empty_answers(strings):
    cases = strings["evaluate_strings"]
    assert cases
    for name, case in cases.items():
        pairs = [strings["pairs"][i] for i in case["indices"] if strings["pairs"][i]["ref"]]
        for metric, key in ((exact_match, "ACC"), (token_f1, "F1")):
            mean = np.mean([metric(pair["hyp"], pair["ref"]) for pair in pairs]) if pairs else 0.0
            assert mean == pytest.approx(case["scores"][key], abs=1e-9), name


def test_split_response(shared):
    cases = json.loads((shared / "golden/metrics_split_response/cases.json").read_text())
    for case in cases:
        assert split_response(case["text"]) == (case["thinking"], case["answer"]), case
