"""Images for the vision encoders: from a signal or a drawn page to the pixels or patches that a model takes.

Resizing happens here, on the host, and gives uint8. Rescaling and normalising are one multiplication and one
addition and happen in the encoder, on the device, so that a batch crosses to it at a quarter of the size.
The rules and their numbers are those of the models' published preprocessor_config.json; the arithmetic equals
the image processors of Hugging Face transformers with Pillow, bit by bit.

Dimension letters: C leads, L samples, H x W pixels, P patches, p pixels a side of a patch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from elm_jax.errors import UserError, nearest

BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
Patches = dict[str, np.ndarray]


@dataclass(frozen=True)
class Processing:
    """How a model wants its images.

    With `patch`, the image is resized to at most `max_patches` patches of its own shape (NaFlex). Otherwise it
    becomes `size` (H', W'): stretched, or with `shortest_edge` resized to that edge and cropped at the centre.
    mean and std are of pixels times `rescale`, one for each channel; `resample` is Pillow's number of a filter.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int
    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    patch: int | None = None
    max_patches: int = 256
    rescale: float = 1 / 255

    @staticmethod
    def from_hf(config: Mapping[str, Any], where: str = "preprocessor_config.json") -> "Processing":
        """What a model folder's preprocessor_config.json says; UserError (`where`) for what is not known here."""
        return _from_hf(config, where)

    def whole(self) -> "Processing":
        """The same without the crop: the image is stretched to `size`, and all of it is seen.

        CLIP's crop sees the middle 12 samples of a stacked signal of 2500, and of a page the middle 60 percent.
        """
        return replace(self, shortest_edge=None)


_HALF = (0.5, 0.5, 0.5)
PROCESSING: dict[str, Processing] = {
    "clip": Processing(
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resample=BICUBIC,
        size=(224, 224),
        shortest_edge=224,
    ),
    "vit": Processing(_HALF, _HALF, BILINEAR, size=(224, 224)),
    "siglip2": Processing(_HALF, _HALF, BILINEAR, patch=16, max_patches=256),
}


