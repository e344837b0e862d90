"""MLAE: whole leads are hidden, and rebuilt from the others.

    python -m elm_jax.train --config configs/pretrain_encoder/mlae.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    return _recipe.pretraining("mlae", warmup_steps=40_000)
