"""A masked-lead autoencoder (MLAE), pooled to 12 signal tokens, and an MLP connector on ECG-QA.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "mlp_llava"
    config.encoder.name = "mlae"
    config.encoder.tokens = 12
    return config
