"""CLIP on the ECG drawn on paper and an MLP connector, as the reference's README trains it."""

from ml_collections import ConfigDict

from elm_jax.configs import llava_clip
from elm_jax.configs.reference._recipe import applied


def get_config() -> ConfigDict:
    return applied(llava_clip.get_config())
