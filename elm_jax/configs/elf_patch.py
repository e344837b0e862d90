"""No encoder: 50 patches of 50 samples, flattened, through one linear layer (ECG-QA)."""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    return ecg_qa.elf("patch_elf", tokens=50)
