"""SigLIP-ECG (a SigLIP 2 encoder over patches of the signal), 100 signal tokens, and an MLP connector.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "mlp_llava"
    config.encoder.name = "siglip_ecg"
    config.encoder.tokens = 100
    return config
