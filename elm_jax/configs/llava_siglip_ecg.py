"""SigLIP-ECG (a SigLIP 2 encoder over patches of the signal), 100 signal tokens, and an MLP connector.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.llava("siglip_ecg", tokens=100)
