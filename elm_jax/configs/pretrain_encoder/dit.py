"""DiT: a diffusion transformer that generates ECGs by a rectified flow, with Muon and an average of its weights.

    python -m elm_jax.train --config configs/pretrain_encoder/dit.py
    python -m elm_jax.evaluate --checkpoint runs/dit --config.eval.ema=true

Of DDPM: --config.encoder.config="{'loss_type': 'ddpm'}"; for labels or a lead: "{'condition': 'label'}". For reports:
--config.encoder.name=dit_text --config.ssl.text=ncbi/MedCPT-Query-Encoder
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    config = _recipe.pretraining("dit")
    config.data.max_len = 128  # tokens of a report
    config.optim.name, config.optim.lr, config.optim.weight_decay = "muon", 1e-3, 3.2e-2
    config.optim.beta2, config.optim.ema = 0.999, 0.999
    config.train.batch_size = 512
    return config
