"""Raw downloads -> records: segments as .npy files or in shards, and tables of conversations with splits.

  python -m elm_jax.prepare ptb_xl --raw R --out O
  python -m elm_jax.prepare ecg_qa --raw Q --records O/ptb_xl/preprocessed_2500 --out O/ecg_qa.parquet
  python -m elm_jax.prepare ecg_instruct_pulse --raw ECGInstruct.json --records O --out O/pulse.parquet
  python -m elm_jax.prepare ecg_lm --raw P --out O --ptbxl-csv R/ptbxl_database.csv
  python -m elm_jax.prepare synthetic --out O --generated 10000
  python -m elm_jax.prepare grounding --out O
  python -m elm_jax.prepare check --out O
  python -m elm_jax.prepare stats O --tokenizer T
  python -m elm_jax.prepare card --out O
  python -m elm_jax.prepare push O OWNER/NAME

Train on the result with data.root=O and data.names naming a table. A second run goes on where the first
stopped. A dataset of your own: docs/add_a_dataset.md.
"""

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import elm_jax
from elm_jax import cli, compat
from elm_jax.data.prepare import DATASETS, ecg_lm, ecg_qa
from elm_jax.data.prepare.card import push, write_card
from elm_jax.data.prepare.check import check_tables
from elm_jax.data.prepare.conversations import CONVERSATIONS, prepare_conversations
from elm_jax.data.prepare.grounding import prepare_grounding
from elm_jax.data.prepare.listed import Columns, content, listed
from elm_jax.data.prepare.output import FORMATS
from elm_jax.data.prepare.profiles import PROFILES
from elm_jax.data.prepare.raw import RawDataset, read_double
from elm_jax.data.prepare.reasoning import NAME as REASONING
from elm_jax.data.prepare.reports import AS_IS, Reports
from elm_jax.data.prepare.runner import prepare_dataset
from elm_jax.data.prepare.stats import table_stats
from elm_jax.data.prepare.synthetic import QUESTIONS, SIGNALS, Wanted, prepare_synthetic, read_wording
from elm_jax.data.prepare.translation import CACHE, Translator
from elm_jax.errors import UserError, printable, refused
from elm_jax.folders import check_picture, claim_folder, leave_folder, write_json
from elm_jax.pictures.page import filled
from elm_jax.symbols.coder import cores
from elm_jax.text.reports import CLEANINGS
from elm_jax.text.vocabulary import load_tokenizer

MOST_WORKERS, MOST_FOLDS = 512, 100
_PLACES = {"--raw": "R", "--out": "O", "--records": "O"}  # what a command is told with
# Of what `check` may find, what to do.
_AMISS = {
    "patients_in_several_splits": "Patients are in several splits: make these tables again with --split patient.",
    "copies_in_several_splits": "Copies are in several splits: of each pair that check_report.json lists take one out "
    "of the folder of --raw, and run the same prepare again: its tables are then without it.",
    "unreadable": "Not all could be looked at: recordings are unreadable, check_report.json says why.",
}


def main(argv: Sequence[str]) -> int:
    """Parse the arguments, prepare, print the counts; 1 where `check` finds a leak or what it cannot read, or `stats`
    none of a table's recordings, else 0."""
    args = _parser().parse_args(argv)
    for flag, most in (("sampling_rate", 100_000), ("assume_rate", 100_000), ("segment_len", 10_000_000)):
        value = getattr(args, flag, None)
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{flag.replace('_', '-')}", f"{value:g}", f"above 0 and at most {most}", "correct it")
    if not 1 <= getattr(args, "workers", 1) <= MOST_WORKERS:
        raise UserError("--workers", str(args.workers), f"1 to {MOST_WORKERS}", "correct it")
    folds = getattr(args, "folds", 0)
    if folds and (not 2 <= folds <= MOST_FOLDS or args.split == "legacy"):
        expected = f"2 to {MOST_FOLDS}, and not --split legacy, which has five"
        raise UserError("--folds", str(folds), expected, "correct it")
    args.made_by = {"dataset": args.dataset, "made_by": f"elm_jax {elm_jax.__version__}", "command": _command(argv)}
    report = args.prepare(args)
    if args.dataset == "stats":
        print(json.dumps(report, indent=2) if args.json else filled("dataset_stats.md", tables=report), end="")
        return int(any(0 < table["recordings"] == table["missing"] for table in report.values()))
    for key, value in report.items():
        if key == "rows" and "tables" in report and not any(value.values()):
            value = "no conversations: nothing to ask or to report"
        print(printable(f"{key}: {_brief(value)}"))
    amiss = [said for key, said in _AMISS.items() if args.dataset == "check" and report[key]]
    print("".join(f"{said}\n" for said in amiss), end="")
    return int(bool(amiss))


