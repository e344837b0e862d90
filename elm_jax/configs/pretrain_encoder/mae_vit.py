"""MAE-ViT: whole leads are hidden, and rebuilt from the others; each lead is a patch.

    python -m elm_jax.train --config configs/pretrain_encoder/mae_vit.py
"""

from ml_collections import ConfigDict

from elm_jax.configs.pretrain_encoder import _recipe


def get_config() -> ConfigDict:
    return _recipe.pretraining("mae_vit")
