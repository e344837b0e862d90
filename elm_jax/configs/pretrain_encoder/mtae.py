"""MTAE: stretches of time are hidden in all leads, and rebuilt.

    python -m elm_jax.train --config configs/pretrain_encoder/mtae.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    return _recipe.pretraining("mtae")
