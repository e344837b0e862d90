"""No encoder: the whole signal, flattened, through one linear layer into one signal token (ECG-QA)."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.elf("base_elf")
