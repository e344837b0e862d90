"""From predictions to scores: every metric with its interval, by kind of question.

A metric sums k numbers over pairs of answer and truth and makes a score of the sums, so that the mean of a score and
corpus BLEU are resampled alike. A pair without a truth is left out; the rest is the protocol's (`protocols`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from elm_jax.errors import UserError
from elm_jax.registry import Registry
from elm_jax.scoring import answers as compared
from elm_jax.scoring import overlap
from elm_jax.scoring.bert import BertScore
from elm_jax.scoring.ecg_qa import is_ecg_qa, set_matches
from elm_jax.scoring.grounding import Evidence, Grounded, ground, share
from elm_jax.scoring.meteor import Meteor
from elm_jax.scoring.protocols import BERT_METRICS, BERT_MODEL, PROTOCOLS, Protocol, seen_by
from elm_jax.scoring.reasoning import STEPS, step_right
from elm_jax.scoring.statistics import Patients, ci95

FIELDS = ("name", "question_type", "attribute_type", "attribute", "template_id")  # what questions are grouped by
OF_LONG_TEXTS = ("bleu4", "meteor")
MEASURED = "measured"  # of a prediction: what is measured of its ECG, where it is to be held against that

Score = Callable[[str, str], float]
Predictions = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Pair:
    """An answer and its truth as the protocol compares them.

    id: of the question in a run (a fold, a seed); asked: of the question alone. answers: the truth as a set, if any.
    measured: what is measured of its ECG, where it is held against that.
    """

    id: str
    asked: str
    patient: str
    answer: str
    truth: str
    thinking: str = ""
    true_thinking: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    answers: frozenset[str] = frozenset()
    measured: Evidence | None = None

    @property
    def grounded(self) -> Grounded:
        """What answer and thinking say that is measured."""
        assert self.measured is not None
        return ground(f"{self.thinking}\n{self.answer}", self.measured)

    @property
    def name(self) -> str:
        return self.fields.get("name", "")


def _everyone(_: Pair) -> bool:
    return True


@dataclass(frozen=True)
class Metric:
    """What is summed over pairs, and the score that is made of the sums.

    counts: answer, truth -> k numbers of this pair; or rows: pairs -> (n, k), where they are compared together.
    value: sums (..., k) -> (...). asked: whether a pair has this metric; kind: none but questions called so have it.
    score: of one pair, where the metric is the mean of such. cheap: whether blind answers are searched for the best;
    slow: whether none of them is scored.
    """

    value: Callable[[np.ndarray], np.ndarray]
    asked: Callable[[Pair], bool] = _everyone
    kind: str = ""
    counts: Callable[[str, str], Sequence[float]] | None = None
    rows: Callable[[Sequence[Pair]], np.ndarray] | None = None
    score: Score | None = None
    cheap: bool = False
    slow: bool = False
    numbers: bool = False  # whether truths are whole numbers, so that numbers between them are blind answers too

    def among(self, pairs: Sequence[Pair]) -> list[int]:
        """The places of the pairs that have this metric."""
        return [i for i, pair in enumerate(pairs) if self.kind in ("", pair.name) and self.asked(pair)]

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean of what each pair scores: its first number, the second being 1."""
        return self.value is ratio


