"""In the way of ECG-R1: two towers, a projector for each, Qwen3-8B; either view may be missing. In half of all training
samples one is dropped, in a tenth they stand in the other order; pages look used.

    python -m elm_jax.train --config configs/ecg_r1_style.py --config.encoder.checkpoint=cpt_wfep_epoch_20.pt

ECG-R1 has the towers of Qwen3-VL behind its images; here they are CLIP's.
"""

from ml_collections import ConfigDict

from elm_jax.configs import gem
from elm_jax.text.prompts import THINK


def get_config() -> ConfigDict:
    config = gem.get_config()
    config.elm = "ecg_r1"
    config.llm.name, config.llm.chat = "qwen3-8b", None
    config.encoders.image.config.fit = "whole"  # as Qwen3-VL sees a page
    config.data.names = ("ecg_protocol_cot.parquet", "ecg_instruct_pulse.parquet")
    config.data.system_prompt = THINK
    config.data.drop_views, config.data.swap_views = 0.5, 0.1
    config.data.missing = "mask"
    config.data.augment_paper = True
    config.train.batch_size = 64
    return config