def _parser() -> cli.Parser:
    parser = cli.Parser("prepare", description=__doc__)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name, dataset in DATASETS.items():
        own = datasets.add_parser(name, help=_plain(f"{dataset.title}: {dataset.holds}"))
        own.add_argument("--raw", type=Path, required=True, help=_plain(f"folder with {dataset.holds}"))
        own.add_argument("--out", type=Path, required=True, help="folder for the segments and tables")
        own.add_argument("--sampling-rate", type=float, default=250, help="Hz after resampling")
        own.add_argument("--segment-len", type=int, default=2500, help="samples of a segment")
        own.add_argument(
            "--profile", choices=list(PROFILES), default="clean",
            help="clean: low-passed for the new rate, nothing else; elm-2026: a spline and no filter, as the reference "
            "does now; paper-2025: its filters of 2025 before the spline",
        )  # fmt: skip
        own.add_argument(
            "--format", choices=list(FORMATS), default="npy",
            help="npy: the reference's file for each segment; shards: ArrayRecord files of many, 16 bits a sample and "
            "packed, for large datasets; either is trained on by the same names",
        )  # fmt: skip
        own.add_argument("--workers", type=int, default=cores(), help="processes; the result is the same")
        own.add_argument(
            "--split", choices=["official", "patient", "legacy"], default="official",
            help="official: the dataset's own, else by patient; patient: a tenth of the patients each for val and for "
            "test; legacy: the reference's five random splits, by patient",
        )  # fmt: skip
        own.add_argument("--folds", type=int, default=0, help="disjoint folds by patient (0: train, val and test)")
        own.add_argument(
            "--assume-rate", type=float,
            help="Hz of files that state none; without it an array of .npy is at 250 Hz, and others are refused",
        )  # fmt: skip
        own.add_argument(
            "--assume-unit",
            help="of numbers whose file states none, those of .npy files too: mV, uV, V or nV; without it they are "
            "taken as mV, and whole numbers (but of .npy files) refused",
        )  # fmt: skip
        own.add_argument(
            "--compat", default="",
            help="spline_resampling: as --profile elm-2026; published_report_cleaning: --clean-reports with the faults "
            "of its source",
        )  # fmt: skip
        own.add_argument(
            "--report-language", choices=[AS_IS] + ["statements"] * (dataset.named is not None), default=AS_IS,
            help="as-is: reports are kept in the language they were written in (PTB-XL's are mostly German); "
            "statements: the English names of the dataset's coded statements, the likeliest first (PTB-XL)",
        )  # fmt: skip
        own.add_argument(
            "--translator", type=Path,
            help="folder of a Hugging Face model by which reports become English; what it has translated is kept in "
            "OUT/translations.jsonl (needs PyTorch)",
        )  # fmt: skip
        own.add_argument(
            "--translator-prompt", default="",
            help="what it is given, with {report} in it, such as 'translate German to English: {report}'; default: the "
            "report, and a request where it is a causal model",
        )  # fmt: skip
        own.add_argument(
            "--clean-reports", choices=["none", *CLEANINGS], default="none",
            help="merl: lower case, without marks of machines, a full stop behind each statement, none below four "
            "words; ecg_chat: abbreviations in full, without statements about the recording or the machine",
        )  # fmt: skip
        own.add_argument(
            "--wave-text", action="store_true",
            help="behind each report what the machine measured: RR, PR, QRS, QT/QTc in ms (mimic_iv)",
        )  # fmt: skip
        if dataset.takes_table:
            own.add_argument(
                "--table", type=Path,
                help="a .csv or .parquet file of what is known of the recordings: a row for each, by its path or name",
            )  # fmt: skip
            own.add_argument("--path-column", default="path", help="of that table; default: %(default)s")
            own.add_argument(
                "--report-columns", help="one, or its statements; \"\": none; default: report, where it is there"
            )  # fmt: skip
            own.add_argument("--patient-column", help="default: patient_id, where it is there")
        own.set_defaults(prepare=_recordings)
    questions = datasets.add_parser("ecg_qa", help="ECG-QA on prepared PTB-XL")
    ecg_qa.add_arguments(questions)
    _add_shares(questions)
    questions.set_defaults(prepare=lambda args: ecg_qa.prepare_by(args, _table(args)))
    pairs = datasets.add_parser("ecg_lm", help="instruction pairs by rules of guidelines, as ECG-LM learns from")
    ecg_lm.add_arguments(pairs)
    _add_shares(pairs)
    pairs.set_defaults(prepare=lambda args: ecg_lm.prepare_by(args, _table(args)))
    for name, holds in CONVERSATIONS.items():
        own = datasets.add_parser(name, help=holds)
        own.add_argument("--raw", type=Path, required=True, help=holds)
        own.add_argument("--records", type=Path, help="where prepare left recordings; default: the folder of --out")
        own.add_argument("--out", type=Path, required=True, help="the table (.parquet), or a folder for it")
        own.add_argument("--segment-len", type=int, default=2500, help="samples of the segments to use")
        own.add_argument(
            "--split", choices=["recordings", "patient", "official"],
            default="official" if name == REASONING else "recordings",
            help="recordings: where the prepared tables have them, else by patient; patient: whole patients by --seed, "
            "--val and --test; official: as the names of the files say (ecg_reasoning_benchmark: all test)",
        )  # fmt: skip
        _add_shares(own)
        own.set_defaults(prepare=_conversations)
    made = datasets.add_parser("synthetic", help="what kind of signal it is, how many R peaks it has, how fast it is")
    made.add_argument("--out", type=Path, required=True, help="the table (.parquet), or a folder for it")
    made.add_argument("--records", type=Path, help="where prepare left recordings; default: the folder of --out")
    made.add_argument("--generated", type=int, default=0, metavar="N", help="generate so many in --records, use these")
    made.add_argument("--recordings", type=int, metavar="N", help="how many to ask about; default: all there are")
    made.add_argument("--questions", default=",".join(QUESTIONS), help="kinds of questions; default: %(default)s")
    made.add_argument("--signals", default=",".join(SIGNALS), help="of signal_type; default: %(default)s")
    made.add_argument(
        "--per-answer", type=int, metavar="N",
        help="so many questions of each number that is an answer, and none of those that have fewer; default: all",
    )  # fmt: skip
    made.add_argument("--wording", type=Path, help="JSON: kind of question -> its wording, or a list of them")
    made.add_argument("--segment-len", type=int, default=2500, help="samples of the segments")
    made.add_argument("--workers", type=int, default=cores(), help="processes; the result is the same")
    made.add_argument("--compat", default="", help="comprehension_sets: with the labels of ECG-Preprocess")
    _add_shares(made)
    made.set_defaults(prepare=_synthetic)
    grounded = datasets.add_parser(
        "grounding", help="readings of prepared recordings in five steps, made of what is measured of them"
    )  # fmt: skip
    grounded.add_argument("--out", type=Path, required=True, help="the table (.parquet), or a folder for it")
    grounded.add_argument("--records", type=Path, help="where prepare left recordings; default: the folder of --out")
    grounded.add_argument("--recordings", type=int, metavar="N", help="how many to read; default: all there are")
    grounded.add_argument("--thinking", action="store_true", help="the steps as a thought, the conclusion as an answer")
    grounded.add_argument("--segment-len", type=int, default=2500, help="samples of the segments")
    grounded.add_argument("--seed", type=int, default=0, help="of the wordings, and of which recordings are read")
    grounded.add_argument("--workers", type=int, default=cores(), help="processes; the result is the same")
    grounded.set_defaults(prepare=_grounding)
    check = datasets.add_parser("check", help="looks for patients and copies of recordings in more than one split")
    check.add_argument("--out", type=Path, required=True, help="folder with the tables and the recordings")
    check.add_argument("--tables", nargs="+", type=Path, help="of that folder (default: all .parquet), or elsewhere")
    check.add_argument("--workers", type=int, default=cores(), help="processes")
    check.set_defaults(prepare=_check)
    stats = datasets.add_parser("stats", help="what tables hold: questions, lengths, recordings, patients, labels")
    stats.add_argument("tables", nargs="+", type=Path, help="tables, or folders of them")
    stats.add_argument("--root", type=Path, help="what paths of recordings are relative to; default: the folder given")
    stats.add_argument("--tokenizer", action="append", default=[], help="a folder: count its tokens; may be repeated")
    stats.add_argument("--recordings", type=int, default=1000, help="of each table, opened for leads, rate, duration")
    stats.add_argument("--json", action="store_true", help="print JSON in place of tables in Markdown")
    stats.add_argument("--picture", type=Path, help="draw into a .png, .svg or .pdf file")
    stats.set_defaults(prepare=_stats)
    card = datasets.add_parser("card", help="writes README.md: licence, sources, tables and how they were made")
    card.add_argument("--out", type=Path, required=True, help="folder with what prepare left")
    card.set_defaults(prepare=lambda args: write_card(args.out, args.licence))
    pushed = datasets.add_parser("push", help="pushes what prepare left, with its card, to the Hugging Face hub")
    pushed.add_argument("out", type=Path, metavar="FOLDER", help="folder with what prepare left")
    pushed.add_argument("repo", metavar="OWNER/NAME", help="the dataset on the hub, made where it is not there")
    pushed.add_argument("--public", action="store_true", help="for all to see; without it the dataset is private")
    pushed.set_defaults(prepare=lambda args: push(args.out, args.repo, args.licence, args.public))
    for own in (card, pushed):
        own.add_argument(
            "--licence", action="append", default=[],
            help="of data that are restricted, or of which no licence is known: its name, to push them all the same",
        )  # fmt: skip
    return parser


