"""ViT-B/16 (ImageNet-21k) on the stacked signal, one signal token, and an MLP connector on ECG-QA."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.llava("vit", checkpoint="google/vit-base-patch16-224-in21k", representation="stacked_signal")
