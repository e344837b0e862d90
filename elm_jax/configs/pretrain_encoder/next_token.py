"""Next token: a decoder-only transformer on the ids of ECG-Byte (set --config.data.ecg_tokenizer), with Muon.

    python -m elm_jax.train --config configs/pretrain_encoder/next_token.py --config.data.ecg_tokenizer=ecg_byte.json
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("next_token")
    config.data.representation = "symbolic"
    config.optim.name, config.optim.lr, config.optim.weight_decay = "muon", 1e-2, 5e-2
    config.optim.muon.adamw_lr_ratio = 0.1
    config.optim.ema = 0.999
    config.train.batch_size, config.train.epochs = 128, 15
    return config
