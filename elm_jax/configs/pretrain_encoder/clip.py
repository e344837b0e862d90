"""CLIP: the ECG's image and its report find each other; from the published weights.

    python -m elm_jax.train --config configs/pretrain_encoder/clip.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("clip", warmup_steps=500)
    config.encoder.checkpoint = config.ssl.text = "openai/clip-vit-base-patch32"
    config.data.representation = "stacked_signal"
    config.data.max_len = 77
    config.train.batch_size = 64
    config.train.epochs = 50
    return config
