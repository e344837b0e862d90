"""DAPO with the rewards of ECG-R1: form, diagnoses, and key evidence in each step of the reasoning.

    python -m elm_jax.train --config configs/rl/dapo.py --config.init_from=RUN

The solutions of its data have <|answer|> and <|key_diagnostic_evidence|> marks.
"""

from ml_collections import ConfigDict

from elm_jax.configs.rl import sapo


def get_config() -> ConfigDict:
    config = sapo.get_config()
    config.objective = "dapo"
    config.rl.rewards = ("r1_format", "r1_answer", "r1_evidence")
    config.rl.answers = 6
    config.rl.max_new_tokens = 2048
    config.rl.temperature = config.rl.top_p = 1.0
    config.rl.high = 0.3
    config.data.max_len = 16384
    config.optim.accum_steps = 2
    return config
