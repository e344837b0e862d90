"""What the experiments that pretrain encoders share: MIMIC-IV-ECG, AdamW, a warm-up in steps.

Not an experiment of its own: it names no objective.
"""

from ml_collections import ConfigDict

from elm_jax.config import default_config


def pretraining(name: str, warmup_steps: int = 10_000) -> ConfigDict:
    """An encoder by itself, by the objective of its name."""
    config = default_config()
    config.objective = config.encoder.name = name
    config.update = ("encoder",)
    config.data.names = ("pretrain-mimic-250-2500",)
    config.data.augment_ecg = True

    config.optim.lr = 3e-4
    config.optim.schedule = "cosine"
    config.optim.beta2 = 0.95
    config.optim.grad_clip = 1.0
    config.optim.warmup_steps = warmup_steps

    config.train.batch_size = 256
    config.train.epochs = 100
    config.train.save_every = config.train.eval_every = 2000
    return config
