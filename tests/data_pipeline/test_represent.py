"""From the path in a record to what the model is given."""

import numpy as np
import pytest

from elm_jax.data.represent import SignalSpec
from elm_jax.ecg.recording import normalize
from elm_jax.errors import UserError

SPEC = dict(leads=tuple(range(12)), length=40, sampling_rate=250, norm_eps=1e-6, perturb=None, seed=0)


def load_signal(path, key=0, epoch=None, **spec):
    return SignalSpec(**{**SPEC, **spec}).load(path, key, epoch)


def ramp(samples=40, rows=12, dtype=np.float32):
    """Row r is r + t/1000: every row and sample is told apart."""
    return (np.arange(rows)[:, None] + np.arange(samples)[None] / 1000).astype(dtype)


def save_dict(path, ecg, **others):
    np.save(path, {"ecg": ecg, "report": "sinus rhythm", **others}, allow_pickle=True)
    return path


def test_load_signal_is_the_file_normalised_over_the_chosen_leads(tmp_path):
    np.save(tmp_path / "a.npy", ramp(50))
    signal = load_signal("a.npy", root=str(tmp_path), leads=(1, 0))
    np.testing.assert_allclose(signal, normalize(ramp(50)[[1, 0], :40]))
    assert signal.shape == (2, 40) and signal.dtype == np.float32


def test_a_file_at_another_rate_is_resampled_and_one_too_short_is_named(tmp_path):
    save_dict(tmp_path / "a.npy", ramp(80), target_sf=500)
    assert load_signal("a.npy", root=str(tmp_path)).shape == (12, 40)
    with pytest.raises(UserError, match=r"a\.npy: found 40 samples.*at least 41"):
        load_signal("a.npy", root=str(tmp_path), length=41)


def test_a_bare_array_is_taken_to_be_at_the_rate_asked_for(tmp_path):
    np.save(tmp_path / "a.npy", ramp(40))
    assert load_signal("a.npy", root=str(tmp_path), sampling_rate=100).shape == (12, 40)


def test_noise_is_drawn_by_key_and_path_and_flat_is_zero():
    draw = lambda path, **kw: load_signal(path, root="", **kw)  # noqa: E731
    noise = draw("noise")
    assert noise.dtype == np.float32 and noise.min() == 0 and 0.99 < noise.max() <= 1
    np.testing.assert_array_equal(noise, draw("noise"))
    assert not np.array_equal(noise, draw("noise", key=1))
    assert not np.array_equal(draw("a.npy", perturb="noise"), draw("b.npy", perturb="noise"))
    assert not draw("flatline").any() and not draw("a.npy", perturb="zeros").any()
    assert not draw("noise", perturb="zeros").any()


def test_a_demo_recording_comes_at_the_rate_asked_for():
    spec = {"length": 2500}
    signal = load_signal("demo:test:0", root="", **spec)
    assert signal.shape == (12, 2500) and signal.min() == 0 and 0.99 < signal.max() <= 1
    with pytest.raises(UserError, match="10 s"):
        load_signal("demo:test:0", root="", **{**spec, "length": 2400})
