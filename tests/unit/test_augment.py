"""Random changes: how often, how large, by whose definitions; the same generator gives the same sample."""

import numpy as np
import pytest
from PIL import Image

from elm_jax.ecg import augment
from elm_jax.ecg.augment import augment_ecg, augment_image, blur, noise_ecg, shift_hue

SIGNAL = np.random.default_rng(0).normal(0, 0.4, (12, 500)).astype(np.float32)
IMAGE = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def generators(count):
    return [np.random.default_rng([7, i]) for i in range(count)]


class Fixed:
    """Draws that are told beforehand: chances in order, noise of zeros, the given number of half periods."""

    def __init__(self, chances, half_periods=1):
        self.chances, self.half_periods = list(chances), half_periods

    def random(self):
        return self.chances.pop(0)

    def normal(self, loc, scale, size):
        assert loc == 0
        self.scale = scale
        return np.zeros(size)

    def integers(self, low, high):
        assert (low, high) == (1, 6)
        return self.half_periods


# ---- signals


def test_half_of_the_signals_are_changed_and_half_of_those_wander():
    changed = [augment_ecg(SIGNAL, rng) - SIGNAL for rng in generators(400)]
    noisy = [change for change in changed if change.any()]
    assert 0.42 < len(noisy) / 400 < 0.58
    wandering = [change for change in noisy if np.abs(change.mean(0)).max() > 0.05]
    assert 0.4 < len(wandering) / len(noisy) < 0.6


def test_noise_is_a_twentieth_of_the_deviation_and_differs_between_leads():
    draws = Fixed([0.1, 0.9])
    np.testing.assert_array_equal(augment_ecg(SIGNAL, draws), SIGNAL)
    assert draws.scale == pytest.approx(0.05 * SIGNAL.std())
    change = next(c for rng in generators(50) if (c := augment_ecg(SIGNAL, rng) - SIGNAL).any())
    assert np.abs(np.corrcoef(change[:2])[0, 1]) < 0.5


@pytest.mark.parametrize("half_periods", [1, 2, 5])
def test_wandering_is_a_sine_over_the_whole_recording_the_same_in_all_leads(half_periods):
    change = augment_ecg(SIGNAL, Fixed([0.1, 0.1], half_periods)) - SIGNAL
    expected = 0.07 * np.abs(SIGNAL).max() * np.sin(np.linspace(0, half_periods * np.pi, 500))
    np.testing.assert_allclose(change, np.tile(expected, (12, 1)), atol=1e-6)


def test_an_augmented_signal_keeps_shape_and_dtype_and_the_original():
    for dtype in (np.float32, np.float64):
        signal = SIGNAL.astype(dtype)
        before = signal.copy()
        for rng in generators(8):
            found = augment_ecg(signal, rng)
            assert found.shape == signal.shape and found.dtype == dtype
        np.testing.assert_array_equal(signal, before)


def test_noise_is_standard_normal():
    noise = noise_ecg((12, 5000), np.random.default_rng(0))
    assert noise.shape == (12, 5000) and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_the_same_generator_gives_the_same_sample():
    for a, b in zip(generators(12), generators(12), strict=True):
        np.testing.assert_array_equal(augment_ecg(SIGNAL, a), augment_ecg(SIGNAL, b))
        np.testing.assert_array_equal(augment_image(IMAGE, a), augment_image(IMAGE, b))


# ---- images


