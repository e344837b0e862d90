"""signal2vec: a vector for each id of ECG-Byte, by skip-grams (set --config.data.ecg_tokenizer).

    python -m elm_jax.train --config configs/pretrain_encoder/signal2vec.py --config.data.ecg_tokenizer=ecg_byte.json
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("signal2vec", warmup_steps=0)
    config.data.representation = "symbolic"
    config.data.augment_ecg = False
    # The reference's 2e-3, for a vector as a centre: it moves by its mean and by its difference from that.
    config.optim.lr, config.optim.weight_decay, config.optim.min_lr_ratio = 1e-3, 1e-5, 0.0
    config.train.batch_size, config.train.epochs = 64, 10
    return config
