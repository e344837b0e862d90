"""Stage 1 of the full ST-MEM recipe: the connector learns from reports; encoder and LLM stay as they are.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs.st_mem_full_training import recipe


def get_config() -> ConfigDict:
    config = recipe.with_adamw()
    config.workdir = "runs/st_mem_full_training/stage1"
    config.objective = "pretrain"
    config.update = ("connector",)
    config.data.names = recipe.REPORTS

    config.optim.lr = 5e-4
    config.optim.schedule = "constant"
    config.optim.accum_steps = 2
    config.train.epochs = 30
    return config
