"""Every key at its default: where other configs begin."""

from ml_collections import ConfigDict

from elm_jax.config import default_config


def get_config() -> ConfigDict:
    return default_config()
