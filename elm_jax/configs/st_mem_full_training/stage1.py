"""Stage 1 of the full ST-MEM recipe: the connector learns from reports; encoder and LLM stay as they are.

Give the encoder's weights with --config.encoder.checkpoint. The figures are those of 8 GPUs with 8 rows each.
"""

from ml_collections import ConfigDict

from elm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.workdir = "runs/st_mem_full_training/stage1"
    config.phase = "pretrain"
    config.elm = "mlp_llava"
    config.update = ("connector",)
    config.llm.name = "qwen2.5-1.5b-instruct"
    config.llm.remat = "full"
    config.encoder.name = "st_mem"
    config.encoder.tokens = 50

    config.data.names = (
        "pretrain-mimic-250-2500",
    )

    config.optim.name = "adamw"
    config.optim.lr = 5e-4
    config.optim.schedule = "constant"
    config.optim.weight_decay = 1e-2
    config.optim.beta2 = 0.95
    config.optim.grad_clip = 1.0
    config.optim.accum_steps = 2
    config.optim.ref_batch = 128
    config.train.batch_size = 128
    config.train.epochs = 30
    return config
