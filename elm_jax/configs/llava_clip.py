"""CLIP ViT-B/32 on the ECG drawn on paper, one signal token, and an MLP connector on ECG-QA."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.llava("clip", checkpoint="openai/clip-vit-base-patch32", representation="rgb")