def ratio(sums: np.ndarray) -> np.ndarray:
    """Sums (..., 2) -> the first by the second, (...)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _mean_of(score: Score, kind: str = "", **more: Any) -> Metric:
    return Metric(ratio, kind=kind, counts=lambda answer, truth: (score(answer, truth), 1.0), score=score, **more)


def _set_rows(pairs: Sequence[Pair]) -> np.ndarray:
    right = set_matches([pair.answer for pair in pairs], [pair.answers for pair in pairs])
    return np.stack([right, np.ones(len(pairs))], axis=1)


def _has_answer_set(pair: Pair) -> bool:
    return bool(pair.answers) and (is_ecg_qa(pair.name) or is_ecg_qa(pair.fields.get("question_type", "")))


def _has_facts(pair: Pair) -> bool:
    return pair.measured is not None and bool(pair.measured.facts)


def _grounded(first: int) -> Metric:
    """Of two of the counts of `Grounded`, from the first: their share."""
    return Metric(
        share, _has_facts, rows=lambda pairs: np.array([p.grounded.counts()[first : first + 2] for p in pairs], float)
    )


def _in_any_script(compare: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    return lambda answer, truth: compare(compared.spaced(answer), compared.spaced(truth))


_PLAIN: dict[str, Metric] = {
    "exact_match": _mean_of(compared.exact_match, cheap=True),
    "token_f1": _mean_of(_in_any_script(compared.token_f1), cheap=True),
    "bleu4": Metric(overlap.bleu, counts=_in_any_script(overlap.bleu_counts)),
    "rouge_l": _mean_of(overlap.rouge_l_in_any_script),
    "rouge_package_1": _mean_of(partial(overlap.rouge_n_of_sets, n=1)),
    "rouge_package_2": _mean_of(partial(overlap.rouge_n_of_sets, n=2)),
    "rouge_package_l": _mean_of(overlap.rouge_l_of_sets),
}
# What the reference has in their place: the same of ASCII texts.
_OF_ASCII: dict[str, Metric] = {
    "token_f1": _mean_of(compared.token_f1, cheap=True),
    "bleu4": Metric(overlap.bleu, counts=overlap.bleu_counts),
    "rouge_l": _mean_of(overlap.rouge_l),
}
# Beside the protocol's, mostly for one kind of question.
_OWN: Registry[Metric] = Registry(
    "metric",
    {
        "signal_type.accuracy": _mean_of(compared.same_words, "signal_type", cheap=True),
        "heart_rate.within_5_bpm": _mean_of(compared.within_5_bpm, "heart_rate", cheap=True, numbers=True),
        "answer_set_match": Metric(ratio, _has_answer_set, rows=_set_rows),
        **{f"{step}.accuracy": _mean_of(partial(step_right, step), step, cheap=True) for step in STEPS},
        "grounding.precision": _grounded(0),
        "grounding.recall": _grounded(2),
    },
)


def register_metric(name: str, score: Score, kind: str = "") -> None:
    """Let the protocol `ours` score answers by `score(answer, truth)`, a number for each, whose mean is the metric.

    kind: of which questions, by the `name` of their records, and the metric is then called `<kind>.<name>`: it decides
    whether an answer to such a question counts as right. Without it all questions have the metric.

    Raises:
        UserError: the name is no identifier, or one of the package's metrics.
    """
    if name in (*_PLAIN, "meteor", *BERT_METRICS):
        raise UserError(f"metric {name!r}", "a name of the package", "a name of its own", "rename it")
    _OWN.register(f"{kind}.{name}" if kind else name, _mean_of(score, kind))


def is_right(name: str, answer: str, truth: str) -> bool:
    """Whether an answer to a question called `name` counts as right: by its own metric, else by its words."""
    own = next((m.score for m in _OWN.values() if m.score and name and m.kind == name), None)
    score = own or compared.same_words
    return bool(score(compared.split_response(answer)[1], compared.split_response(truth)[1]))


class Scorer:
    """The metrics of a protocol, with what they need: WordNet and BERTScore's model where they are found.

    `unavailable` says, of each metric that the protocol has and that cannot be computed here, why. `end_token` is
    what stands behind an answer that ended by itself. `must`: whether what is named must be there.

    What it has scored it keeps: see `rows`.

    Raises:
        UserError: they must, and are not.
    """

    def __init__(
        self, protocol: str = "ours", wordnet: str | None = None, bert_model: str | None = None, end_token: str = "",
        seed: int = 0, must: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.protocol, self.seed, self._end = protocol, PROTOCOLS[protocol], seed, end_token
        self._must = must
        self.unavailable: dict[str, str] = {}
        self.metrics: dict[str, Metric] = {}
        plain = _PLAIN if self.protocol.any_script else _PLAIN | _OF_ASCII
        for name in self.protocol.metrics:
            self.metrics |= self._meteor(wordnet) if name == "meteor" else {name: plain[name]}
        if self.protocol.bert or bert_model is not None:
            self.metrics |= self._bert(bert_model)
        if self.protocol.own_metrics:
            self.metrics |= _OWN
        self._known: dict[str, dict[tuple[str, str], Sequence[float]]] = {name: {} for name in self.metrics}

    def _found(self, make: Callable[[], Any], metrics: Sequence[str], named: bool) -> Any:
        """What `make` makes; None, and why, where what it needs is not there, and need not be."""
        try:
            return make()
        except UserError as error:
            if named and self._must:
                raise
            self.unavailable |= dict.fromkeys(metrics, str(error))

    def _meteor(self, folder: str | None) -> dict[str, Metric]:
        meteor = self._found(lambda: Meteor(folder), ["meteor"], folder is not None)
        score = _in_any_script(meteor) if self.protocol.any_script else meteor
        return {} if meteor is None else {"meteor": _mean_of(score)}

    def _bert(self, name: str | None) -> dict[str, Metric]:
        model = self._found(lambda: BertScore(name or BERT_MODEL), BERT_METRICS, name is not None)
        if model is None:
            return {}
        known: dict[tuple[str, str], np.ndarray] = {}

        def rows(pairs: Sequence[Pair], column: int) -> np.ndarray:
            new = list(dict.fromkeys((p.answer, p.truth) for p in pairs if (p.answer, p.truth) not in known))
            if new:
                known.update(zip(new, model.scores(*zip(*new, strict=True)), strict=True))
            return np.array([[known[p.answer, p.truth][column], 1.0] for p in pairs]).reshape(-1, 2)

        return {m: Metric(ratio, rows=partial(rows, column=i), slow=True) for i, m in enumerate(BERT_METRICS)}

    def rows(self, name: str, pairs: Sequence[Pair]) -> np.ndarray:
        """(n, k): what the metric `name` sums over the pairs, of which there is at least one.

        The same answer to the same truth is scored once as long as there is this scorer: answers repeat, under the
        controls too, and all is summed again whenever there is more of it.
        """
        metric, known = self.metrics[name], self._known[name]
        if metric.rows is not None:
            return metric.rows(pairs)
        assert metric.counts is not None, name
        keys = [(pair.answer, pair.truth) for pair in pairs]
        for key in keys:
            if key not in known:
                known[key] = metric.counts(*key)
        return np.array([known[key] for key in keys], float)

    def all_rows(self, names: Iterable[str], pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """`rows` of those of these metrics that any pair has, (n, k); zeros for pairs that have it not."""
        found = {}
        for name in names:
            places = self.metrics[name].among(pairs)
            if places:
                rows = self.rows(name, [pairs[i] for i in places])
                found[name] = np.zeros((len(pairs), rows.shape[1]))
                found[name][places] = rows
        return found

    def pairs(self, predictions: Predictions) -> list[Pair]:
        """The pairs that the protocol scores. A prediction has id, answer, truth, and perhaps name, patient, ended,
        answers and the other FIELDS."""
        empty = self.protocol.empty_answers
        kept = (p for p in predictions if self._says(p["truth"]) and (empty or self._says(p["answer"])))
        return [_pair(p, self.protocol, self._end) for p in kept]

    def seen(self, text: str) -> str:
        """What the protocol compares of an answer that ended by itself."""
        return seen_by(self.protocol, text, self._end)[1]

    def _says(self, text: str) -> bool:
        """Whether the protocol sees anything of a text, the end token aside. The reference takes blanks for text."""
        return bool(seen_by(self.protocol, text, "")[1]) or text.isspace()

    def table(self, predictions: Predictions) -> Table:
        """The predictions, ready to be summed."""
        predictions = list(predictions)
        pairs = self.pairs(predictions)
        rows = self.all_rows(self.metrics, pairs)
        left_out = sum(self._says(p["truth"]) for p in predictions) - len(pairs)
        return Table(self, pairs, rows, left_out)


def question_id(p: Mapping[str, Any]) -> str:
    """What tells a prediction's question from others, in the same run or another one."""
    return "/".join(str(p[key]) for key in ("id", "fold", "seed") if key in p)


