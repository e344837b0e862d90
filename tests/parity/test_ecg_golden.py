"""Augmented, replaced and stacked signals against the reference, number by number."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from parity_log import compare, record

from elm_jax.data.represent import SignalSpec
from elm_jax.ecg.augment import augment_ecg, noise_ecg
from elm_jax.ecg.images import VIT, stacked
from elm_jax.ecg.recording import LEADS, min_max


class LegacyDraws:
    """What the reference draws from: Python's `random` and numpy's legacy generator, both seeded alike."""

    def __init__(self, seed):
        self.python, self.numpy = random.Random(seed), np.random.RandomState(seed)

    def random(self):
        return self.python.random()

    def normal(self, loc, scale, size):
        return self.numpy.normal(loc, scale, size)

    def integers(self, low, high):
        return self.python.randint(low, high - 1)


@pytest.fixture
def augmented(golden):
    folder = golden("ecg_augment")
    with np.load(folder / "outputs.npz") as file:
        return json.loads((folder / "cases.json").read_text()), dict(file)


def test_augmented_signals_equal_the_golden(augmented):
    cases, arrays = augmented
    changed = 0
    for case in cases:
        found = augment_ecg(arrays["in"], LegacyDraws(case["seed"]))
        compare("ecg_augment", f"augment_{case['i']}", found, arrays[f"augment_{case['i']}"], 1e-12)
        assert (found != arrays["in"]).any() == case["augmented"]
        changed += case["augmented"]
    assert 0 < changed < len(cases)


def test_noise_in_place_of_a_signal_equals_the_golden(augmented):
    cases, arrays = augmented
    for case in cases:
        expected = arrays[f"noise_{case['i']}"]
        found = noise_ecg(expected.shape, LegacyDraws(case["seed"]))
        compare("ecg_augment", f"noise_{case['i']}", found, expected, 1e-12)


def test_a_flat_line_is_to_the_model_what_the_golden_is(augmented):
    cases, arrays = augmented
    spec = SignalSpec(root=".", leads=(0, 1), length=4, sampling_rate=250, norm_eps=1e-6, perturb=None, seed=0)
    ours = spec.load("flatline", key=0)
    levels = set()
    for case in cases:
        theirs = arrays[f"blackout_{case['i']}"]
        levels.add(theirs.item(0))
        assert (theirs == theirs.item(0)).all()
        compare("ecg_augment", f"blackout_{case['i']}", ours, min_max(theirs), 0.0)
    assert len(levels) > 1, "whatever the level"


def test_stacked_signals_equal_the_golden(golden):
    with np.load(golden("ecg_stacked_signal") / "cases.npz") as file:
        cases = dict(file)
    names = {key.split("/")[0] for key in cases}
    assert names
    for name in sorted(names):
        expected = cases[f"{name}/out"]
        found = stacked(min_max(cases[f"{name}/in"]))
        assert found.dtype == expected.dtype and found.shape == expected.shape
        record("ecg_stacked_signal", name, int(np.abs(found.astype(int) - expected).max()), 0)


def test_what_the_loader_gives_of_a_stacked_signal_equals_the_golden(golden, tmp_path):
    """From a file to an image that keeps its size. Recordings are read as float32, the golden's are float64: a value
    at the edge of a level may fall on its other side."""
    with np.load(golden("ecg_stacked_signal") / "cases.npz") as file:
        cases = dict(file)
    checked = 0
    for name in sorted({key.split("/")[0] for key in cases}):
        signal, expected = cases[f"{name}/in"], cases[f"{name}/out"].astype(int)
        if len(signal) != len(LEADS):
            continue
        np.save(tmp_path / f"{name}.npy", signal)
        spec = SignalSpec(
            root=str(tmp_path), leads=tuple(range(len(LEADS))), length=signal.shape[1], sampling_rate=250,
            norm_eps=1e-6, perturb=None, seed=0, representation="stacked_signal",
            processing=replace(VIT, size=signal.shape),
        )  # fmt: skip
        different = np.abs(np.asarray(spec.load(f"{name}.npy", key=0)).astype(int) - expected)
        record("ecg_stacked_signal", f"{name} as loaded, levels", int(different.max()), 1)
        record("ecg_stacked_signal", f"{name} as loaded, part that differs", float((different > 0).mean()), 1e-3)
        checked += 1
    assert checked
