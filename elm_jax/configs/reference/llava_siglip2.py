"""SigLIP 2 on the ECG drawn on paper and an MLP connector, as the reference's README trains it."""

from ml_collections import ConfigDict

from elm_jax.configs import llava_siglip2
from elm_jax.configs.reference._recipe import applied


def get_config() -> ConfigDict:
    return applied(llava_siglip2.get_config())
