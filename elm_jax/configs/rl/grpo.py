"""GRPO, with the settings of configs/rl/sapo.py otherwise.

python -m elm_jax.train --config configs/rl/grpo.py --config.init_from=RUN
"""

from ml_collections import ConfigDict

from elm_jax.configs.rl import sapo


def get_config() -> ConfigDict:
    config = sapo.get_config()
    config.objective = "grpo"
    return config
