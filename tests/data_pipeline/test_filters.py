"""The filters of 2025 against the goldens, and what they must do to signals of which that is known."""

import goldens
import numpy as np
import pytest
from parity_log import record

from elm_jax.data.prepare.profiles import PROFILES
from elm_jax.ecg.filters import filter_2025, shrink
from elm_jax.errors import UserError

CASES = goldens.cases("prep_filters", "stages.npz")


@pytest.mark.parametrize("case", CASES)
def test_the_chain_is_the_references_in_second_order_sections(case):
    with np.load(goldens.find("prep_filters") / "stages.npz") as stages:
        rate = 400 if case.startswith("code") else 500
        signal = stages[f"{case}/in"]
        found = filter_2025(signal, rate)
        expected = stages[f"{case}/sos/wavelet"]
        record("prep_filters", case, np.abs(found - expected).max(), 1e-8)
        record("prep_filters", f"{case} wavelet", np.abs(shrink(stages[f"{case}/sos/high"]) - expected).max(), 1e-9)
        if f"{case}/final250_float32" in stages:
            ours = PROFILES["paper-2025"](signal, rate, 250)
            assert ours.dtype == np.float32
            # the reference's polynomial of the 0.05 Hz stage is off by so much
            np.testing.assert_allclose(ours, stages[f"{case}/final250_float32"], atol=3e-3)


@pytest.mark.parametrize("samples", [5000, 4999, 28, 33, 513])
def test_mains_drift_and_steady_voltage_go_and_the_length_stays(samples):
    seconds = np.arange(samples) / 500
    mains = np.sin(2 * np.pi * 50 * seconds) + np.sin(2 * np.pi * 60 * seconds)
    found = filter_2025(np.stack([np.full(samples, 3.0), mains]), 500)
    assert found.shape == (2, samples) and np.isfinite(found).all()
    assert samples < 4999 or np.abs(found[:, 1000:-1000]).max() < 0.1


def test_what_cannot_be_filtered_is_refused():
    for signal, rate in ((np.zeros((12, 5000)), 200), (np.zeros((12, 27)), 500)):
        with pytest.raises(UserError, match="more than 27 samples at more than 200 Hz"):
            filter_2025(signal, rate)
