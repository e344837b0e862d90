"""Compare runs that answered the same questions: scores side by side, and which differences are more than chance.

    python -m elm_jax.compare runs/a runs/b
    python -m elm_jax.compare runs/a runs/b runs/c --eval ecg_qa-test --out comparison

Each run must have been evaluated: python -m elm_jax.evaluate. Differences are paired by question. p is how often the
two runs' answers, swapped patient by patient, differ as much; * marks those that are significant (p < 0.05) after
Holm's correction for all that is compared, which few patients do not allow. Intervals are a bootstrap over patients.
--out D writes D/compare.json and D/compare.html. METEOR's WordNet and BERTScore's model are those that the runs'
configurations name, where they are on this machine; --wordnet and --bert-model name others.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from elm_jax import cli
from elm_jax.errors import printable
from elm_jax.scoring.protocols import PROTOCOLS


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, compare, print the tables."""
    parser = cli.Parser("compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="W", help="run folders")
    parser.add_argument("--eval", metavar="NAME", help="the evaluation, where the runs have several")
    parser.add_argument("--protocol", default="ours", choices=tuple(PROTOCOLS), help="by which answers are scored")
    parser.add_argument("--wordnet", metavar="D", help="folder of NLTK's data, for METEOR's WordNet")
    parser.add_argument("--bert-model", metavar="NAME", help="model of BERTScore")
    parser.add_argument("--out", type=Path, metavar="D", help="a folder for compare.json and compare.html")
    options = parser.parse_args(argv)
    from elm_jax.evaluation.comparison import check_evaluation, compare, html_of, text_of
    from elm_jax.folders import run_folder, writable_folder

    folders = [run_folder(str(path), "compare") for path in options.runs]
    check_evaluation(folders, options.eval)
    out = None if options.out is None else writable_folder(options.out, "--out")
    result = compare(folders, options.eval, options.protocol, options.wordnet, options.bert_model)
    print(printable(text_of(result), "\n"))
    if out is not None:
        (out / "compare.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (out / "compare.html").write_text(html_of(result), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
