"""The embedded demo: a small model learns to read synthetic ECGs. No download, no network, no file.

    python -m elm_jax.train --config configs/demo.py

It trains in a few minutes on two CPU cores, evaluates on held-out recordings with controls, and leaves pictures in
runs/demo: plots/loss.png and eval/*/examples.png.
"""

from ml_collections import ConfigDict

from elm_jax.config import default_config
from elm_jax.data.demo import SYSTEM_PROMPT


def get_config() -> ConfigDict:
    config = default_config()
    config.elm = "mlp_llava"
    config.update = ("encoder", "connector", "llm")

    config.llm.name = "demo"
    config.llm.scratch = {"hidden": 96, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 192, "max_len": 128}
    config.llm.compute_dtype = "float32"
    config.llm.remat = "none"
    config.encoder.name = "merl"
    config.encoder.config = {"resnet_type": "resnet18", "width": 12}
    config.encoder.tokens = 1
    config.connector.hidden = 1024  # wide: digits are steps along the rate, and each step needs units that bend there

    config.data.names = ("demo",)
    config.data.system_prompt = SYSTEM_PROMPT
    config.data.sampling_rate = 50
    config.data.segment_len = 500
    config.data.share = "ecg"
    config.data.max_len = 64  # a row holds the questions about one recording

    config.optim.lr = 1.5e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.05
    config.optim.min_lr_ratio = 0.02
    config.optim.grad_clip = 1.0
    config.train.batch_size = 32
    config.train.epochs = 3
    config.train.log_every = 20
    config.train.save_every = 500

    config.eval.at_end = True
    config.eval.batch_size = 128
    config.eval.max_new_tokens = 8
    return config
