"""Stage 2 of the full ST-MEM recipe: all parts learn from reports, with Muon."""

from ml_collections import ConfigDict

from elm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.workdir = "runs/st_mem_full_training/stage2"
    config.init_from = "runs/st_mem_full_training/stage1"
    config.phase = "pretrain"
    config.elm = "mlp_llava"
    config.update = ("encoder", "connector", "llm")
    config.llm.name = "qwen2.5-1.5b-instruct"
    config.llm.remat = "full"
    config.encoder.name = "st_mem"
    config.encoder.tokens = 50

    config.data.names = (
        "pretrain-mimic-250-2500",
    )

    config.optim.name = "muon"
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 5e-2
    config.optim.beta2 = 0.95
    config.optim.grad_clip = 1.0
    config.optim.accum_steps = 8
    config.optim.ref_batch = 256
    config.optim.muon.adamw_lr_ratio = 0.1
    config.train.batch_size = 256
    config.train.epochs = 5
    return config
