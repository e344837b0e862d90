"""Build a retrieval database of recordings: their features, reports and patients.

    python -m elm_jax.index ptb_xl_records.parquet --root O --out I
    python -m elm_jax.index mimic_iv_records.parquet --root O --out I --splits train,val --signals --workers 8

DATASET is what data.names takes: a table that prepare left, a folder, a name of the hub. Each ECG of a record with one
ECG becomes an entry once, with its report (the column report, a text without a question, or the answer of prepare's
conversations called report) and the record's patient. A second run goes on where the first was stopped; what is
written does not depend on --workers, and no more than a part of the index is in memory. Recordings that cannot be read
are named on stderr and left out.

A run retrieves from it with --config.retrieval.index=I. What is retrieved, and what it is worth: docs/retrieval.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from elm_jax import cli
from elm_jax.config import DataConfig
from elm_jax.errors import UserError, printable
from elm_jax.symbols.coder import cores

_LIMITS = {"sampling_rate": 100_000, "segment_len": 10_000_000, "workers": 512}


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, build, print the counts."""
    parser = cli.Parser("index", description=__doc__)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="tables, folders or dataset names")
    parser.add_argument("--out", type=Path, required=True, metavar="I", help="the folder of the index")
    parser.add_argument("--root", default=".", help="folder that datasets and paths of ECGs are relative to")
    parser.add_argument("--splits", default="train", help="of the datasets: some of train,val,test; default: train")
    parser.add_argument("--fold", type=int, default=1, help="which of a dataset's folds")
    parser.add_argument("--sampling-rate", type=int, default=250, help="Hz after resampling, as data.sampling_rate")
    parser.add_argument("--segment-len", type=int, default=2500, help="samples of an ECG, as data.segment_len")
    parser.add_argument(
        "--signals", action="store_true",
        help="keep the signals too, for the modes signal and combined (48 bytes a sample)",
    )
    parser.add_argument("--workers", type=int, default=cores(), help="processes; the result is the same")
    parser.add_argument("--outside-root", action="store_true", help="ECGs may lie outside --root")
    parser.add_argument("--compat", default="", help="feature_windows: the reference's features; lead_order, ...")
    args = parser.parse_args(argv)
    for name, most in _LIMITS.items():
        value = getattr(args, name)
        if not 1 <= value <= most:
            raise UserError(f"--{name.replace('_', '-')}", str(value), f"1 to {most}", "correct it")
    from elm_jax.retrieval.build import build_index

    data = DataConfig(
        names=tuple(args.datasets), root=args.root, fold=args.fold, sampling_rate=args.sampling_rate,
        segment_len=args.segment_len, outside_root=args.outside_root,
    )  # fmt: skip
    splits, compat = (tuple(filter(None, text.split(","))) for text in (args.splits, args.compat))
    said = build_index(data, args.out, splits, args.signals, args.workers, compat)
    for name in ("entries", "reports", "left_out"):
        print(f"{name}: {said[name]}")
    print(printable(f"the index is in {args.out}"))


if __name__ == "__main__":
    sys.exit(cli.guard(main))