def stacked(unit: np.ndarray) -> np.ndarray:
    """A normalised signal (C, L) in [0, 1] as an image: (C, L, 3) uint8, three times its values times 255, cut."""
    grey = (unit * 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def process(image: np.ndarray, processing: Processing) -> np.ndarray | Patches:
    """An image (H, W, 3) uint8 as its model takes it, before rescaling and normalising.

    Returns (H', W', 3) uint8, or for NaFlex {"patches": uint8 (P, p * p * 3), "mask": bool (P,), "shape": int32
    (2,)}: P = max_patches rows, of which the first shape[0] * shape[1] are patches, row by row; each is
    flattened (p, p, 3).
    """
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8, (image.shape, image.dtype)
    if processing.patch is not None:
        return _patches(image, processing.patch, processing.max_patches, processing.resample)
    assert processing.size is not None
    if processing.shortest_edge is None:
        return np.asarray(_resized(Image.fromarray(image), *processing.size, processing.resample))
    return _resized_and_cropped(image, processing.shortest_edge, processing.size, processing.resample)


def normalized(processed: np.ndarray | Patches, processing: Processing) -> np.ndarray:
    """What the encoder makes of `process`: (H', W', 3) or (P, p * p * 3) float32, zero in patches that are none."""
    pixels = processed["patches"] if isinstance(processed, dict) else processed
    by_channel = pixels.reshape(*pixels.shape[:-1], -1, 3)
    scaled = (by_channel.astype(np.float64) * processing.rescale).astype(np.float32)
    mean, std = np.array(processing.mean, np.float32), np.array(processing.std, np.float32)
    values = ((scaled - mean) / std).reshape(pixels.shape)
    return values * processed["mask"][:, None] if isinstance(processed, dict) else values


# --- resizing ------------------------------------------------------------------------------------------------


def _resized(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling(resample))


def _resized_and_cropped(image: np.ndarray, edge: int, size: tuple[int, int], resample: int) -> np.ndarray:
    """Resized so that the shorter side is `edge`, then the middle `size` of it.

    Pillow resizes rows first, then columns, each to whole numbers. Cropping in between gives the same pixels,
    and does not make a picture of 224 x 46666 of 12 x 2500 first.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    new_height, new_width = int(edge * height / short), int(edge * width / short)
    top, left = (new_height - size[0]) // 2, (new_width - size[1]) // 2
    wide = _resized(Image.fromarray(image), height, new_width, resample).crop((left, 0, left + size[1], height))
    return np.asarray(_resized(wide, new_height, size[1], resample))[top : top + size[0]]


def _patches(image: np.ndarray, patch: int, most: int, resample: int) -> Patches:
    height, width = image.shape[:2]
    rows, columns = naflex_shape(height, width, patch, most)
    pixels = np.asarray(_resized(Image.fromarray(image), rows * patch, columns * patch, resample))
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


# --- preprocessor_config.json --------------------------------------------------------------------------------

_KINDS = {"CLIP": "clip", "ViT": "vit", "Siglip2": "siglip2"}
_TYPE_KEYS = ("image_processor_type", "feature_extractor_type")
_NO_EFFECT = {*_TYPE_KEYS, "processor_class", "do_convert_rgb", "data_format", "default_to_square"}
_VALUES = {
    "image_mean",
    "image_std",
    "resample",
    "size",
    "crop_size",
    "patch_size",
    "max_num_patches",
    "rescale_factor",
}


def _from_hf(config: Mapping[str, Any], where: str) -> Processing:
    told = {key: value for key, value in config.items() if value is not None}
    kind = _kind(told, where)
    fixed = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False}
    fixed["do_center_crop"] = kind == "clip"
    for key, value in told.items():
        if key not in _NO_EFFECT | _VALUES | fixed.keys():
            hint = nearest(key, _VALUES | fixed.keys()) or "remove it if it changes nothing"
            raise UserError(where, f"the key {key}", "keys of an image processor", hint)
        if key in fixed and value != fixed[key]:
            raise UserError(where, f"{key} = {value}", str(fixed[key]), "use a folder of a model that we have")
    default = PROCESSING[kind]
    processing = replace(
        default,
        mean=_three(told.get("image_mean", default.mean), where, "image_mean"),
        std=_three(told.get("image_std", default.std), where, "image_std"),
        resample=_one_of(told.get("resample", default.resample), range(6), where, "resample"),
        rescale=_positive(told.get("rescale_factor", default.rescale), where, "rescale_factor", (int, float)),
    )
    if kind == "siglip2":
        patch = _positive(told.get("patch_size", default.patch), where, "patch_size")
        most = _positive(told.get("max_num_patches", default.max_patches), where, "max_num_patches")
        return replace(processing, patch=patch, max_patches=most)
    return _with_size(processing, told, where)


def _with_size(processing: Processing, told: Mapping[str, Any], where: str) -> Processing:
    size, crops = told.get("size"), processing.shortest_edge is not None
    if isinstance(size, int):  # as older files have it
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    crop = told.get("crop_size") if crops else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    shape = _height_width(crop, where, "crop_size") if crop is not None else processing.size
    if size is None:
        return replace(processing, size=shape)
    if crops and isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        edge = _positive(size["shortest_edge"], where, "size.shortest_edge")
        assert shape is not None
        if edge < max(shape):
            raise UserError(where, f"a crop {shape} of an edge of {edge}", "a crop within the image", "correct size")
        return replace(processing, size=shape, shortest_edge=edge)
    stretched = _height_width(size, where, "size")
    if crops and stretched != shape:
        raise UserError(where, f"size {stretched} and crop_size {shape}", "the same", "give a shortest_edge")
    return replace(processing, size=stretched, shortest_edge=None)


def _kind(told: Mapping[str, Any], where: str) -> str:
    name = next((str(told[key]) for key in _TYPE_KEYS if key in told), "no image_processor_type")
    stem = name.removesuffix("Fast").removesuffix("Pil")
    stem = stem.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if stem not in _KINDS:
        expected = ", ".join(f"{kind}ImageProcessor" for kind in _KINDS)
        raise UserError(where, name, expected, "use a folder of one of these models")
    return _KINDS[stem]


def _three(value: Any, where: str, key: str) -> tuple[float, float, float]:
    if not (isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)):
        raise UserError(where, f"{key} = {value}", "three numbers", "correct it")
    return float(value[0]), float(value[1]), float(value[2])


def _one_of(value: Any, choices: range, where: str, key: str) -> int:
    if not isinstance(value, int) or value not in choices:
        raise UserError(where, f"{key} = {value}", f"one of {', '.join(map(str, choices))}", "correct it")
    return value


def _positive(value: Any, where: str, key: str, kinds: type | tuple[type, ...] = int) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        raise UserError(where, f"{key} = {value}", "a positive number", "correct it")
    return value


def _height_width(value: Any, where: str, key: str) -> tuple[int, int]:
    if not (isinstance(value, Mapping) and set(value) == {"height", "width"}):
        raise UserError(where, f"{key} = {value}", "height and width", "correct it")
    return _positive(value["height"], where, f"{key}.height"), _positive(value["width"], where, f"{key}.width")
