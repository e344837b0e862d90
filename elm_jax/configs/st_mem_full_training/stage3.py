"""Stage 3 of the full ST-MEM recipe: connector and LLM are fine-tuned on questions and instructions."""

from ml_collections import ConfigDict

from elm_jax.configs.st_mem_full_training import recipe


def get_config() -> ConfigDict:
    config = recipe.with_adamw()
    config.workdir = "runs/st_mem_full_training/stage3"
    config.init_from = "runs/st_mem_full_training/stage2"
    config.objective = "sft"
    config.update = ("connector", "llm")
    config.data.names = recipe.QUESTIONS

    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.optim.accum_steps = 4
    config.train.epochs = 3
    return config
