"""Evaluate a run: generate answers on a split, score them, and score them again under controls.

The controls say what of a score is owed to the signal (`controls`, `dependence`). Records whose recording cannot be
read or whose prompts do not fit are left out of all scores, within `data.max_bad_records`.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from elm_jax import stopping
from elm_jax.config import Config, to_dict
from elm_jax.data.dataset import Dataset
from elm_jax.data.measured import Measured
from elm_jax.data.prepare.ptb_xl import PtbXl, read_ptb_xl
from elm_jax.data.sources import Record, load_records
from elm_jax.errors import UserError, printable
from elm_jax.evaluation.answering import Asker, BadRecords, Task, check_lengths, question_answers
from elm_jax.evaluation.controls import REAL, RETRIEVED, Question, Source, kept_ecgs, shuffled_records
from elm_jax.evaluation.examples import draw_examples
from elm_jax.evaluation.labels import ask_labels
from elm_jax.evaluation.report import write_report
from elm_jax.evaluation.results import asked_with, results_of, summary
from elm_jax.evaluation.retrieved import retrieved_for
from elm_jax.evaluation.store import Store
from elm_jax.evaluation.url_judge import UrlJudge, ask_judge
from elm_jax.folders import check_writable, read_json, write_json
from elm_jax.inference.model import TrainedModel
from elm_jax.objectives import objective_of
from elm_jax.run.fingerprints import fingerprint
from elm_jax.runtime import distributed
from elm_jax.runtime.watchdog import Watchdog
from elm_jax.scoring.grounding import Evidence
from elm_jax.scoring.metrics import MEASURED, Scorer

ASKED = 3  # raised where other questions are asked of the same data, or in another order: known answers then go
SHUFFLES = 3  # ways to give each question another recording: one draw alone is a coarse estimate
# Of eval.*, what changes no answer; whether the weights are averaged, their fingerprint tells.
_SCORING = ("at_end", "controls", "protocol", "wordnet", "bert_model", "labels", "ema", "guidance", "grounding",
            "judge")  # fmt: skip
# And of data.*: fingerprints tell which records there are, and what is asked is neither packed nor augmented.
_TRAINING = ("val_fraction", "subset", "weights", "augment_ecg", "augment_rgb", "pack", "share", "workers",
             "timeout", "max_bad_records", "prefixes", "remote_gb", "augment_paper", "drop_views",
             "swap_views")  # fmt: skip
# These came later: at their defaults they are no part of what an evaluation is told by.
_YOUNGER = ("image_layout", "image_rhythm", "images", "missing", "left_out")
ERROR = ("where", "found", "expected", "fix")  # the parts of a UserError

Line = dict[str, Any]


@dataclass(frozen=True)
class _Fold:
    """The questions of one of the dataset's folds."""

    number: int
    dataset: Dataset
    asked: list[Question]
    bad: BadRecords
    measured: Callable[[Record], Evidence | None]
    unread: set[int] = field(default_factory=set)  # records of which nothing can be measured any more

    @property
    def questions(self) -> list[Question]:
        return [question for question in self.asked if question.record not in self.bad.found]

    @property
    def records(self) -> list[int]:
        """Those that are asked about."""
        return sorted({question.record for question in self.questions})

    def evidence(self, question: Question) -> dict[str, Evidence]:
        """What is measured of the ECG that a question is about, for who scores its answer; nothing where its recording
        is gone, and its answer is there from before."""
        try:
            found = self.measured(self.dataset.records[question.record])
        except UserError:
            self.unread.add(question.record)
            return {}
        return {MEASURED: found} if found else {}


