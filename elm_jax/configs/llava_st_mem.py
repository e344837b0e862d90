"""An ST-MEM encoder, pooled to 50 signal tokens, and an MLP connector on ECG-QA.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.llava("st_mem", tokens=50)
