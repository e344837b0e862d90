"""NEPA: the embedding of each sample is predicted from those before it.

    python -m elm_jax.train --config configs/pretrain_encoder/nepa.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    return _recipe.pretraining("nepa")
