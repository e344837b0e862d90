"""Images for the vision encoders: from a signal or a drawn page to the pixels or patches that a model takes.

Resizing happens here, on the host, and gives uint8. Rescaling and normalising are one multiplication and one
addition and happen in the encoder, on the device, so that a batch crosses to it at a quarter of the size.
The rules and their numbers are those of the models' published preprocessor_config.json; the arithmetic equals
the image processors of Hugging Face transformers with Pillow, bit by bit.

Dimension letters: C leads, L samples, H x W pixels, P patches, p pixels a side of a patch.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from elm_jax.ecg.tiles import on_grid, tiles

BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
Patches = dict[str, np.ndarray]


@dataclass(frozen=True)
class Processing:
    """How a model wants its images.

    With `patch`, the image is resized to at most `max_patches` patches of its own shape (NaFlex). Otherwise it
    becomes `size` (H', W'): stretched, or with `shortest_edge` resized to that edge and cropped at the centre, before
    which it may be `padded` to a square of the mean colour. With `grids` (of heights and widths in pixels) it becomes
    tiles of that size (`tiles.tiles`), as many as one of `page` (H, W), to which other images are brought, white
    around. mean and std are of pixels / 255, one for each channel; `resample` is Pillow's number of a filter.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int
    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    patch: int | None = None
    max_patches: int = 256
    padded: bool = field(default=False, repr=False)  # what is kept by this knows these by the encoder's
    grids: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    page: tuple[int, int] | None = field(default=None, repr=False)

    def whole(self) -> "Processing":
        """The same without the crop: the image is stretched to `size`, and all of it is seen.

        CLIP's crop sees the middle 12 samples of a stacked signal of 2500, and of a page the middle 60 percent.
        """
        return replace(self, shortest_edge=None)


_HALF = (0.5, 0.5, 0.5)
CLIP = Processing(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resample=BICUBIC,
    size=(224, 224),
    shortest_edge=224,
)
VIT = Processing(_HALF, _HALF, BILINEAR, size=(224, 224))
SIGLIP = Processing(_HALF, _HALF, BICUBIC, size=(224, 224))
DINOV2 = Processing(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resample=BICUBIC, size=(224, 224), shortest_edge=256
)
SIGLIP2 = Processing(_HALF, _HALF, BILINEAR, patch=16, max_patches=256)


def stacked(unit: np.ndarray) -> np.ndarray:
    """A normalised signal (C, L) in [0, 1] as an image: (C, L, 3) uint8, three times its values times 255, cut."""
    grey = (unit * 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def process(image: np.ndarray, processing: Processing) -> np.ndarray | Patches:
    """An image (H, W, 3) uint8 as its model takes it, before rescaling and normalising.

    Returns (H', W', 3) uint8, of tiles (1 + n, H', W', 3), or for NaFlex {"patches": uint8 (P, p * p * 3), "mask": bool
    (P,), "shape": int32 (2,)}: P = max_patches rows, of which the first shape[0] * shape[1] are patches, row by row;
    each is flattened (p, p, 3).
    """
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8, (image.shape, image.dtype)
    if processing.patch is not None:
        return _patches(image, processing.patch, processing.max_patches, processing.resample)
    assert processing.size is not None
    if processing.grids:
        assert processing.page is not None
        if image.shape[:2] != processing.page:
            image = on_grid(image, processing.page, processing.resample, 255)
        return tiles(image, processing.size[0], processing.grids, processing.resample)
    if processing.padded:
        side = max(image.shape[:2])
        top, left = ((side - length) // 2 for length in image.shape[:2])
        square = np.full((side, side, 3), [int(255 * level) for level in processing.mean], np.uint8)
        square[top : top + image.shape[0], left : left + image.shape[1]] = image
        image = square
    if processing.shortest_edge is None:
        height, width = processing.size
        return np.asarray(Image.fromarray(image).resize((width, height), processing.resample))
    return _resized_and_cropped(image, processing.shortest_edge, processing.size, processing.resample)


# --- resizing ------------------------------------------------------------------------------------------------


def _resized_and_cropped(image: np.ndarray, edge: int, size: tuple[int, int], resample: int) -> np.ndarray:
    """Resized so that the shorter side is `edge`, then the middle `size` of it.

    Pillow resizes rows first, then columns, each to whole numbers. Cropping in between gives the same pixels,
    and does not make a picture of 224 x 46666 of 12 x 2500 first.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    new_height, new_width = int(edge * height / short), int(edge * width / short)
    top, left = (new_height - size[0]) // 2, (new_width - size[1]) // 2
    wide = Image.fromarray(image).resize((new_width, height), resample).crop((left, 0, left + size[1], height))
    return np.asarray(wide.resize((size[1], new_height), resample))[top : top + size[0]]


def _patches(image: np.ndarray, patch: int, most: int, resample: int) -> Patches:
    height, width = image.shape[:2]
    rows, columns = naflex_shape(height, width, patch, most)
    pixels = np.asarray(Image.fromarray(image).resize((columns * patch, rows * patch), resample))
    by_patch = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    patches = np.zeros((most, patch * patch * 3), np.uint8)
    patches[: rows * columns] = by_patch.reshape(rows * columns, -1)
    return {
        "patches": patches,
        "mask": np.arange(most) < rows * columns,
        "shape": np.array([rows, columns], np.int32),
    }


def naflex_shape(height: int, width: int, patch: int, most: int, precision: float = 1e-5) -> tuple[int, int]:
    """Rows and columns of patches, at most `most` in all, that keep the image's shape as well as may be.

    The largest scale, found by halving an interval to `precision`, at which the image's sides, each rounded up
    to whole patches, need no more patches than that.
    """

    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

    low, high = precision / 10, 100.0
    while high - low >= precision:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return grid(low)