def evaluate(config: Config, split: str = "test", which: str = "best") -> Path:
    """Evaluate the run in `config.workdir` on a split of `data.names`; returns the folder with the results.

    Writes `metrics.json`, `report.html` and `examples.png` into `eval/<datasets>-<split>/`: the scores of the real
    ECGs before the controls are run, and all of it again with them. Answers are appended to `predictions.jsonl` and
    `controls/*.jsonl` as they come; the same evaluation, stopped and started again, goes on behind the last of them.
    What another evaluation has left there is moved to `previous-1`, `previous-2` and so on.

    Raises:
        UserError: no checkpoint, no such split, too many records that cannot be evaluated, or labels that cannot be
            asked for.
    """
    stopping.doing("loading the model")
    labels, judge = _labels_asked(config), _judge_asked(config)
    out, first = results_folder(config, split), jax.process_index() == 0
    if first:
        check_writable(out, "config.workdir")  # before the model takes its time
    model, options = TrainedModel(config, which), config.eval
    end_token = str(model.assembly.tokenizer.eos_token or "")
    scorer = Scorer(options.protocol, options.wordnet, options.bert_model, end_token)
    numbers = options.folds or (config.data.fold,)
    datasets = [model.assembly.dataset(split, number) for number in numbers]
    folds = [_fold(model, number, data) for number, data in zip(numbers, datasets, strict=True)]
    _check_alike(folds)
    if "text_only" in options.controls:
        _check_text_only(folds)
    identity = _identity(model, split, datasets)
    store = Store(out, identity) if first else None
    _keep_problems(folds, store)
    asker = Asker(model, options, _total(folds, config), config.log.progress)
    with closing(asker):
        conditions = {REAL: _ask(asker, folds, store, REAL, config)}
        questions = [question for fold in folds for question in fold.questions]
        if not questions:
            raise UserError(f"split {split}", "no question that can be asked", "at least one", "mend the data")
        known = _known(config, folds) if first else {}
        bad = sum(len(fold.bad.found) for fold in folds)
        facts: dict[str, Any] = {"split": split, "step": model.step, "end_token": end_token, "bad": bad}
        facts["asked_with"] = asked_with(config)
        if unread := sum(len(fold.unread) for fold in folds):
            facts["grounding_unread"] = unread
        if first and config.retrieval.index is not None:
            with _reading_watched(config):
                facts["retrieval"] = retrieved_for((fold.dataset, fold.records) for fold in folds)
        if config.eval.seeds and not options.temperature:
            facts["greedy_for_seeds"] = list(config.eval.seeds)

        if first:
            write_json(out / "metrics.json", results_of(conditions, scorer, facts, known))
            draw_examples(out / "examples.png", folds[0].dataset, conditions[REAL])
        distributed.gather(None)  # scoring takes long, and in what follows nobody may wait so long
        if labels is not None and store is not None:
            facts |= _ask_labels(model, folds, store, labels)
        for name in _controls(config):
            conditions[name] = _ask(asker, folds, store, name, config)
    if first:
        if "shuffled" in options.controls:
            facts["shuffled_ecgs"] = _kept_ecgs(folds, config)
        write_json(out / "metrics.json", results := results_of(conditions, scorer, facts, known))
        if judge is not None and store is not None:
            chosen = [line for line in conditions[REAL] if {line["name"], "all"} & set(options.grounding)]
            results["judged"] = ask_judge(judge, chosen, store.judged, config.log.progress)
            write_json(out / "metrics.json", results)
        write_report(out, results, conditions[REAL], folds[0].dataset)
        print(printable(summary(results), "\n"), file=sys.stderr)
        calls = model.engine.calls
        made = f"generation: {len(calls)} programs compiled for {calls.total()} calls"
        print(made if calls else "all questions were answered before; scored again", file=sys.stderr)
        print(printable(f"results are in {out}"), file=sys.stderr)
    return out


def _labels_asked(config: Config) -> PtbXl | None:
    """PTB-XL's tables, where its statements are to be asked for."""
    folder = config.eval.labels
    if folder is None:
        return None
    if jax.process_count() > 1:
        raise UserError("eval.labels", "several processes", "one", "evaluate labels with one process")
    if objective_of(config).samples.phase != "sft":
        expected = "objective 'sft', which answers questions"
        raise UserError("eval.labels", f"objective {config.objective!r}", expected, "leave eval.labels out")
    return read_ptb_xl(Path(folder))


def _judge_asked(config: Config) -> UrlJudge | None:
    """Who marks answers, where `eval.judge.url` names one."""
    if config.eval.judge.url is None:
        return None
    if jax.process_count() > 1:
        raise UserError("eval.judge.url", "several processes", "one", "judge with one process: answers are kept")
    return UrlJudge(config.eval.judge)


def _ask_labels(model: TrainedModel, folds: Sequence[_Fold], store: Store, labels: PtbXl) -> dict[str, Any]:
    """The scores of the recordings that are asked about in any fold, and how many of these are left out here alone."""
    records = [fold.dataset.records[i] for fold in folds for i in fold.records]
    like = folds[0].dataset
    dataset = Dataset(records, like.tokenizer, like.text, like.signal)
    bad = BadRecords(dataset, model.config.data.max_bad_records)
    with Watchdog(Path(model.config.workdir), model.config.train.timeout, model.config.data.timeout):
        found = ask_labels(model, dataset, range(len(records)), labels, store.labels, bad, model.config.log.progress)
    return {"labels": found, "labels_bad": len(bad.found)}


