"""Stage 4 of the full ST-MEM recipe: all parts are fine-tuned, with Muon, on grounded and reasoned answers too."""

from ml_collections import ConfigDict

from elm_jax.config import default_config
from elm_jax.data.prompts import THINK


def get_config() -> ConfigDict:
    config = default_config()
    config.workdir = "runs/st_mem_full_training/stage4"
    config.init_from = "runs/st_mem_full_training/stage3"
    config.phase = "sft"
    config.elm = "mlp_llava"
    config.update = ("encoder", "connector", "llm")
    config.llm.name = "qwen2.5-1.5b-instruct"
    config.llm.remat = "full"
    config.encoder.name = "st_mem"
    config.encoder.tokens = 50

    config.data.names = (
        "ecg-qa-ptbxl-250-2500",
        "ecg-qa-mimic-iv-ecg-250-2500",
        "pretrain-mimic-250-2500",
        "ecg-instruct-45k-250-2500",
        "ecg-grounding-250-2500",
        "ecg-qa-cot",
        "base-ecg-r1",
        "ecg-instruct-ecg-r1",
    )
    config.data.system_prompt = THINK

    config.optim.name = "muon"
    config.optim.lr = 2e-4
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 5e-2
    config.optim.beta2 = 0.95
    config.optim.grad_clip = 1.0
    config.optim.accum_steps = 8
    config.optim.ref_batch = 256
    config.optim.muon.adamw_lr_ratio = 0.05
    config.train.batch_size = 256
    config.train.epochs = 3
    return config
