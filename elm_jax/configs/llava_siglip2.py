"""SigLIP 2 so400m (NaFlex) on the ECG drawn on paper, one signal token, and an MLP connector on ECG-QA."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "mlp_llava"
    config.encoder.name = "siglip2"
    config.encoder.checkpoint = "google/siglip2-so400m-patch16-naflex"
    config.data.representation = "rgb"
    return config
