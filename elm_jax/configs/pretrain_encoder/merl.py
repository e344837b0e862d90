"""MERL: ECG and report find each other, the text tower (MedCPT) frozen.

    python -m elm_jax.train --config configs/pretrain_encoder/merl.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("merl")
    config.ssl.text = "ncbi/MedCPT-Query-Encoder"
    config.data.max_len = 128
    return config
