r"""ECG-LM (Yang et al. 2025) as we read it: a ResNet-18 for any leads and lengths, an MLP, BioMedGPT-LM-7B with LoRA.

    python -m elm_jax.train --config configs/ecg_lm.py:align --config.data.root=O --config.encoder.checkpoint=E
    python -m elm_jax.train --config configs/ecg_lm.py --config.data.root=O --config.encoder.checkpoint=E \
        --config.init_from=runs/ecg_lm_align

The first fits the connector to a frozen encoder and LLM; the second is instructed, by `prepare ecg_lm` and ECG-QA. What
was not published is ours: docs/ecg_lm.md. Any other Llama: --config.llm.name.
"""

from ml_collections import ConfigDict

from elm_jax.configs import ecg_qa


def get_config(stage: str = "instruct") -> ConfigDict:
    config = ecg_qa.llava("resnet18_any", tokens=8)
    config.llm.name = "biomedgpt-lm-7b"
    config.data.names = ("ecg_lm.parquet",)
    config.data.share = "ecg"  # many questions about a recording: it is encoded once for all of a row
    if stage == "align":
        config.update = ("connector",)
        config.optim.lr = 1e-3
        return config
    config.update = ("encoder", "connector", "llm")
    config.llm.lora.rank = 16
    config.data.names = ("ecg_lm.parquet", "ecg_qa.parquet")
    return config
