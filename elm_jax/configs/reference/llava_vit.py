"""ViT on the stacked signal and an MLP connector, as the reference's README trains it."""

from ml_collections import ConfigDict

from elm_jax.configs import llava_vit
from elm_jax.configs.reference import recipe


def get_config() -> ConfigDict:
    return recipe.applied(llava_vit.get_config())
