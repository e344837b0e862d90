"""SigLIP 2 so400m (NaFlex) on the ECG drawn on paper, one signal token, and an MLP connector on ECG-QA."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.llava("siglip2", checkpoint="google/siglip2-so400m-patch16-naflex", representation="rgb")
