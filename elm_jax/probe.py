"""Judge a frozen encoder by what its embeddings tell: linear probes, nearest neighbours, and zero-shot where it was
pretrained against reports; macro AUROC and F1 with intervals.

    python -m elm_jax.probe --checkpoint runs/st_mem --task demo --random
    python -m elm_jax.probe --checkpoint runs/st_mem --task ptbxl_super,ptbxl_rhythm --labels ptb-xl
    python -m elm_jax.probe --config configs/llava_merl.py --config.encoder.checkpoint=merl.pt --labels labels.csv

The encoder is that of a run (an ELM's or one pretrained alone), of an exported folder, or of a file. Tasks:
ptbxl_super, ptbxl_sub, ptbxl_form, ptbxl_rhythm (--labels is PTB-XL's folder); cpsc, csn, georgia (the folder of their
recordings); demo; or a table of yours (.csv, .parquet) with ecg_path; labels, ";" between them, or a column of 0 and 1
for each class; and, where you have them, patient_id, and split or strat_fold. It leaves TASK.json and TASK.md in
W/probe.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from elm_jax import cli
from elm_jax.errors import UserError, printable


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, judge the encoder, print what was found."""
    flags, options = _parser().read(argv)
    fractions = _fractions(options.fractions)
    if options.folds in (1, 2):
        raise UserError("--folds", str(options.folds), "0, or at least 3: to learn from, choose by and judge", "give 5")
    if options.checkpoint is None and flags.path is None:
        raise UserError("--checkpoint", "none", "a run or an exported folder, or --config FILE", "give one of them")
    from elm_jax.evaluation import probe
    from elm_jax.evaluation.encoders import open_encoder
    from elm_jax.folders import check_writable
    from elm_jax.runtime.compilation import keep_compiled

    keep_compiled()
    tasks = probe.read_tasks(options.task.split(","), options.labels, options.root, options.seed)
    prompts = probe.read_prompts(options.prompts)
    encoder = open_encoder(options.checkpoint, flags, options.step)
    out = options.out or encoder.folder / "probe"
    check_writable(out, "--out")
    how = probe.Options(fractions, options.neighbours, options.folds, options.protocol, options.seed, prompts)
    progress = encoder.assembly.config.log.progress
    for text in probe.run_probe(encoder, tasks, how, out, options.random, progress):
        print(printable(text, "\n"))
    print(printable(f"results are in {out}"), file=sys.stderr)


def _parser() -> cli.Parser:
    parser = cli.Parser("probe", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="W", help="a run's folder, or an exported one")
    add("--step", default="best", help="of a run: latest, best or a number")
    add("--task", default="table", metavar="T[,T...]", help="what is told apart; default: the labels of a table")
    add("--labels", metavar="PATH", help="a table, or the folder of a database")
    add("--root", type=Path, metavar="R", help="folder of the recordings; default: where the labels are")
    add("--random", action="store_true", help="judge a random encoder of the same sizes too, as a control")
    add("--fractions", default="1,10,100", metavar="P[,P...]", help="percent of the training recordings")
    add("--neighbours", type=_from(1), default=20, metavar="N", help="nearest recordings that are asked")
    add("--folds", type=_from(0), default=0, metavar="N", help="judge all recordings, in N parts, by what others teach")
    add("--prompts", type=Path, metavar="F", help="zero-shot: JSON of {class: its words, or a list of such}")
    add("--protocol", choices=("ours", "merl"), default="ours", help="merl: train heads and choose thresholds as MERL")
    add("--seed", type=_from(0), default=0, metavar="N", help="of splits, fractions and intervals")
    add("--out", type=Path, metavar="D", help="where to write; default: W/probe")
    return parser


def _from(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
            raise ValueError
        return int(text)

    read.__name__ = f"whole number from {least}"
    return read


def _fractions(text: str) -> tuple[float, ...]:
    parts = text.split(",")
    found = tuple(float(part) for part in parts if re.fullmatch(r"\d{1,3}(\.\d+)?", part))
    if len(found) < len(parts) or not all(0 < fraction <= 100 for fraction in found):
        raise UserError("--fractions", repr(text), "percents above 0 and up to 100, with ',' between", "write 1,10,100")
    return found


if __name__ == "__main__":
    sys.exit(cli.guard(main))
