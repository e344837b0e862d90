"""Qwen2.5-1.5B-Instruct and a MERL encoder on ECG-QA (PTB-XL, 250 Hz, 2500 samples).

Trains the connector and the LLM. Give the encoder's weights with --config.encoder.checkpoint, and the folder
that the records' paths are relative to with --config.data.root.
"""

from ml_collections import ConfigDict

from elm_jax.config import default_config

SYSTEM_PROMPT = """\
You are a medical assistant who is expert in electrocardiography and works with text and with ECG signals.
First see what you are given: text, an ECG, or both.
- An ECG shows the heart's electrical activity over time. Consider rate, rhythm, axis, conduction, \
intervals, waveforms and signs of disease.
- With both, answer the question from what the ECG shows, as a cardiac electrophysiologist would.
- Without an ECG, answer as a knowledgeable general assistant.
Be precise and brief, and keep to what was asked."""


def get_config() -> ConfigDict:
    config = default_config()
    config.phase = "sft"
    config.elm = "mlp_llava"
    config.update = ("connector", "llm")

    config.llm.name = "qwen2.5-1.5b-instruct"
    config.encoder.name = "merl"
    config.encoder.tokens = 1

    config.data.names = ("ecg-qa-ptbxl-250-2500",)
    config.data.system_prompt = SYSTEM_PROMPT
    config.data.share = "system"
    config.data.max_len = 2048

    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.optim.grad_clip = 1.0

    config.train.batch_size = 8
    config.train.epochs = 1
    config.train.eval_every = 500
    return config
