"""GEM: ECG-CoCa's tower and CLIP ViT-L/14-336 behind one projector, and Vicuna, on grounded answers (arXiv 2503.06073).

    python -m elm_jax.train --config configs/gem.py --config.encoder.checkpoint=cpt_wfep_epoch_20.pt

The settings are those of its authors, on 128 rows in a micro-batch; data.images is the folder of their images, where
pages are not to be drawn. As there, CLIP sees the middle square of a page. A folder of GEM itself comes in by
import_weights.
"""

from ml_collections import ConfigDict

from elm_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.elm = "gem"
    config.llm.name = "vicuna-7b-v1.5"
    config.llm.chat = "llava_v1"
    config.llm.remat = "full"
    config.encoder.name, config.encoder.tokens = "ecg_coca", 101
    vision = {"name": "clip_patches", "checkpoint": "openai/clip-vit-large-patch14-336", "tokens": 576}
    config.encoders = {"image": {**vision, "config": {"layer": -2, "fit": "crop"}}}
    config.data.names = ("ecg_grounding.parquet", "ecg_instruct_pulse.parquet")
    config.data.normalize, config.data.sampling_rate, config.data.segment_len = "none", 500, 5000
    config.data.image_layout, config.data.image_rhythm = "3x4", ("II",)
    config.data.max_len = 4096
    config.optim.lr, config.optim.beta2, config.optim.weight_decay = 2e-5, 0.999, 0.0
    config.optim.schedule, config.optim.warmup_ratio, config.optim.min_lr_ratio = "cosine", 0.03, 0.0
    config.optim.grad_clip, config.optim.accum_steps = 1.0, 2
    config.train.batch_size = 256
    config.eval.max_new_tokens = 1024
    return config
