"""ECG-CoCa: ECG and report find each other, and the report is written from the ECG, in mV at 500 Hz.

    python -m elm_jax.train --config configs/pretrain_encoder/coca.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("coca")
    config.encoder.name = "ecg_coca"
    config.ssl.text = "ncbi/MedCPT-Query-Encoder"
    config.data.normalize = "none"
    config.data.sampling_rate = 500
    config.data.segment_len = 5000
    config.data.max_len = 76
    config.optim.lr = 1e-4
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 0.5
    config.train.batch_size = 768
    config.train.epochs = 20
    return config
