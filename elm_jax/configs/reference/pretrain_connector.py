"""The connector learns from reports, as the first of the pipeline's phases in the reference's README: ST-MEM.

Give the encoder's weights with --config.encoder.checkpoint.
"""

from ml_collections import ConfigDict

from elm_jax.configs.reference import llava_st_mem


def get_config() -> ConfigDict:
    config = llava_st_mem.get_config()
    config.objective = "pretrain"
    config.update = ("connector",)
    config.data.system_prompt = None
    config.optim.name = "adamw"
    config.optim.lr = 5e-4
    return config
