"""ECG-Byte tokenizers: learn one from recordings, encode with it, look into it, convert its file.

  python -m elm_jax.ecg_byte train records500 --num-merges 5000 --out tok.json
  python -m elm_jax.ecg_byte encode tok.json records500/00000/00001_hr.hea
  python -m elm_jax.ecg_byte inspect tok.json records500/00000 --out pictures
  python -m elm_jax.ecg_byte convert theirs.pkl tok.json

Recordings are .npy files and WFDB records, folders of them, or .txt files that list them. Of each the first
segment is taken. A model takes the tokenizer as data.ecg_tokenizer.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elm_jax import cli
from elm_jax.errors import UserError
from elm_jax.folders import write_atomic
from elm_jax.symbols import training
from elm_jax.symbols.coder import METHODS, EcgByte, cores
from elm_jax.symbols.corpus import Form, Reader, find_recordings
from elm_jax.symbols.report import encode, in_words

_LEAST = {"num_merges": 1, "records": 1, "threads": 1, "seed": 0, "pictures": 0}
_INTERRUPTED = 130
_SAMPLE = """any of them, or equally many of every kind (reads all first, and holds 24 numbers for each lead of each
recording); default: random"""


def main(argv: Sequence[str]) -> int | None:
    """Parse the arguments and do what they ask; 130 where Ctrl-C ended the learning."""
    args = _parser().parse_args(argv)
    for name, least in _LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}", f"{value}", f"{least} or more", "raise it")
    if not 0 <= getattr(args, "max_bad_records", 0) < 1:
        raise UserError("--max-bad-records", f"{args.max_bad_records:g}", "at least 0 and below 1", "correct it")
    return args.do(args)


def _parser() -> cli.Parser:
    parser = cli.Parser("ecg_byte", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    train = tasks.add_parser("train", help="learn merges from recordings")
    train.add_argument("--num-merges", type=int, default=5000)
    train.add_argument("--records", type=int, help=f"how many recordings; default: all, up to {training.MOST_RECORDS}")
    train.add_argument("--sample", choices=training.KINDS, default="random", help=_SAMPLE)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--across-records", action="store_true", help="let a merge reach into the next recording")
    train.add_argument("--out", type=Path, required=True, help="the tokenizer: .json, or .pkl without settings")
    train.set_defaults(do=_train)
    encoding = tasks.add_parser("encode", help="ids of recordings as JSON lines")
    inspect = tasks.add_parser("inspect", help="pictures of a tokenizer, and of what its tokens cover")
    for task in (encoding, inspect):
        task.add_argument("tokenizer", type=Path, metavar="TOK", help=".json, or the reference's .pkl")
        task.add_argument("--method", choices=METHODS, default="longest", help="longest match, or merges in order")
    encoding.add_argument("--out", type=Path, help="file of the lines; default: standard output")
    encoding.set_defaults(do=_encode)
    inspect.add_argument("--pictures", type=int, default=8, help="recordings that are drawn, at most")
    inspect.add_argument("--out", type=Path, required=True, help="folder for the pictures and summary.json")
    inspect.set_defaults(do=_inspect)
    for task, many in ((train, "+"), (encoding, "+"), (inspect, "*")):
        task.add_argument("recordings", type=Path, nargs=many, metavar="RECORDING", help="file, folder or .txt list")
        told = "" if task is train else ", or what the tokenizer was trained on"
        task.add_argument("--sampling-rate", type=float, help=f"Hz after resampling; default: 250{told}")
        task.add_argument("--segment-len", type=int, help=f"samples of a segment; default: 2500{told}")
        task.add_argument("--leads", help=f"names, separated by commas; default: all twelve{told}")
        task.add_argument("--threads", type=int, default=cores(), help="default: all cores")
        task.add_argument("--max-bad-records", type=float, default=0.01, help="part that may be unreadable")
    convert = tasks.add_parser("convert", help="from .pkl to .json, or back")
    convert.add_argument("source", type=Path, metavar="IN")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.set_defaults(do=_convert)
    return parser


def _train(args: Namespace) -> int:
    plan = training.Plan(args.num_merges, args.records, args.sample, args.seed, args.across_records)
    training.check_place(args.out)
    paths, reader = _recordings(args, {})
    log = args.out.with_name(f"{args.out.stem}.unreadable.txt")
    try:
        tokenizer, used = training.train(paths, plan, reader, print)
    finally:
        reader.log(log)
    tokenizer.save(args.out)
    if reader.unreadable:
        print(f"unreadable: {len(reader.unreadable)} recordings, named in {log}")
    interrupted = "interrupted_of" in tokenizer.settings
    print(f"merges: {len(tokenizer.merges)}{f' of {plan.num_merges}, interrupted' if interrupted else ''}")
    print(f"written: {args.out}{_loss(tokenizer, args.out)}")
    if not interrupted:
        print(*in_words(training.measure(tokenizer, used, reader)), sep="\n")
    return _INTERRUPTED if interrupted else 0


def _encode(args: Namespace) -> None:
    tokenizer = EcgByte.load(args.tokenizer)
    paths, reader = _recordings(args, tokenizer.settings)
    encoded = reader.each(paths, lambda signal: encode(tokenizer, signal, args.method).describe(), "encoding")
    lines = (json.dumps({"path": str(path), "method": args.method, **one}) + "\n" for path, one in encoded)
    if args.out:
        write_atomic(args.out, lambda file: file.writelines(line.encode() for line in lines))
    else:
        sys.stdout.writelines(lines)
    _name_unreadable(reader)


def _inspect(args: Namespace) -> None:
    from elm_jax.symbols.pictures import inspect  # slow to import

    tokenizer = EcgByte.load(args.tokenizer)
    paths, reader = _recordings(args, tokenizer.settings)
    print(json.dumps(inspect(tokenizer, paths, reader, args.out, args.method, args.pictures), indent=1))
    _name_unreadable(reader)


def _convert(args: Namespace) -> None:
    tokenizer = EcgByte.load(args.source)
    training.check_place(args.out)
    tokenizer.save(args.out)
    print(f"written: {args.out}, {len(tokenizer.merges)} merges{_loss(tokenizer, args.out)}")


def _recordings(args: Namespace, settings: dict[str, Any]) -> tuple[list[Path], Reader]:
    """Where the recordings are, and who reads them in the form that flags and then the tokenizer's `settings` say."""
    leads = None if args.leads is None else tuple(args.leads.split(","))
    flags = {"sampling_rate": args.sampling_rate, "segment_len": args.segment_len, "leads": leads}
    told = {name: value for name, value in flags.items() if value is not None}
    stated = {name: value for name, value in settings.items() if name not in told}
    form = replace(Form.of(stated, args.tokenizer) if stated else Form(), **told)
    paths = find_recordings(args.recordings) if args.recordings else []
    return paths, Reader(form, args.max_bad_records, args.threads)


def _loss(tokenizer: EcgByte, out: Path) -> str:
    lost = tokenizer.settings if out.suffix == ".pkl" else ()
    return f" (lost, as a .pkl has no settings: {', '.join(lost)})" if lost else ""


def _name_unreadable(reader: Reader) -> None:
    for error in reader.unreadable.values():
        print(f"warning: left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
