"""Another rate: what the new rate cannot hold is gone, the rest is where it was; the reference's way by its name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_log import compare

from elm_jax.config import DataConfig
from elm_jax.data.represent import SignalSpec
from elm_jax.data.specs import signal_spec
from elm_jax.ecg.recording import LEADS, Recording, segments, to_segment
from elm_jax.ecg.resampling import resample, resample_by_spline
from elm_jax.errors import UserError

RATES = [(500, 250), (500, 50), (500, 360), (360, 250), (1000, 250), (400, 250), (257.123, 250), (250, 333.3333)]


def ramp(samples, rows=12, dtype=np.float32):
    """Row r is r + t/1000: every row and sample is told apart."""
    return (np.arange(rows)[:, None] + np.arange(samples)[None] / 1000).astype(dtype)


def sine(hertz, rate, samples):
    return np.sin(2 * np.pi * hertz * np.arange(samples)[None] / rate + 0.3)


def test_what_the_new_rate_cannot_hold_does_not_appear_at_another_frequency():
    recording = Recording(np.repeat(sine(200, 500, 5000), 12, 0).astype(np.float32), LEADS, 500.0)
    assert np.abs(to_segment(recording)[:, 50:-50]).max() < 5e-4, "200 Hz is folded"
    by_the_reference = to_segment(recording, compat=("spline_resampling",))
    spectrum = np.abs(np.fft.rfft(by_the_reference[0])) / 1250
    assert spectrum.argmax() == 500 and spectrum.max() > 0.5, "200 Hz appears at 50 Hz in the reference"


@pytest.mark.parametrize("rate, new_rate", RATES)
def test_below_four_fifths_of_the_band_all_stays_in_place_and_behind_the_band_nothing(rate, new_rate):
    band = min(rate, new_rate) / 2
    for part in (0.02, 0.3, 0.6, 0.8):
        found = resample(sine(part * band, rate, 5000), rate, new_rate)
        expected = sine(part * band, new_rate, int(5000 * new_rate / rate))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found[:, 60:-60], expected[:, 60:-60], atol=2e-3)
    for part in (1.0, 1.1, 1.5, 1.9):
        if part * band < rate / 2:
            assert np.abs(resample(sine(part * band, rate, 5000), rate, new_rate)[:, 60:-60]).max() < 5e-4


@settings(max_examples=40)
@given(st.floats(50, 2000), st.floats(25, 1000), st.integers(4, 600), st.floats(-5, 5))
def test_a_constant_stays_a_constant_and_the_first_sample_the_first_at_any_ratio(rate, new_rate, samples, value):
    if int(samples * new_rate / rate) < 1:
        return
    assert (resample(np.full((2, samples), value), rate, new_rate) == value).all()
    line = resample(np.arange(samples)[None] / samples + value, rate, new_rate)
    assert line[0, 0] == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(line[0], value + np.arange(line.shape[1]) * rate / new_rate / samples, atol=2e-3)


def test_a_signal_that_is_only_read_more_finely_keeps_its_samples():
    signal = np.random.default_rng(0).normal(size=(3, 400))
    np.testing.assert_allclose(resample(signal, 100, 500)[:, ::5], signal, atol=1e-3)


def test_nothing_rings_at_the_ends_of_a_signal_with_an_offset_and_a_drift():
    seconds = np.arange(5000)[None] / 500
    found = resample(3 + 0.2 * seconds, 500, 250)
    np.testing.assert_allclose(found, 3 + 0.2 * np.arange(2500)[None] / 250, atol=1e-9)


def test_a_step_overshoots_no_more_than_a_band_limit_makes_it():
    step = (np.arange(2000)[None] > 1000).astype(float)
    for rate, new_rate in RATES[:6]:
        assert resample(step, rate, new_rate).max() < 1.12


@pytest.mark.parametrize("rate", [500.0, 400.0, 257.123, 100.0])
def test_the_first_samples_do_not_depend_on_what_is_cut_off(rate):
    signal = np.random.default_rng(1).normal(size=(2, 6000))
    np.testing.assert_allclose(resample(signal, rate, 250, 1000), resample(signal, rate, 250)[:, :1000], atol=1e-12)


def test_a_long_recording_at_a_tiny_rate_needs_the_memory_of_what_is_taken():
    recording = Recording(np.zeros((12, 1_000_000), np.float32), LEADS, 1.0)  # 250 million samples a lead at 250 Hz
    assert to_segment(recording).shape == (12, 2500)


def test_the_references_resampling_equals_the_golden(golden):
    cases = np.load(golden("ecg_resample") / "cases.npz")
    keys = {key.split("/")[0] for key in cases}
    assert len(keys) >= 4
    for key in keys:
        rate, new_rate = map(float, key.split("to"))
        ours = resample_by_spline(cases[f"{key}/in"].T, rate, new_rate)
        compare("ecg_resample", key, ours.T, cases[f"{key}/out"], 1e-8)
        whole = Recording(cases[f"{key}/in"].T.astype(np.float64), LEADS, rate)
        by_name = to_segment(whole, new_rate, len(cases[f"{key}/out"]), compat=("elm-2026-08",))
        compare("ecg_resample", f"{key}, float32", by_name.T, cases[f"{key}/out"], 1e-5)


def test_a_name_that_is_no_behaviour_is_refused():
    with pytest.raises(UserError, match="did you mean 'spline_resampling'"):
        to_segment(Recording(ramp(3000), LEADS, 250.0), compat=("spline_resample",))


def test_a_runs_compat_decides_how_its_recordings_are_resampled_and_what_its_encoder_cache_is_called(tmp_path):
    signal = np.repeat(sine(200, 500, 5000), 12, 0)
    np.save(tmp_path / "a.npy", {"ecg": signal, "report": "", "target_sf": 500}, allow_pickle=True)
    data = DataConfig(root=str(tmp_path))
    ours, reference = signal_spec(data, 0), signal_spec(data, 0, compat=("elm-2026-04",))
    assert np.abs(ours.load_raw("a.npy", 0)[:, 50:-50]).max() < 5e-4
    assert np.abs(reference.load_raw("a.npy", 0)).max() > 0.8
    assert repr(ours) != repr(reference), "the encoder cache knows a preparation by this"
    assert isinstance(ours, SignalSpec)


def test_equal_rates_leave_the_samples_alone():
    recording = Recording(ramp(3000), LEADS, 250.0)
    np.testing.assert_array_equal(to_segment(recording), ramp(3000)[:, :2500])


def test_segments_are_every_whole_window_and_the_first_is_to_segment():
    recording = Recording(ramp(1050, dtype=np.float64), LEADS, 500.0)
    windows = segments(recording, 250, 200)
    assert windows.shape == (2, 12, 200) and windows.dtype == np.float64
    np.testing.assert_allclose(windows[0], to_segment(recording, 250, 200), atol=1e-6)
    np.testing.assert_allclose(np.concatenate(windows, 1)[3], resample(recording.signal, 500, 250)[3, :400])
    assert segments(recording, 250, 526).shape == (0, 12, 526)


@pytest.mark.parametrize("compat", [(), ("spline_resampling",)])
def test_what_is_too_short_is_refused(compat):
    with pytest.raises(UserError, match="500 samples at 250 Hz; expected at least 501"):
        to_segment(Recording(ramp(1000), LEADS, 500.0), 250, 501, compat)
    with pytest.raises(UserError, match="3 samples"):
        to_segment(Recording(ramp(3), LEADS, 500.0), 250, 1, compat)
