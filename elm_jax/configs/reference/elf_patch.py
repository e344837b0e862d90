"""No encoder: patches of the signal, as the reference's README trains it.

The command names no number of patches, so it is one: more with --config.encoder.tokens.
"""

from ml_collections import ConfigDict

from elm_jax.configs import elf_patch
from elm_jax.configs.reference._recipe import applied


def get_config() -> ConfigDict:
    return applied(elf_patch.get_config())