class Chosen(np.random.Generator):
    """A generator whose first answers, to whether and which, are told."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, chosen, uniform, order=0.9):
        super().__init__(np.random.PCG64(0))
        self.answers = [0.0, np.where(np.isin(range(4), chosen), 0.1, 0.9), order]
        self.uniforms = list(uniform)

    def random(self, size=None):
        return self.answers.pop(0)

    def uniform(self, low, high):
        value = self.uniforms.pop(0)
        assert low <= value <= high
        return value


def test_four_in_ten_images_stay_and_each_change_comes_in_half_of_the_others():
    unchanged = turned = brighter = 0
    grey = np.full((81, 81, 3), 100, np.uint8)
    for rng in generators(400):
        found = augment_image(grey, rng)
        assert (found == found[..., :1]).all(), "grey stays grey"
        unchanged += (found == grey).all()
        turned += (found < 10).any()
        brighter += abs(int(found[40, 40, 0]) - 100) > 1
    # A turn of less than half a degree or so does not show, nor do small changes of brightness.
    assert 0.47 < unchanged / 400 < 0.63, "all but three quarters of six tenths; blur and hue do not show on grey"
    assert 0.2 < turned / 400 < 0.36 and 0.2 < brighter / 400 < 0.36


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_brightness_multiplies(factor):
    found = augment_image(IMAGE, Chosen([0], [factor]))
    assert np.abs(found - np.clip(IMAGE * factor, 0, 255)).max() <= 1


@pytest.mark.parametrize("degrees", [-5.0, 3.0])
def test_a_turn_is_about_the_centre_against_the_clock_and_leaves_black(degrees):
    image = np.full((101, 101, 3), 255, np.uint8)
    image[50, 90] = (255, 0, 0)
    found = augment_image(image, Chosen([1], [degrees]))
    row, column = np.argwhere((found == (255, 0, 0)).all(2)).mean(0)
    assert abs(row - (50 - 40 * np.sin(np.radians(degrees)))) <= 1 and abs(column - 90) <= 1
    assert not found[0, 0].any() or not found[0, -1].any()


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 0.8, 1.5])
def test_blur_is_the_gaussian_of_five_by_five_mirrored_at_the_edges(sigma):
    weights = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(IMAGE.astype(float), ((2, 2), (2, 2), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(0, 1))
    assert np.abs(blur(IMAGE, sigma) - np.einsum("hwcij,ij->hwc", windows, kernel)).max() <= 1.6


def test_blur_keeps_an_even_image():
    for level in (0, 1, 128, 255):
        even = np.full((9, 7, 3), level, np.uint8)
        for sigma in np.linspace(0.05, 1.5, 20):
            np.testing.assert_array_equal(blur(even, sigma), even)


def test_hue_turns_red_over_yellow_to_green_and_leaves_grey():
    red = Image.fromarray(np.array([[[200, 20, 20], [90, 90, 90]]], np.uint8))
    towards = np.asarray(shift_hue(red, 0.08))[0]
    assert towards[0, 0] == 200 and 80 < towards[0, 1] < 130 and abs(int(towards[0, 2]) - 20) <= 2
    assert (np.asarray(shift_hue(red, -0.08))[0, 0, 2]) > 80
    third = np.asarray(shift_hue(red, 1 / 3))[0, 0]
    assert third[1] == 200 and third[0] < 30
    np.testing.assert_array_equal(towards[1], 90)


def test_saturation_moves_away_from_grey_and_its_order_with_hue_is_drawn():
    image = np.full((4, 4, 3), (180, 120, 100), np.uint8)
    more = augment_image(image, Chosen([3], [1.3, 0.0]))
    less = augment_image(image, Chosen([3], [0.7, 0.0]))
    spread = [int(np.ptp(x[0, 0].astype(int))) for x in (less, image, more)]
    assert spread[0] < spread[1] < spread[2]
    first, then = (augment_image(IMAGE, Chosen([3], [1.3, 0.08], order)) for order in (0.1, 0.9))
    assert (first != then).any()


def test_an_augmented_image_keeps_shape_and_dtype_and_the_original():
    before = IMAGE.copy()
    for rng in generators(30):
        found = augment_image(IMAGE, rng)
        assert found.shape == IMAGE.shape and found.dtype == np.uint8
    np.testing.assert_array_equal(IMAGE, before)


def test_the_numbers_are_those_of_the_reference():
    assert (augment.CHANCE, augment.IMAGE_CHANCE) == (0.5, 0.6)
    limits = (augment.BRIGHTNESS, augment.DEGREES, augment.BLUR_SIGMA, augment.HUE, augment.SATURATION)
    assert limits == (0.2, 5.0, 1.5, 0.08, 0.3)
