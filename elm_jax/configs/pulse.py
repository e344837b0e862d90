"""PULSE: an ECG's page in tiles through CLIP ViT-L/14-336, and Vicuna (arXiv 2410.19008).

    python -m elm_jax.train --config configs/pulse.py

Pages are drawn at 3x4 with a rhythm strip, or lie in data.images; they make four tiles and the whole, merged flat, as
its authors trained. A folder of PULSE itself comes in by import_weights.
"""

from ml_collections import ConfigDict

from elm_jax.configs import gem


def get_config() -> ConfigDict:
    config = gem.get_config()
    config.elm = "mlp_llava"
    config.data.representation, config.data.normalize = "rgb", "minmax"
    config.encoders = {}
    config.encoder.name, config.encoder.checkpoint = "clip_patches", "openai/clip-vit-large-patch14-336"
    config.encoder.config = {"layer": -2, "fit": "anyres", "merge": "flat"}
    config.encoder.tokens = 2880  # 576 of each: the whole page, and four tiles
    config.data.names = ("ecg_instruct_pulse.parquet",)
    config.update = ("encoder", "connector", "llm")
    config.train.batch_size, config.train.epochs = 128, 3
    return config
