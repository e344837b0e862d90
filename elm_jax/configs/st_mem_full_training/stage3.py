"""Stage 3 of the full ST-MEM recipe: connector and LLM are fine-tuned on questions and instructions."""

from ml_collections import ConfigDict

from elm_jax.config import default_config
from elm_jax.data.prompts import DEFAULT


def get_config() -> ConfigDict:
    config = default_config()
    config.workdir = "runs/st_mem_full_training/stage3"
    config.init_from = "runs/st_mem_full_training/stage2"
    config.phase = "sft"
    config.elm = "mlp_llava"
    config.update = ("connector", "llm")
    config.llm.name = "qwen2.5-1.5b-instruct"
    config.llm.remat = "full"
    config.encoder.name = "st_mem"
    config.encoder.tokens = 50

    config.data.names = (
        "ecg-qa-ptbxl-250-2500",
        "ecg-qa-mimic-iv-ecg-250-2500",
        "pretrain-mimic-250-2500",
        "ecg-instruct-45k-250-2500",
    )
    config.data.system_prompt = DEFAULT

    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 1e-2
    config.optim.beta2 = 0.95
    config.optim.grad_clip = 1.0
    config.optim.accum_steps = 4
    config.optim.ref_batch = 128
    config.train.batch_size = 128
    config.train.epochs = 3
    return config