def _add_shares(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--val", type=float, default=0.1, help="part of the patients")
    parser.add_argument("--test", type=float, default=0.1, help="part of the patients")


def _plain(text: str) -> str:
    """A text that argparse is not to fill in."""
    return text.replace("%", "%%")


def _recordings(args: Namespace) -> dict[str, Any]:
    names = tuple(filter(None, args.compat.split(",")))
    compat.check(names)
    dataset = DATASETS[args.dataset]
    if args.assume_rate is not None or args.assume_unit is not None:
        if dataset.read is not read_double:
            found = f"a dataset whose files say all, {args.dataset}"
            raise UserError("--assume-rate, --assume-unit", found, "files that read_ecg reads", "leave them out")
        assumed = {"rate": args.assume_rate, "unit": args.assume_unit}
        given = {f"assumed_{what}": value for what, value in assumed.items() if value is not None}
        dataset = replace(dataset, read=partial(read_double, **assumed), given=given)
    if getattr(args, "table", None) is not None:
        said = None if args.report_columns is None else tuple(filter(None, args.report_columns.split(",")))
        columns = Columns(args.path_column, said, args.patient_column)
        given = {**dataset.given, "table": content(args.table, columns)}
        dataset = replace(dataset, recordings=listed(dataset.recordings, args.table, columns), given=given)
    reports, dataset = _reports(args, dataset, compat.enabled("published_report_cleaning", names))
    with _alone_in(args.out / args.dataset):
        return prepare_dataset(
            args.dataset, dataset, args.raw, args.out, args.sampling_rate, args.segment_len, True, args.profile, names,
            args.workers, args.split, args.folds, reports, args.made_by, args.format,
        )  # fmt: skip


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within, no other process prepares into the folder."""
    with refused("--out", "", "a folder that can be written", "name another", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        other = claim_folder(folder, "prepare into it once at a time")
    if other:
        fix = "wait for its end or stop it, or give another --out"
        raise UserError(folder, f"a folder into which {other} prepares", "one prepare in a folder at a time", fix)
    try:
        yield
    finally:
        leave_folder(folder)


def _reports(args: Namespace, dataset: RawDataset, published: bool) -> tuple[Reports, RawDataset]:
    """What becomes of the reports, and the dataset with those that are asked for."""
    translator, language = None, args.report_language
    if language == "statements":
        assert dataset.named is not None
        dataset = replace(dataset, recordings=dataset.named)
    if args.translator is not None:
        if language != AS_IS:
            found = f"and --report-language {language}, which is English"
            raise UserError("--translator", found, "one of them", "leave one out")
        translator = Translator(args.translator, args.out / CACHE, args.translator_prompt)
        language = f"translated by {translator.name}"
    elif args.translator_prompt:
        raise UserError("--translator-prompt", "no --translator", "both", "name the model's folder, too")
    return Reports(language, translator, args.clean_reports, published, args.wave_text), dataset


def _check(args: Namespace) -> dict[str, Any]:
    named = [args.out / table if (args.out / table).is_file() else table for table in args.tables or ()]
    tables = named or sorted(args.out.glob("*.parquet"))
    if not tables:
        raise UserError(args.out, "no .parquet file", "tables that prepare wrote", "correct --out, or give --tables")
    report = check_tables(tables, args.out, args.workers)
    write_json(args.out / "check_report.json", report)
    return report


def _stats(args: Namespace) -> dict[str, Any]:
    if args.picture:
        check_picture(args.picture, "--picture", args.tables)
    tokenizers = {Path(source).name: load_tokenizer(source, "--tokenizer") for source in args.tokenizer}
    found = table_stats(args.tables, args.root, tokenizers, max(args.recordings, 0), progress=not args.json)
    if args.picture:
        from elm_jax.pictures.table_stats import draw_table_stats  # takes long to import

        with refused("--picture", str(args.picture), "a file that can be written", "name another", OSError):
            draw_table_stats(args.picture, found)
    return found


def _conversations(args: Namespace) -> dict[str, Any]:
    table = _table(args)
    records = args.records or table.parent
    return prepare_conversations(
        args.raw, records, table, args.segment_len, args.split, args.seed, args.val, args.test, True, args.made_by
    )


def _synthetic(args: Namespace) -> dict[str, Any]:
    table = _table(args)
    names = tuple(filter(None, args.compat.split(",")))
    compat.check(names)
    kinds, signals = (tuple(text.split(",")) for text in (args.questions, args.signals))
    wanted = Wanted(
        kinds, signals, args.recordings, args.per_answer, read_wording(args.wording) if args.wording else {},
        compat.enabled("comprehension_sets", names), args.seed, args.val, args.test,
    )  # fmt: skip
    records = args.records or table.parent
    return prepare_synthetic(records, args.generated, table, wanted, args.segment_len, args.workers, True, args.made_by)


def _grounding(args: Namespace) -> dict[str, Any]:
    table = _named_table(args)
    return prepare_grounding(
        args.records or table.parent, table, args.segment_len, args.recordings, args.thinking, args.seed, args.workers,
        True, args.made_by,
    )  # fmt: skip


def _table(args: Namespace) -> Path:
    """The table to write, once the shares of splits are right."""
    if not (args.val >= 0 and args.test >= 0 and args.val + args.test < 1):
        found = f"{args.val:g}, {args.test:g}"
        raise UserError("--val, --test", found, "parts whose sum is below 1", "lower them")
    return _named_table(args)


def _named_table(args: Namespace) -> Path:
    return args.out if args.out.suffix == ".parquet" else args.out / f"{args.dataset}.parquet"


def _command(argv: Sequence[str]) -> str:
    """The command as it is told to others: without where things lie here, and on how many processes it ran."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    told = []
    for before, word in zip(["", *words], words, strict=False):
        if "--workers" not in (before, word) and word != "--debug":
            place = "" if word.endswith(".parquet") else _PLACES.get(before, "")
            told.append(place or Path(word).name)
    return shlex.join(["python", "-m", "elm_jax.prepare", *told])


def _brief(value: Any) -> str:
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        return ", ".join(f"{name} ({_brief(item)})" for name, item in value.items())
    if isinstance(value, dict) and value and not all(isinstance(item, int) for item in value.values()):
        return f"{len(value)} (the first: {next(iter(value))})"
    return ", ".join(f"{k} {v}" for k, v in value.items()) or "0" if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
