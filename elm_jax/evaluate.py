"""Evaluate a run: answers, scores, controls, a report.

    python -m elm_jax.evaluate --checkpoint runs/demo
    python -m elm_jax.evaluate --config configs/demo.py --config.workdir=runs/demo
    python -m elm_jax.evaluate --checkpoint runs/demo --split train --config.eval.limit=200

--checkpoint W: the run's folder; --step latest, best (default) or a number; --split train, val or test.
--config.eval.* say how; they default to the run's own. Results are in W/eval/<datasets>-<split>/: metrics.json,
predictions.jsonl, report.html. Stopped and started again, an evaluation goes on where it was.

Of an encoder that was pretrained alone there are no answers: it rebuilds ECGs, makes them (dit) or continues them
(next_token), which are measured and drawn there, in one process; --config.eval.guidance, eval.ema, eval.limit say how.
"""

import sys
from collections.abc import Sequence

from elm_jax import cli


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, evaluate the run."""
    parser = cli.Parser("evaluate", description=__doc__)
    parser.add_argument("--checkpoint", metavar="W", help="the run's folder")
    parser.add_argument("--step", default="best", help="latest, best or a number")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="train, val or test")
    flags, options = parser.read(argv)
    from elm_jax.evaluation.evaluator import evaluate
    from elm_jax.evaluation.redrawing import redraw_split
    from elm_jax.objectives import objective_of
    from elm_jax.run.config import config_of_run
    from elm_jax.runtime import distributed
    from elm_jax.runtime.compilation import keep_compiled

    with distributed.joined():
        keep_compiled()
        config = config_of_run(options.checkpoint, flags)
        of_text = "llm" in objective_of(config).needs
        (evaluate if of_text else redraw_split)(config, options.split, options.step)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
