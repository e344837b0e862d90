"""Stage 4 of the full ST-MEM recipe: all parts are fine-tuned, with Muon, on grounded and reasoned answers too."""

from ml_collections import ConfigDict

from elm_jax.configs.st_mem_full_training import recipe


def get_config() -> ConfigDict:
    config = recipe.with_muon()
    config.workdir = "runs/st_mem_full_training/stage4"
    config.init_from = "runs/st_mem_full_training/stage3"
    config.objective = "sft"
    config.data.names = (
        *recipe.QUESTIONS,
        "ecg-grounding-250-2500",
        "ecg-qa-cot",
        "base-ecg-r1",
        "ecg-instruct-ecg-r1",
    )

    config.optim.lr = 2e-4
    config.optim.muon.adamw_lr_ratio = 0.05
    config.train.epochs = 3
    return config
