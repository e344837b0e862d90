"""A drawn page as it comes from a printer, a drawer and a scanner: what `ecg-image-kit` does to pages, in our own way.

Everything is drawn from the generator that is passed, and from nothing else. H x W pixels.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from elm_jax.ecg.augment import CHANCE, blur
from elm_jax.ecg.rasterize import INK, PAPER, STRONG

# Paper, strong lines and ink of other makers; that of fine lines lies between the first two.
COLOURS = (
    ((255, 247, 240), (240, 150, 110), (20, 20, 20)),  # orange, black
    ((246, 250, 255), (130, 160, 225), (15, 15, 60)),  # blue
    ((247, 253, 246), (130, 190, 140), (20, 30, 20)),  # green
    ((252, 252, 250), (190, 190, 190), (0, 0, 0)),  # a copy in grey
    ((255, 240, 243), (232, 120, 135), (40, 30, 110)),  # a strong pink
)
DEGREES, NOISE, BLUR_SIGMA, JPEG = 5.0, 15.0, 1.5, (20, 85)  # noise: grey levels
SHADE, CREASE = 0.18, 0.35  # how much light a wrinkle and a crease take at most
_BLOCKS, _PEN = 6, (25, 30, 90)


def worn(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A page (H, W, 3) uint8 with each of eight changes at even odds, in this order: the colours of paper, lines and
    ink; words written by hand; wrinkles; creases; turned by up to 5 degrees; blurred; noise of up to 15 levels; and
    kept as a JPEG of quality 20 to 85."""
    for change, made in zip(CHANGES, rng.random(len(CHANGES)) < CHANCE, strict=True):
        page = change(page, rng) if made else page
    return page


def recoloured(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paper, lines and ink in other colours; black stays."""
    new = np.array(COLOURS[rng.integers(len(COLOURS))], float) + rng.uniform(-8, 8, (3, 3))
    change = np.linalg.solve(np.array([PAPER, STRONG, INK], float), np.clip(new, 0, 255))
    return _levels(page.astype(np.float32) @ change.astype(np.float32))


def written_on(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to three lines of loops as a pen writes them, a word or two each, no letters that anyone could read."""
    picture = Image.fromarray(page)
    pen, height, width = ImageDraw.Draw(picture), *page.shape[:2]
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0.02, 0.6) * width, rng.uniform(0.08, 0.92) * height
        size, slope = rng.uniform(0.012, 0.03) * height, rng.uniform(-0.06, 0.06)
        for _ in range(rng.integers(1, 4)):
            t = np.linspace(0, 2 * np.pi * (letters := rng.integers(3, 9)), 12 * letters)
            high = np.interp(t, np.linspace(0, t[-1], letters + 1), rng.uniform(0.4, 1.6, letters + 1))
            across = x + size * (0.16 * t + 0.45 * np.sin(t + rng.uniform(0, 1)))
            down = y + slope * (across - x) - size * high * np.cos(t)
            pen.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=_PEN, width=max(1, height // 400))
            x, y = float(across[-1]) + size, float(down[-1])
    return np.asarray(picture)


def wrinkled(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft light and shade, as on paper that was crumpled and made flat again."""
    rough = rng.uniform(-1, 1, (_BLOCKS, _BLOCKS)).astype(np.float32)
    size = (page.shape[1], page.shape[0])
    field = np.asarray(Image.fromarray(rough, "F").resize(size, Image.Resampling.BICUBIC))
    return _levels(page * (1 - SHADE * rng.uniform(0.3, 1) * np.maximum(field, 0)[..., None]))


def creased(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One to three folds from edge to edge: a dark line, and a bright one beside it."""
    height, width = page.shape[:2]
    light = np.ones((height, width), np.float32)
    for _ in range(rng.integers(1, 4)):
        angle, reach = rng.uniform(0, np.pi), rng.uniform(0.004, 0.012) * width
        normal = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        centre = normal[0] * rng.uniform(0.2, 0.8) * width + normal[1] * rng.uniform(0.2, 0.8) * height
        away = np.add.outer(normal[1] * np.arange(height, dtype=np.float32),
                            normal[0] * np.arange(width, dtype=np.float32)) - np.float32(centre)  # fmt: skip
        near = np.abs(away) < 4 * reach
        bend = away[near] / np.float32(reach)
        light[near] *= 1 - CREASE * np.exp(-(bend**2)) * (0.5 + 0.5 * np.tanh(bend)) + 0.1 * np.exp(-((bend + 1) ** 2))
    return _levels(page * light[..., None])


def turned(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turned about its middle; where no paper is, the grey of a table."""
    grey = (int(rng.integers(0, 256)),) * 3
    angle = rng.uniform(-DEGREES, DEGREES)
    return np.asarray(Image.fromarray(page).rotate(angle, Image.Resampling.BILINEAR, fillcolor=grey))


def blurred(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Out of focus, sigma up to 1.5 pixels."""
    return blur(page, BLUR_SIGMA * (1 - rng.random()))


def noisy(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The noise of a sensor: normal, of each pixel and colour."""
    return _levels(page + rng.uniform(1, NOISE) * rng.standard_normal(page.shape, np.float32))


def compressed(page: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Kept as a JPEG."""
    kept = io.BytesIO()
    Image.fromarray(page).save(kept, "JPEG", quality=int(rng.integers(*JPEG)))
    return np.asarray(Image.open(kept))


def _levels(values: np.ndarray) -> np.ndarray:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


CHANGES: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...] = (
    recoloured, written_on, wrinkled, creased, turned, blurred, noisy, compressed,
)  # fmt: skip
