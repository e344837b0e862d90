"""Images as models take them, against the image processors of transformers, bit by bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from elm_jax.ecg.images import BICUBIC, BILINEAR, CLIP, SIGLIP2, VIT, naflex_shape, process, stacked
from elm_jax.ecg.rasterize import draw
from elm_jax.ecg.synthetic import synthesize

PROCESSING = {"clip": CLIP, "vit": VIT, "siglip2": SIGLIP2}
THEIRS = {"clip": CLIPImageProcessorPil, "vit": ViTImageProcessorPil, "siglip2": Siglip2ImageProcessorPil}
SHAPES = [(12, 2500), (12, 1250), (3, 500), (1, 64), (224, 224), (300, 217), (40, 39), (640, 480)]


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalized(processed, processing):
    """What the encoder makes of `process`: (H', W', 3) or (P, p * p * 3) float32, zero in patches that are none."""
    pixels = processed["patches"] if isinstance(processed, dict) else processed
    by_channel = pixels.reshape(*pixels.shape[:-1], -1, 3)
    scaled = (by_channel.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(processing.mean, np.float32), np.array(processing.std, np.float32)
    values = ((scaled - mean) / std).reshape(pixels.shape)
    return values * processed["mask"][:, None] if isinstance(processed, dict) else values


def assert_equals_theirs(image, name):
    processing = PROCESSING[name]
    expected = THEIRS[name]()(image, input_data_format="channels_last", return_tensors="np")
    ours = process(image, processing)
    values = normalized(ours, processing)
    assert values.dtype == np.float32
    if isinstance(ours, dict):
        assert ours["patches"].dtype == np.uint8 and ours["mask"].dtype == bool and ours["shape"].dtype == np.int32
        np.testing.assert_array_equal(ours["mask"], expected["pixel_attention_mask"][0])
        np.testing.assert_array_equal(ours["shape"], expected["spatial_shapes"][0])
        np.testing.assert_array_equal(values, expected["pixel_values"][0])
        assert not ours["patches"][~ours["mask"]].any()
    else:
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(values, expected["pixel_values"][0].transpose(1, 2, 0))


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_any_shape_equal_transformers(name, shape):
    assert_equals_theirs(random_image(*shape), name)


@pytest.mark.parametrize("name", THEIRS)
def test_a_page_and_a_stacked_signal_equal_transformers(name):
    ecg = synthesize((4, 2), 250.0, 2500)
    assert_equals_theirs(draw(ecg, 250.0, tuple(f"lead {i}" for i in range(12))), name)
    assert_equals_theirs(stacked((ecg - ecg.min()) / (ecg.max() - ecg.min())), name)


@given(st.integers(20, 3000), st.integers(20, 3000), st.sampled_from([14, 16, 32]), st.sampled_from([64, 256, 1024]))
def test_naflex_uses_no_more_patches_than_it_may_and_nearly_all(height, width, patch, most):
    rows, columns = naflex_shape(height, width, patch, most)
    assert rows >= 1 and columns >= 1 and rows * columns <= most
    if max(height, width) < 4 * min(height, width):
        assert rows * columns > 0.6 * most


def test_patches_are_the_image_row_by_row():
    image = random_image(256, 256)
    found = process(image, SIGLIP2)
    assert isinstance(found, dict) and found["shape"].tolist() == [16, 16] and found["mask"].all()
    np.testing.assert_array_equal(found["patches"][17].reshape(16, 16, 3), image[16:32, 16:32])


def test_the_crop_sees_twelve_samples_of_a_stacked_signal_and_whole_sees_all():
    unit = np.zeros((12, 2500))
    unit[:, :1240] = unit[:, 1260:] = 1.0
    image = stacked(unit)
    assert not process(image, CLIP).any()
    whole = CLIP.whole()
    found = process(image, whole)
    assert found.shape == (224, 224, 3) and found.mean() > 240
    np.testing.assert_array_equal(
        normalized(found, whole),
        THEIRS["clip"](size={"height": 224, "width": 224})(image, input_data_format="channels_last")["pixel_values"][0]
        .transpose(1, 2, 0),
    )  # fmt: skip


def test_processing_does_not_change_its_input():
    for name, processing in PROCESSING.items():
        image = random_image(30, 50)
        before = image.copy()
        process(image, processing)
        np.testing.assert_array_equal(image, before, err_msg=name)
        image.flags.writeable = False
        process(image, processing)


# ---- stacked signals


def test_a_stacked_signal_is_cut_not_rounded():
    unit = np.array([[0.0, 0.5, 1.0, 254.999 / 255]])
    image = stacked(unit)
    assert image.shape == (1, 4, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[0], np.repeat([[0], [127], [255], [254]], 3, axis=1))


def test_the_filters_are_those_of_the_published_files():
    assert (BILINEAR, BICUBIC) == (2, 3)
    assert [processing.resample for processing in PROCESSING.values()] == [BICUBIC, BILINEAR, BILINEAR]
