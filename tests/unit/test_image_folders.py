"""A vision encoder's folder says how its images are made: taken where ours are made so, else refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from elm_jax.errors import UserError
from elm_jax.models.encoders import ENCODERS
from elm_jax.weights.encoders import read_config

THEIRS = {"clip": CLIPImageProcessorPil, "vit": ViTImageProcessorPil, "siglip2": Siglip2ImageProcessorPil}
CLIP_OLD = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
}  # fmt: skip
VIT_OLD = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
SIGLIP2 = {
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
    "image_processor_type": "Siglip2ImageProcessor", "image_std": [0.5] * 3, "max_num_patches": 256, "patch_size": 16,
    "processor_class": "Siglip2Processor", "resample": 2, "rescale_factor": 0.00392156862745098,
}  # fmt: skip


def read(folder: Path, name: str, told: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return read_config(folder, ENCODERS[name].processing)


@pytest.mark.parametrize("name", THEIRS)
def test_what_transformers_saves_is_taken(name: str, tmp_path: Path) -> None:
    THEIRS[name]().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert read(tmp_path, name, told) == {"hidden_size": 8}


@pytest.mark.parametrize(("name", "told"), [("clip", CLIP_OLD), ("vit", VIT_OLD), ("siglip2", SIGLIP2)])
def test_the_files_that_the_models_were_published_with_are_taken(name: str, told: dict, tmp_path: Path) -> None:
    assert read(tmp_path, name, told) == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("clip", {"image_mean": [0.5] * 3}, r"image_mean: found \[0.5, 0.5, 0.5\]; expected \[0.48"),
        ("clip", {"image_mean": 0.5}, "image_mean: found 0.5; expected"),
        ("vit", {"image_std": [0.2, 0.5, 0.5]}, r"image_std: found \[0.2, 0.5, 0.5\]"),
        ("clip", {"resample": 2}, "resample: found 2; expected 3"),
        ("vit", {"resample": 3}, "resample: found 3; expected 2"),
        ("vit", {"rescale_factor": 1 / 127.5}, "rescale_factor: found 0.0078"),
        ("siglip2", {"max_num_patches": 1024}, "max_num_patches: found 1024; expected 256"),
        ("siglip2", {"do_normalize": False}, "do_normalize: found False; expected True"),
        ("vit", {"do_resize": False}, "do_resize: found False"),
        ("clip", {"do_rescale": False}, "do_rescale: found False"),
    ],
)
def test_images_made_otherwise_are_refused_by_name(name: str, change: dict, said: str, tmp_path: Path) -> None:
    told = {"clip": CLIP_OLD, "vit": VIT_OLD, "siglip2": SIGLIP2}[name]
    with pytest.raises(UserError, match=rf"preprocessor_config.json {said}"):
        read(tmp_path, name, told | change)
