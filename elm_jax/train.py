"""Train an ECG-language model.

    python -m elm_jax.train --config configs/demo.py
    python -m elm_jax.train --config configs/llava_merl.py --config.data.root=data --config.train.epochs=3

The run's folder is --config.workdir; the same command goes on where it stopped. With eval.at_end the trained
model is then evaluated, and results are in workdir/eval.
"""

from elm_jax import cli
from elm_jax.config import Config


def main(config: Config) -> None:
    """Train, and evaluate if the config says so."""
    from elm_jax.runtime import compilation, distributed, gpu_settings

    gpu_settings.apply()
    with distributed.joined():
        compilation.keep_compiled()
        from elm_jax.training.loop import train

        trained = train(config)
        if config.eval.at_end:
            from elm_jax.evaluation.evaluator import evaluate, is_evaluated

            if trained or not is_evaluated(config, "test"):
                evaluate(config)


main.__doc__ = __doc__

if __name__ == "__main__":
    cli.run(main)