def _pair(p: Mapping[str, Any], protocol: Protocol, end: str) -> Pair:
    thinking, answer = seen_by(protocol, p["answer"], end if p.get("ended", True) else "")
    true_thinking, truth = seen_by(protocol, p["truth"], end)
    return Pair(
        id=question_id(p),
        asked=str(p["id"]),
        patient=str(p.get("patient") or p["id"]),
        answer=answer,
        truth=truth,
        thinking=thinking,
        true_thinking=true_thinking,
        fields={name: str(p[name]) for name in FIELDS if p.get(name) not in (None, "")},
        answers=frozenset(map(compared.composed, p.get("answers", ()))),
        measured=p.get(MEASURED),
    )


@dataclass(frozen=True)
class Table:
    """n pairs and what each metric sums over them, (n, k); zeros for pairs that it does not ask.

    left_out: answers that are none of the pairs, since they are empty and the protocol does not score such.
    """

    scorer: Scorer
    pairs: list[Pair]
    rows: Mapping[str, np.ndarray]
    left_out: int = 0

    @cached_property
    def patients(self) -> Patients:
        return Patients([pair.patient for pair in self.pairs], self.scorer.seed)

    def part(self, chosen: Sequence[int] | np.ndarray) -> Table:
        """Some of the pairs, and the metrics that ask at least one of them."""
        rows = {name: values[chosen] for name, values in self.rows.items()}
        return Table(self.scorer, [self.pairs[i] for i in chosen], {n: r for n, r in rows.items() if r.any()})

    def values(self) -> dict[str, float]:
        """{metric: score}."""
        metrics = self.scorer.metrics
        return {name: float(metrics[name].value(rows.sum(0))) for name, rows in self.rows.items()}

    def scores(self) -> dict[str, dict[str, Any]]:
        """{metric: {"value", "ci95"}}, the interval by a bootstrap over patients."""
        if not self.rows:
            return {}
        found, start = {}, 0
        resampled = self.patients.resampled(np.concatenate(list(self.rows.values()), axis=1))
        for (name, rows), value in zip(self.rows.items(), self.values().values(), strict=True):
            sums = resampled[:, start : start + rows.shape[1]]
            start += rows.shape[1]
            found[name] = {"value": value, "ci95": ci95(self.scorer.metrics[name].value(sums))}
        return found

    def groups(self, name: str, missing: str | None = None) -> dict[str, list[int]]:
        """Level of a field -> the places of its pairs; those that have none under `missing`, if that is given."""
        found: dict[str, list[int]] = {}
        for i, pair in enumerate(self.pairs):
            level = pair.fields.get(name, missing)
            if level is not None:
                found.setdefault(level, []).append(i)
        return dict(sorted(found.items()))

    def by(self) -> dict[str, dict[str, Any]]:
        """{field: {level: {metric: {"value", "ci95", "n"}}}} for the fields that pairs have."""
        found = {}
        for name in FIELDS:
            levels = self.groups(name)
            if levels:
                found[name] = {
                    level: {m: score | {"n": len(places)} for m, score in self.part(places).scores().items()}
                    for level, places in levels.items()
                }
        return found

    def answered(self, answers: Sequence[str]) -> Table:
        """The same questions with other answers, without thinking."""
        pairs = [replace(pair, answer=answer, thinking="") for pair, answer in zip(self.pairs, answers, strict=True)]
        quick = [name for name in self.rows if not self.scorer.metrics[name].slow]
        return Table(self.scorer, pairs, self.scorer.all_rows(quick, pairs))

    @cached_property
    def majority(self) -> Table:
        """The same questions answered with the most frequent truth of their name."""
        common = {
            name: Counter(self.pairs[i].truth for i in places).most_common(1)[0][0]
            for name, places in self.groups("name", "").items()
        }
        return self.answered([common[pair.name] for pair in self.pairs])

    def perfect(self) -> dict[str, float]:
        """{metric: what answers equal to the truths score}, of the metrics that give short ones less than 1."""
        short = Table(self.scorer, self.pairs, {name: self.rows[name] for name in OF_LONG_TEXTS if name in self.rows})
        return short.answered([pair.truth for pair in self.pairs]).values()

    def thinking(self) -> Table:
        """The pairs whose truth thinks, with thinking in place of answers."""
        thought = [pair for pair in self.pairs if pair.true_thinking]
        pairs = [replace(p, answer=p.thinking, truth=p.true_thinking, fields={}) for p in thought]
        names = [name for name in self.scorer.metrics if name not in _OWN] if pairs else []
        return Table(self.scorer, pairs, {name: self.scorer.rows(name, pairs) for name in names})
