"""Random changes to training samples, and the noise that takes a signal's place.

Everything is drawn from the generator that is passed, and from nothing else: the same generator gives the same
sample. The image changes are those of torchvision on a Pillow image, by their definitions.

Dimension letters: C leads, L samples, H x W pixels.
"""

from typing import Protocol

import numpy as np
from PIL import Image, ImageEnhance

NOISE_SHARE, WANDER_SHARE = 0.05, 0.07  # of the signal's standard deviation; of its largest absolute value
CHANCE, IMAGE_CHANCE = 0.5, 0.6
BRIGHTNESS, DEGREES, BLUR_SIGMA, HUE, SATURATION = 0.2, 5.0, 1.5, 0.08, 0.3


class Draws(Protocol):
    """What is drawn: the part of numpy.random.Generator that augment_ecg and noise_ecg use."""

    def random(self) -> float: ...
    def normal(self, loc: float, scale: float, size: tuple[int, ...]) -> np.ndarray: ...
    def integers(self, low: int, high: int) -> int: ...  # high is not among them


def augment_ecg(signal: np.ndarray, draws: Draws) -> np.ndarray:
    """The signal (C, L) before normalisation, in half of all cases noisier, in half of those also wandering.

    The noise is normal, independent for each sample; the wandering of the baseline is a sine of half a period
    to two and a half over the recording, the same in every lead. Returns the signal's dtype.
    """
    if draws.random() >= CHANCE:
        return signal
    noisy = signal + draws.normal(0.0, NOISE_SHARE * float(np.std(signal)), signal.shape)
    if draws.random() < CHANCE:
        half_periods = int(draws.integers(1, 6))
        amplitude = WANDER_SHARE * float(np.abs(signal).max())
        noisy = noisy + amplitude * np.sin(np.linspace(0.0, half_periods * np.pi, signal.shape[1]))
    return noisy.astype(signal.dtype)


def noise_ecg(shape: tuple[int, int], draws: Draws) -> np.ndarray:
    """A signal (C, L) float64 that is no ECG: independent standard normal samples."""
    return draws.normal(0.0, 1.0, shape)


def augment_image(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, 3) uint8, in 6 of 10 cases with each of four changes at even odds.

    Brightness by up to a fifth; turned by up to 5 degrees, black where nothing was; blurred, sigma up to 1.5
    pixels of this image; hue by up to 0.08 of the circle together with saturation by up to 0.3.
    """
    if rng.random() >= IMAGE_CHANCE:
        return image
    picture = Image.fromarray(image)
    brighter, turned, blurred, coloured = rng.random(4) < CHANCE
    if brighter:
        picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
    if turned:
        picture = picture.rotate(rng.uniform(-DEGREES, DEGREES), Image.Resampling.NEAREST)
    if blurred:
        picture = Image.fromarray(blur(np.asarray(picture), BLUR_SIGMA * (1 - rng.random())))
    if coloured:
        saturation, hue = rng.uniform(1 - SATURATION, 1 + SATURATION), rng.uniform(-HUE, HUE)
        if rng.random() < CHANCE:  # the order shows
            picture = ImageEnhance.Color(shift_hue(picture, hue)).enhance(saturation)
        else:
            picture = shift_hue(ImageEnhance.Color(picture).enhance(saturation), hue)
    return np.asarray(picture)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """An image (H, W, 3) uint8, each side at least 3, under a Gaussian of 5 x 5 pixels, mirrored at the edges.

    In whole numbers, rows and columns one after the other: within one level of the exact sum.
    """
    weights = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    outer, inner = (round(256 * weight / weights.sum()) for weight in weights[:2])
    a, b, c = np.uint16(outer), np.uint16(inner), np.uint16(256 - 2 * (outer + inner))
    half = np.uint16(128)
    x = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect").astype(np.uint16)
    x = (c * x[2:-2] + b * (x[1:-3] + x[3:-1]) + a * (x[:-4] + x[4:]) + half) >> 8
    x = (c * x[:, 2:-2] + b * (x[:, 1:-3] + x[:, 3:-1]) + a * (x[:, :-4] + x[:, 4:]) + half) >> 8
    return x.astype(np.uint8)


def shift_hue(picture: Image.Image, share: float) -> Image.Image:
    """Every hue turned by a share of the circle, in steps of 1/255."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([(level + int(share * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
