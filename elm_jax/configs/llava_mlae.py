"""A masked-lead autoencoder (MLAE), pooled to 12 signal tokens, and an MLP connector on ECG-QA.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.llava("mlae", tokens=12)
