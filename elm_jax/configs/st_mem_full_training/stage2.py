"""Stage 2 of the full ST-MEM recipe: all parts learn from reports, with Muon.

Give --config.encoder.checkpoint again: stage 1 keeps no copy of what it froze.
"""

from ml_collections import ConfigDict

from elm_jax.configs.st_mem_full_training import recipe


def get_config() -> ConfigDict:
    config = recipe.with_muon()
    config.workdir = "runs/st_mem_full_training/stage2"
    config.init_from = "runs/st_mem_full_training/stage1"
    config.objective = "pretrain"
    config.data.names = recipe.REPORTS

    config.optim.lr = 1e-3
    config.optim.muon.adamw_lr_ratio = 0.1
    config.train.epochs = 5
    return config
