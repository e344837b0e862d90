"""ST-MEM: patches of single leads are hidden, and rebuilt from all others.

    python -m elm_jax.train --config configs/pretrain_encoder/st_mem.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    return _recipe.pretraining("st_mem", warmup_steps=30_000)
