"""ECG-Byte: the ECG as tokens in the text (ECG-QA).

Give the tokenizer with --config.data.ecg_tokenizer: a .json, or the reference's .pkl.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "ecg_byte"
    config.update = ("llm",)
    config.data.representation = "symbolic"
    config.data.share = "ecg"
    return config
