"""Measures of generated ECGs and of encoders, against the goldens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from elm_jax.scoring import generation, probing

Golden = Callable[[str], Path]


def test_generation(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden("metrics_ecg_generation")
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    told = json.loads((folder / "outputs.json").read_text())
    real, made = given["real"], given["gen"]
    np.testing.assert_allclose(generation.frechet_distance(real, made), told["fid"], rtol=1e-8)
    np.testing.assert_allclose(generation.mean_discrepancy(real, made), told["mmd"], atol=1e-10)
    np.testing.assert_allclose(generation.mean_discrepancy(real, made, 0.1), told["mmd_gamma_0_1"], atol=1e-10)
    monkeypatch.setattr(generation, "BLOCK", 3 * len(made))  # the kernel in blocks of rows
    np.testing.assert_allclose(generation.mean_discrepancy(real, made), told["mmd"], atol=1e-10)
    assert math.isnan(generation.frechet_distance(real, np.where(made > made.mean(), np.inf, made)))
    for rate in (100, 250, 500):
        assert generation.ssim_window(rate) == told[f"ssim_window_sf{rate}"]
        found = generation.rebuilding(given["pred"], given["target"], rate)
        for name, tolerance in (("mse", 1e-6), ("mae", 1e-6), ("psnr", 1e-3), ("ssim", 2e-5)):
            if f"recon_sf{rate}/{name}" in wanted:
                np.testing.assert_allclose(getattr(found, name), wanted[f"recon_sf{rate}/{name}"], atol=tolerance)
    first, made_of_it = given["stitch_cond"], given["stitch_gen"]  # lead II, and the seven others
    eight = np.concatenate([made_of_it[:, :1], first[:, None], made_of_it[:, 1:]], 1)
    np.testing.assert_allclose(generation.twelve_leads(eight), wanted["stitch_cond_idx1"], atol=1e-6)
    forecast, truth, context = (given[f"forecast_{name}"] for name in ("pred", "gt", "context"))
    cases = {
        "normal": (forecast, truth, context), "no_context": (forecast, truth, None),
        "constant_pred": (np.ones_like(forecast), truth, context),
        "perfect": (truth, truth, context), "empty": (forecast[:0], truth, context),
    }  # fmt: skip
    for name, arguments in cases.items():
        expected = {key: float(value) for key, value in told["forecast"][name].items()}
        found = dict(generation.forecasting(*arguments))
        np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-6, err_msg=name)


def test_zero_shot(golden: Golden) -> None:
    folder = golden("merl_zeroshot")
    given, wanted = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    told = json.loads((folder / "outputs.json").read_text())
    classes = probing.prompt_classifier(given["text_embeddings"])
    np.testing.assert_allclose(classes, wanted["class_weights"], atol=2e-6)
    first = probing.prompt_classifier(given["text_embeddings"][:, :1])
    np.testing.assert_allclose(first, wanted["class_weights_first_prompt_only"], atol=2e-6)
    scores = probing.zero_shot(given["ecg_embeddings"], classes)
    np.testing.assert_allclose(scores, wanted["pred"], atol=2e-6)
    labels, theirs = given["labels"], wanted["pred"]
    for k, area in enumerate(told["auroc_per_class"]):
        np.testing.assert_allclose(100 * probing.auroc(theirs[:, k], labels[:, k]), area, atol=1e-9)
        score, threshold = probing.best_f1(theirs[:, k], labels[:, k])
        np.testing.assert_allclose(100 * score, told["f1_per_class"][k], atol=1e-6)
        np.testing.assert_allclose(threshold, told["threshold_of_max_f1"][k], atol=1e-6)
        right = ((theirs[:, k] >= threshold) == labels[:, k]).mean()
        np.testing.assert_allclose(100 * right, told["acc_per_class_if_threshold_inclusive"][k], atol=1e-6)
        assert probing.f1(theirs[:, k] >= threshold, labels[:, k]) == score
    assert math.isnan(probing.auroc(scores[:, 0], np.zeros(len(scores))))
