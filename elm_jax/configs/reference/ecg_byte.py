"""ECG-Byte, the ECG as tokens in the text, as the reference's README trains it.

Give the tokenizer with --config.data.ecg_tokenizer: a .json, or the reference's .pkl.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_byte
from elm_jax.configs.reference._recipe import applied


def get_config() -> ConfigDict:
    return applied(ecg_byte.get_config())
