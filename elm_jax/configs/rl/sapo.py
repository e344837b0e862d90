"""SAPO: a model that has been fine-tuned on reasoned answers learns from rewards for their form and for the answer.

    python -m elm_jax.train --config configs/rl/sapo.py --config.init_from=RUN
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa
from elm_jax.text.prompts import THINK


def get_config() -> ConfigDict:
    config = ecg_qa.llava("st_mem", tokens=50)
    config.objective = "sapo"
    config.data.names = ("rl-ecg-r1",)
    config.data.system_prompt = THINK

    config.rl.answers = 8
    config.rl.max_new_tokens = 512
    config.rl.temperature = 0.8
    config.rl.top_p = 0.95

    config.data.max_len = 8192  # a prompt with its eight answers
    config.optim.lr = 1e-6
    config.optim.warmup_ratio = 0.01
    config.train.batch_size = 8
    config.train.save_every = config.train.eval_every = 50
    return config
