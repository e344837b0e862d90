"""What the experiments on ECG-QA (PTB-XL, 250 Hz, 2500 samples) share: Qwen2.5-1.5B-Instruct, fine-tuned.

Not an experiment of its own: it names no way for the ECG into the model. The records' paths are relative to the folder
--config.data.root.
"""

from ml_collections import ConfigDict

from elm_jax.config import default_config
from elm_jax.text.prompts import DEFAULT


def get_config() -> ConfigDict:
    config = default_config()
    config.objective = "sft"
    config.update = ("connector", "llm")
    config.llm.name = "qwen2.5-1.5b-instruct"

    config.data.names = ("ecg-qa-ptbxl-250-2500",)
    config.data.system_prompt = DEFAULT
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


def llava(
    encoder: str, tokens: int = 1, checkpoint: str | None = None, representation: str = "signal"
) -> ConfigDict:
    """Of these experiments one with an encoder, its `tokens`, and an MLP connector."""
    config = get_config()
    config.elm = "mlp_llava"
    config.encoder.name, config.encoder.tokens, config.encoder.checkpoint = encoder, tokens, checkpoint
    config.data.representation = representation
    return config


def elf(elm: str, tokens: int = 1) -> ConfigDict:
    """Of these experiments one without an encoder: the signal in `tokens` patches."""
    config = get_config()
    config.elm, config.encoder.tokens = elm, tokens
    return config
