"""No encoder: the whole signal, as the reference's README trains it."""

from ml_collections import ConfigDict

from elm_jax.configs import elf_base
from elm_jax.configs.reference._recipe import applied


def get_config() -> ConfigDict:
    return applied(elf_base.get_config())
