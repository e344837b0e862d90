"""DPO: of two answers to a question about an ECG the chosen one is made likelier, with LoRA.

    python -m elm_jax.train --config configs/dpo.py --config.init_from=RUN --config.data.names=pairs.jsonl

A record has ecg_path, prompt, chosen and rejected, or rejected beside text (docs/records.md).
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config() -> ConfigDict:
    config = ecg_qa.llava("merl")
    config.objective = "dpo"
    config.update = ("llm",)
    config.llm.lora.rank = 16
    config.optim.lr = 5e-6
    config.dpo.beta = 0.1
    config.train.save_every = config.train.eval_every = 100
    return config
