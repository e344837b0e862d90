"""ViT: patches of the stacked signal are hidden, and painted from the others; it begins as ImageNet-21k left it.

    python -m elm_jax.train --config configs/pretrain_encoder/vit.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("vit", warmup_steps=500)
    config.data.representation = "stacked_signal"
    config.encoder.checkpoint = "google/vit-base-patch16-224-in21k"
    config.train.batch_size, config.train.epochs = 64, 50
    return config