def is_evaluated(config: Config, split: str) -> bool:
    """Whether the results of this split are there, with all that was asked for."""
    folder = results_folder(config, split)
    if not (folder / "metrics.json").is_file() or not (folder / "report.html").is_file():
        return False
    found = read_json(folder / "metrics.json")
    labelled = config.eval.labels is None or "labels" in found
    judged = config.eval.judge.url is None or "criteria" in found.get("judged", {})
    return set(_controls(config)) <= set(found["controls"]) and labelled and judged


def results_folder(config: Config, split: str) -> Path:
    """Where the evaluation of a split of `data.names` is: `eval/<datasets>-<split>` in the run's folder.

    A dataset is called as its file or folder is. Where two are called alike, the one that is evaluated later moves what
    the other has left aside (`store.Store`).
    """
    names = "_".join(Path(name if "://" in name else name.partition(":")[0]).stem for name in config.data.names)
    return Path(config.workdir) / "eval" / f"{names}-{split}"


def _fold(model: TrainedModel, number: int, dataset: Dataset) -> _Fold:
    bad, options = BadRecords(dataset, model.config.data.max_bad_records), model.config.eval
    room = model.assembly.llm.max_len - options.max_new_tokens
    asked = list(itertools.islice(_questions(dataset, room, bad), options.limit))
    measured, names = Measured(dataset.signal), options.grounding
    return _Fold(number, dataset, asked, bad, lambda r: measured(r) if {r.name, "all"} & set(names) else None)


def _check_alike(folds: Sequence[_Fold]) -> None:
    """Raise UserError unless all processes ask the same: of different questions, some would be waited for forever."""
    told = repr([(fold.asked, sorted(fold.bad.found)) for fold in folds])
    each = distributed.gather(zlib.crc32(told.encode()))
    for index, one in enumerate(each):
        if one != each[0]:
            found = f"other questions in process {index} than in process 0"
            raise UserError("data.names", found, "the same in every process", "give all of them the same files")


def _check_text_only(folds: Sequence[_Fold]) -> None:
    """Raise UserError where a prompt is nothing without its ECG: in phase pretrain all or none, in others none is."""
    for fold in folds:
        for record in fold.records[:1]:
            prompts = Source(fold.dataset, "text_only").dataset.prompts(record)
            lengths = [len(prompt.ids) for prompt, _ in prompts]
            check_lengths("condition text_only", lengths, max(lengths))


def _keep_problems(folds: Sequence[_Fold], store: Store | None) -> None:
    """Note the recordings that could not be read before a stop, and from now on keep what is found of them."""
    known = distributed.gather(store.problems.lines if store else [])[0]
    for fold in folds:
        for line in known:
            if line["fold"] == fold.number:
                fold.bad.note(line["record"], UserError(*(line[part] for part in ERROR)))
        if store:
            fold.bad.keep = lambda record, error, fold=fold.number: store.problems.append(
                {"fold": fold, "record": record, **dict(zip(ERROR, error.parts, strict=True))}
            )


def _questions(dataset: Dataset, room: int, bad: BadRecords) -> Iterator[Question]:
    """The questions of all records whose prompts leave room for an answer: have at most `room` tokens.

    That is whatever ECGs stand in them, so that what can be asked about the real ones can be asked under all controls.
    """
    for record in range(len(dataset)):
        try:
            prompts = dataset.prompts(record)
            lengths = [dataset.room(prompt) for prompt, _ in prompts]
            check_lengths(f"record {dataset.records[record].id}", lengths, room)
        except UserError as error:
            bad.note(record, error)
            continue
        for turn, (length, (_, truth)) in enumerate(zip(lengths, prompts, strict=True)):
            yield Question(record, turn, truth, length)


