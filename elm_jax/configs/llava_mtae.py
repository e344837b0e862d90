"""A masked-time autoencoder (MTAE), pooled to 25 signal tokens, and an MLP connector on ECG-QA.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "mlp_llava"
    config.encoder.name = "mtae"
    config.encoder.tokens = 25
    return config
