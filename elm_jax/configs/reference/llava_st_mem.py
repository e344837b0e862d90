"""An ST-MEM encoder and an MLP connector, as the reference's README trains it.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs import llava_st_mem
from elm_jax.configs.reference._recipe import applied


def get_config() -> ConfigDict:
    return applied(llava_st_mem.get_config())