def _ask(asker: Asker, folds: Sequence[_Fold], store: Store | None, condition: str, config: Config) -> list[Line]:
    """What is answered under a condition in all folds and with all seeds that answers are drawn with.

    Nothing in a process without a store.
    """
    file, found = store.answers(condition) if store else None, list[tuple[_Fold, Question, Line]]()
    for fold, seed, draw in itertools.product(folds, _drawn_with(config), range(_draws(condition))):
        marks = {"fold": fold.number} if config.eval.folds else {}
        marks |= {"seed": seed} if config.eval.seeds and config.eval.temperature else {}
        marks |= {"draw": draw} if _draws(condition) > 1 else {}
        source = Source(fold.dataset, condition, draw, fold.records)
        asked = fold.asked if condition == REAL else fold.questions
        with Watchdog(Path(config.workdir), config.train.timeout, config.data.timeout):
            answers = asker.answers(Task(source, asked, seed, marks), file, fold.bad if condition == REAL else None)
        found += [(fold, question, answers[question]) for question in fold.questions] if file else []
    with _reading_watched(config):  # behind all that the others take part in: they would wait, and not for long
        return [line | fold.evidence(question) for fold, question, line in found]


def _reading_watched(config: Config) -> Watchdog:
    """For what one process does alone: it may take long, but no recording may take longer than `data.timeout`."""
    return Watchdog(Path(config.workdir), 0, config.data.timeout)


def _kept_ecgs(folds: Sequence[_Fold], config: Config) -> dict[str, int]:
    """`kept_ecgs` of all shuffled answers together."""
    found: Counter[str] = Counter()
    for fold, _, draw in itertools.product(folds, _drawn_with(config), range(_draws("shuffled"))):
        given = shuffled_records(fold.dataset, draw, fold.records)
        found.update(kept_ecgs(fold.dataset, given, fold.questions))
    return dict(found)


def _draws(condition: str) -> int:
    return SHUFFLES if condition.endswith("shuffled") else 1


def _controls(config: Config) -> tuple[str, ...]:
    """The controls that are asked for; with retrieval also those of what is retrieved, if there are any."""
    asked = config.eval.controls
    return (*asked, *RETRIEVED) if asked and config.retrieval.index is not None else asked


def _drawn_with(config: Config) -> tuple[int, ...]:
    """The seeds that answers are drawn with; greedy answers are the same with each, and so are one run."""
    seeds = config.eval.seeds or (config.seed,)
    return seeds if config.eval.temperature else seeds[:1]


def _total(folds: Iterable[_Fold], config: Config) -> int:
    """How many answers there will be."""
    ways = 1 + sum(_draws(name) for name in _controls(config))
    return sum(len(fold.questions) for fold in folds) * ways * len(_drawn_with(config))


def _known(config: Config, folds: Sequence[_Fold]) -> dict[str, Any]:
    """What training knew: question -> (name, answer) for the blind baseline; how many test records it saw itself."""
    try:
        records = load_records(config.data, "train", config.seed)
    except UserError:  # a data set of a test split alone
        return {}
    asked = [(r.name, *one) for r in records if r.problem is None for one in _safely_asked(r.text)]
    seen: dict[str, Any] = {"asked": asked}
    others = [fold for fold in folds if fold.number != config.data.fold]
    if others:
        trained = {patient for r in records for patient in r.patient.split("+")}
        about = [fold.dataset.records[q.record].patient.split("+") for fold in others for q in fold.questions]
        seen["leaked"] = sum(any(patient in trained for patient in people) for people in about)
    return seen


def _safely_asked(text: Any) -> list[tuple[str, str]]:
    try:
        return question_answers(text)
    except UserError:  # a bad record, which training leaves out too
        return []


def _identity(model: TrainedModel, split: str, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """All that answers depend on: other answers are no beginning of these. Every process must ask for it."""
    config = to_dict(model.config)
    usual = {key: value for key, value in to_dict(Config())["data"].items() if key in _YOUNGER}
    data = {key: value for key, value in config["data"].items() if key not in _TRAINING}
    config["data"] = {key: value for key, value in data.items() if key not in usual or value != usual[key]}
    # Greedy answers are the same with every seed.
    scoring = _SCORING if model.config.eval.temperature else (*_SCORING, "seeds")
    return {
        "asked": ASKED,
        "step": model.step,
        "weights": fingerprint(model.arrays),
        "split": split,
        "records": [dataset.fingerprint for dataset in datasets],
        "config": {key: config[key] for key in ("seed", "data", "llm", "mesh", "compat")},
        "eval": {key: value for key, value in asdict(model.config.eval).items() if key not in scoring},
    }
