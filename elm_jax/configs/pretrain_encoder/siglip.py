"""SigLIP-ECG: of each ECG with each report it is told whether they belong together; from SigLIP 2's published weights.

    python -m elm_jax.train --config configs/pretrain_encoder/siglip.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("siglip")
    config.encoder.name = "siglip_ecg"
    config.encoder.checkpoint = config.ssl.text = "google/siglip2-base-patch16-naflex"
    config.data.max_len = 64
    config.train.batch_size = 8192
    config.train.epochs = 300
    return config
