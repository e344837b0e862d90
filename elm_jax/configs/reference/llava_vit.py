"""ViT on the stacked signal and an MLP connector, as the reference's README trains it."""

from ml_collections import ConfigDict

from elm_jax.configs import llava_vit
from elm_jax.configs.reference._recipe import applied


def get_config() -> ConfigDict:
    return applied(llava_vit.get_config())
