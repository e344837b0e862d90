"""CLIP ViT-B/32 on the ECG drawn on paper, one signal token, and an MLP connector on ECG-QA."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "mlp_llava"
    config.encoder.name = "clip"
    config.encoder.checkpoint = "openai/clip-vit-base-patch32"
    config.data.representation = "rgb"
    return config
