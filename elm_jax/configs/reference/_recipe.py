"""What the commands in ELM's README (ELM-Research, August 2026) share: its defaults, as keys of ours.

Not an experiment of its own. The figures are those of one GPU with its batch of one conversation. On N of them the
reference takes N conversations a step, at N times the learning rate; --config.train.conversations=N does so here, and
--config.optim.accum_steps=N has each conversation count alike, as it does there, instead of each supervised token. Its
system prompts are files of its own: give one with --config.data.system_prompt=PATH.
"""

from ml_collections import ConfigDict

from elm_jax.text.prompts import DEFAULT


def applied(config: ConfigDict) -> ConfigDict:
    """`config` of an architecture, trained as the reference trains it where a command says nothing else."""
    config.workdir = "runs/reference/<name>"
    config.compat = ("elm-2026-08",)
    config.objective = "sft"
    config.llm.param_dtype = "bfloat16"
    config.llm.remat = "none"
    config.encoder.tokens = 1

    config.data.names = ("pretrain-mimic-250-2500",)
    config.data.system_prompt = DEFAULT
    config.data.val_fraction = 0.0
    config.data.max_len = 2048

    config.optim.name = "adam"
    config.optim.lr = 1e-4
    config.optim.schedule = "constant"
    config.optim.weight_decay = 1e-2
    config.optim.grad_clip = 0.0
    config.optim.ref_batch = 1
    config.train.batch_size = None
    config.train.conversations = 1
    config.train.epochs = 1
    config.train.eval_every = None

    config.eval.protocol = "elm-2026-08"
    # What Qwen2.5-1.5B-Instruct brings along for its answers.
    config.eval.temperature, config.eval.top_p, config.eval.repetition_penalty = 0.7, 0.8, 1.1
    return config
