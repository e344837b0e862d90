"""What the four stages of the full ST-MEM recipe share: the model, the data of fine-tuning, the ways to train.

Not a stage of its own. The figures are those of 8 GPUs; as in the reference, a row holds one conversation.
"""

from ml_collections import ConfigDict

from elm_jax.config import default_config
from elm_jax.text.prompts import THINK

REPORTS = ("pretrain-mimic-250-2500",)
QUESTIONS = ("ecg-qa-ptbxl-250-2500", "ecg-qa-mimic-iv-ecg-250-2500", *REPORTS, "ecg-instruct-45k-250-2500")


def get_config() -> ConfigDict:
    config = default_config()
    config.elm = "mlp_llava"
    config.llm.name = "qwen2.5-1.5b-instruct"
    config.llm.remat = "full"
    config.encoder.name = "st_mem"
    config.encoder.tokens = 50

    config.data.pack = False
    config.data.system_prompt = THINK  # of all stages; reports alone, of the first two, are learnt without one
    config.optim.beta2 = 0.95
    config.optim.grad_clip = 1.0
    return config


def with_adamw() -> ConfigDict:
    """For connector and LLM: steps of 128 rows."""
    config = get_config()
    config.optim.name = "adamw"
    config.optim.weight_decay = 1e-2
    config.optim.ref_batch = config.train.batch_size = 128
    return config


def with_muon() -> ConfigDict:
    """For all parts: steps of 256 rows."""
    config = get_config()
    config.update = ("encoder", "connector", "llm")
    config.optim.name = "muon"
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 5e-2
    config.optim.accum_steps = 8
    config.optim.ref_batch = config.train.batch_size = 256
    return config
