"""The images of ECGs that a model is shown: drawn, or given as files."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from elm_jax.data.batch import ArraySpec, Layout
from elm_jax.ecg import rasterize
from elm_jax.ecg.images import Processing
from elm_jax.ecg.rasterize import DPI, check_layout
from elm_jax.ecg.tiles import count
from elm_jax.errors import UserError, refused
from elm_jax.folders import read_regular

IMAGES = (".png", ".jpg", ".jpeg")
MOST_BYTES, MOST_PIXELS = 2**28, 10**8
NOTHING = ("noise", "flatline")  # paths that stand for no recording


class Read(NamedTuple):
    """What is at a path: leads (C, L) and their names, of an image alone None and none, and the image (H, W, 3) uint8
    that was given of it."""

    path: str
    leads: np.ndarray | None
    names: tuple[str, ...]
    image: np.ndarray | None

    @property
    def unreal(self) -> bool:
        """Whether it is noise or nothing, which stands for an ECG."""
        return self.path in NOTHING


@dataclass(frozen=True)
class Paper:
    """How an ECG is drawn: `layout` and the leads for the `rhythm` as `rasterize.draw` has them; `worn`: in training as
    if it had been used (`wear.worn`). folder: of images in place of drawn ones, by the names of the recordings."""

    layout: str = "12x1"
    rhythm: tuple[str, ...] = ()
    worn: bool = False
    folder: str | None = None

    def draw(self, leads: np.ndarray, rate: float, names: tuple[str, ...], dpi: float) -> np.ndarray:
        """Leads (C, L) in mV as a page (H, W, 3) uint8."""
        return rasterize.draw(leads, rate, names, dpi, layout=self.layout, rhythm=self.rhythm)

    def size(self, names: tuple[str, ...], seconds: float, dpi: float = DPI) -> tuple[int, int]:
        """(H, W) of a page. Raises UserError where these leads fill none."""
        check_layout(names, self.layout, self.rhythm)
        return rasterize.page_size(len(names), seconds, dpi, self.layout, len(self.rhythm))

    def image_of(self, path: str) -> str | None:
        """The image in the folder that is called as the recording at `path`, with or without its ending."""
        if self.folder is None:
            return None
        whole = os.path.join(self.folder, path)
        stems = dict.fromkeys((whole, os.path.splitext(whole)[0]))
        return next((file for stem in stems for end in IMAGES if os.path.isfile(file := f"{stem}{end}")), None)


def image_layout(processing: Processing) -> Layout:
    """Of what `images.process` returns."""
    if processing.patch is None:
        assert processing.size is not None
        if not processing.grids:
            return ArraySpec((*processing.size, 3), np.uint8)
        assert processing.page is not None
        return ArraySpec((count(processing.page, processing.size[0], processing.grids), *processing.size, 3), np.uint8)
    patches, width = processing.max_patches, 3 * processing.patch**2
    return {
        "patches": ArraySpec((patches, width), np.uint8),
        "mask": ArraySpec((patches,), np.bool_),
        "shape": ArraySpec((2,), np.int32),
    }


def is_image(path: str) -> bool:
    """Whether an `ecg_path` names an image of an ECG, of which there is no signal."""
    return path.lower().endswith(IMAGES)


def read_image(file: str) -> np.ndarray:
    """A PNG or JPEG: (H, W, 3) uint8; what is transparent is white.

    Raises:
        UserError: it cannot be read, or has more than MOST_PIXELS.
    """
    expected, fix = "a PNG or JPEG image", "save it as one, or leave it out"
    held = read_regular(Path(file), expected, fix, MOST_BYTES)
    errors = OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning
    with refused(file, "", expected, fix, *errors), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = Image.open(io.BytesIO(held), formats=("PNG", "JPEG"))
        if picture.width * picture.height > MOST_PIXELS:
            raise UserError(file, f"{picture.width} x {picture.height} pixels", f"at most {MOST_PIXELS}", "shrink it")
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            clear = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        return np.asarray(picture.convert("RGB"))
