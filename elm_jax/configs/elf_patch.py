"""No encoder: 50 patches of 50 samples, flattened, through one linear layer (ECG-QA)."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.get_config()
    config.elm = "patch_elf"
    config.encoder.tokens = 50
    return config
