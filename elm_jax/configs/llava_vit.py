"""ViT-B/16 (ImageNet-21k) on the stacked signal, one signal token, and an MLP connector on ECG-QA."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "mlp_llava"
    config.encoder.name = "vit"
    config.encoder.checkpoint = "google/vit-base-patch16-224-in21k"
    config.data.representation = "stacked_signal"
    return config
