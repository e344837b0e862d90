"""Connector and LLM are fine-tuned, as the second of the pipeline's phases in the reference's README: ST-MEM.

Give --config.encoder.checkpoint again: the first phase keeps no copy of what it froze.
"""

from ml_collections import ConfigDict

from elm_jax.configs.reference import llava_st_mem


def get_config() -> ConfigDict:
    config = llava_st_mem.get_config()
    config.init_from = "runs/reference/pretrain_connector"
    config.data.names = ("ecg-qa-mimic-iv-ecg-250-2500", "ecg-instruct-45k-250-2500")
    config.optim.name = "adamw"
    return config
