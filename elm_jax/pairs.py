"""Pairs of answers that a model draws itself, judged: what objective dpo learns from.

    python -m elm_jax.pairs --checkpoint runs/qa --out pairs.jsonl --config.rl.rewards="('answer',)"
    python -m elm_jax.pairs --checkpoint runs/qa --out pairs.jsonl --judge FOLDER

Each record's last question is answered twice, as --config.rl.temperature, rl.top_p and rl.max_new_tokens say. The
better answer is chosen by rl.rewards, which know the record's own answer; or with --judge by a Hugging Face model on
this machine, which reads question and answers: a pair-preference model (PairRM-hf) or a reward model. Pairs of which
neither answer is better are left out. --split train (default), val or test; --step latest, best (default) or a number.
Pairs come into FILE.partial as they are drawn: after a stop the same command goes on.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from elm_jax import cli, stopping
from elm_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, draw and judge the answers, write the table."""
    parser = cli.Parser("pairs", description=__doc__)
    parser.add_argument("--checkpoint", metavar="W", required=True, help="the run's folder")
    parser.add_argument("--step", default="best", help="latest, best or a number")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="train, val or test")
    parser.add_argument("--judge", metavar="FOLDER", help="a model that chooses; default: rl.rewards")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the table: a .jsonl file")
    flags, options = parser.read(argv)
    from elm_jax.evaluation.pairs import by_model, by_rewards, draw_pairs
    from elm_jax.folders import writable_folder, write_atomic
    from elm_jax.run.config import config_of_run
    from elm_jax.runtime.compilation import keep_compiled
    from elm_jax.runtime.watchdog import Watchdog
    from elm_jax.weights.judge import PairJudge

    if options.out.suffix != ".jsonl":
        raise UserError("--out", str(options.out), "a file that ends in .jsonl", "give it that ending")
    writable_folder(options.out.parent, "--out")
    keep_compiled()
    config = config_of_run(options.checkpoint, flags)
    margin = by_model(PairJudge(options.judge)) if options.judge else by_rewards(config)
    partial = options.out.with_name(f"{options.out.name}.partial")
    judged = draw_pairs(config, options.split, options.step, margin, partial, options.judge or "rewards")
    with Watchdog(Path(config.workdir), config.train.timeout, config.data.timeout):
        found = sorted(stopping.each(judged, "pair"), key=lambda one: one.record)  # whenever they came
    rows = [json.dumps(one.pair) + "\n" for one in found if one.pair]
    left = Counter(one.left for one in found if one.left)
    if not rows:
        partial.unlink()
        reasons = ", ".join(f"{count} {why}" for why, count in left.items()) or "no record"
        fix = "raise --config.rl.temperature"
        if left["equally good"] * 2 > left.total():
            fix = "take other --config.rl.rewards, with partial credit ('answer', 'jaccard'), or train it more before"
        raise UserError("pairs", f"none: {reasons}", "answers of which one is better", fix)
    write_atomic(options.out, lambda file: file.write("".join(rows).encode()))
    partial.unlink()
    told = "".join(f"; left out {count} {why}" for why, count in sorted(left.items()))
    print(f"{len(rows)} pairs in {options.out}{told}")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
