"""How good an answer is, as a number: what policy objectives learn from. Names of a config, or a user's functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from elm_jax.errors import UserError
from elm_jax.registry import Registry
from elm_jax.scoring.answers import TAGS
from elm_jax.scoring.grounding import Evidence, ground

_FORMAT = re.compile(r"\s*<think>.*?</think>.*?<answer>.*?</answer>\s*\Z", re.DOTALL)
_OPENED = re.compile(r"(?!.*<think>).*?</think>.*?<answer>.*?</answer>\s*\Z", re.DOTALL)
_STRICT = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*\Z", re.DOTALL)
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SOLUTION = re.compile(r"<\|answer\|>(.*?)<\|/answer\|>", re.DOTALL)
_EVIDENCE = re.compile(r"<\|key_diagnostic_evidence\|>(.*?)<\|/key_diagnostic_evidence\|>", re.DOTALL)
_STEP = re.compile(r"\*\*Step\s*(\d+)")
_STEP_LINE = re.compile(r"^\s*step_(\d+)_\w+\s*:(.*)$", re.MULTILINE)
_FIX = "mend its function"
_NUMBER = re.compile(r"[-+]?\d{1,15}(?:\.\d{1,15})?", re.ASCII)


class Answered(NamedTuple):
    """An answer to be judged.

    Args:
        answer: its text, with think and answer tags, without the end token.
        truth: the record's own answer.
        record: the record, of which a user's reward may read more (`data.sources.Record`).
        opened: whether the think tag stands in the prompt, so that the answer must not open one.
        measured: what is measured of the record's ECG; None of one without, or with several (`data.measured`).
    """

    answer: str
    truth: str
    record: Any = None
    opened: bool = False
    measured: Callable[[], Evidence | None] = lambda: None


Reward = Callable[[Answered], float]


def form(a: Answered) -> float:
    """1 if the answer is a thought and then a tagged answer, with nothing before and behind (ECG-Language-Models)."""
    return float(bool((_OPENED if a.opened else _FORMAT).match(a.answer)))


def strict_form(a: Answered) -> float:
    """`form`, with nothing between the thought and the answer (ELM, April 2026)."""
    return float(bool(_STRICT.match(a.answer)))


def tags(a: Answered) -> float:
    """The part of the tags to be expected that occur exactly once (ECG-Language-Models)."""
    expected = TAGS[1:] if a.opened else TAGS
    return sum(a.answer.count(tag) == 1 for tag in expected) / len(expected)


def answer(a: Answered) -> float:
    """Half the F1 of the findings, half whether both are equal to the letter (ECG-Language-Models).

    Without tags the whole text is the answer: free text that equals the truth has this part too.
    """
    ours, theirs = _body(a.answer), _body(a.truth)
    p, g = _findings(ours), _findings(theirs)
    return 0.5 * 2 * len(p & g) / max(len(p) + len(g), 1) + 0.5 * (ours == theirs)


def recall(a: Answered) -> float:
    """The part of the truth's findings that the answer has (ELM, April 2026)."""
    p, g = _findings(_body(a.answer)), _findings(_body(a.truth))
    return len(p & g) / len(g) if g else 0.0


def jaccard(a: Answered) -> float:
    """Findings in both by findings in either; 1 where neither has any."""
    return _jaccard(_findings(_body(a.answer)), _findings(_body(a.truth)))


def exact(a: Answered) -> float:
    """1 if both answers are equal, but for case and blanks around them."""
    return float(_body(a.answer) == _body(a.truth))


def numeric(tolerance: float) -> Reward:
    """A reward: 1 where the first number of the answer is within `tolerance` of the truth's, and less beyond it: 0 from
    four times the tolerance on, and where there is no number."""

    def close(a: Answered) -> float:
        ours, theirs = (_NUMBER.search(_body(text)) for text in (a.answer, a.truth))
        if ours is None or theirs is None:
            return 0.0
        beyond = abs(float(ours[0]) - float(theirs[0])) - tolerance
        return float(min(max(1 - beyond / (3 * tolerance), 0.0), 1.0))

    return close


def r1_form(a: Answered) -> float:
    """1 if there is a thought that is not empty (ECG-R1)."""
    thought = _THOUGHT.search(a.answer)
    return float(thought is not None and bool(thought[1].strip()))


def r1_answer(a: Answered) -> float:
    """Jaccard of the findings, in answer tags and in the solution's own; a text without ";" is one finding (ECG-R1)."""
    tagged, solution = _ANSWER.search(a.answer), _SOLUTION.search(a.truth)
    ours, theirs = (m[1].strip().lower() if m else "" for m in (tagged, solution))
    if ";" in ours or ";" in theirs:
        return _jaccard(_findings(ours), _findings(theirs))
    return _jaccard({ours} - {""}, {theirs} - {""})


def r1_evidence(a: Answered) -> float:
    """How much of each step's key evidence the same step of the thought has, on average over the steps with any
    (ECG-R1)."""
    thought, evidence = _THOUGHT.search(a.answer), _EVIDENCE.search(a.truth)
    if thought is None or evidence is None:
        return 0.0
    pieces = _STEP.split(thought[1])
    said = {int(number): text.lower() for number, text in zip(pieces[1::2], pieces[2::2], strict=True)}
    shares = []
    for number, phrases in _STEP_LINE.findall(evidence[1]):
        wanted = _findings(phrases.lower())
        if wanted:
            shares.append(sum(phrase in said.get(int(number), "") for phrase in wanted) / len(wanted))
    return sum(shares) / len(shares) if shares else 0.0


def grounding(a: Answered) -> float:
    """F1 of the evidence: of what the answer says that is measured the part that is right, and of what a full answer
    cites the part that it has (`scoring.grounding`); 0 where nothing was measured, of all answers alike."""
    evidence = a.measured()
    return ground(a.answer, evidence).f1 if evidence else 0.0


REWARDS: Registry[Reward] = Registry(
    "rl.rewards",
    {
        "format": form, "format_strict": strict_form, "tags": tags, "answer": answer, "recall": recall,
        "jaccard": jaccard, "exact": exact, "r1_format": r1_form, "r1_answer": r1_answer, "r1_evidence": r1_evidence,
        "grounding": grounding,
    },
)  # fmt: skip


def register_reward(name: str, reward: Reward) -> None:
    """Make `reward` a name in the key `rl.rewards`.

    Raises:
        UserError: the name is no identifier, or the package's own.
    """
    REWARDS.register(name, reward)


def reward_of(name: str) -> Reward:
    """The reward of a name; "numeric(5)" is `numeric` with that tolerance.

    Raises:
        UserError: there is none.
    """
    called = re.fullmatch(r"numeric\(([0-9.]+)\)", name)
    if called is None:
        return REWARDS.find(name)
    try:
        tolerance = float(called[1])
    except ValueError:
        tolerance = 0.0
    if not 0 < tolerance < math.inf:
        raise UserError("rl.rewards", repr(name), "a tolerance above 0", "write for example numeric(5)")
    return numeric(tolerance)


def number(name: str, value: Any) -> float:
    """What a reward of this name has returned, as a float.

    Raises:
        UserError: it is no number, or not finite.
    """
    try:
        found = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # of any type that a user's function returns
        found = math.nan
    if not math.isfinite(found):
        raise UserError("the reward", f"{name}={value!r}", "a finite number", _FIX)
    return found


def judged(
    reward: Callable[[Any, str, str], float | Mapping[str, float]], record: Any, answer: str, truth: str
) -> dict[str, float]:
    """The parts of an answer's reward, by name ("reward" of one that has none).

    Raises:
        UserError: one is no finite number, or its function fails. Who calls it names the record.
    """
    try:
        found = reward(record, answer, truth)
    except UserError:
        raise
    except Exception as error:  # of a user's function
        raise UserError("the reward", f"{type(error).__name__}: {error}", "a finite number", _FIX) from error
    parts = found if isinstance(found, Mapping) else {"reward": found}
    return {name: number(name, value) for name, value in parts.items()}


def _body(text: str) -> str:
    """What is in the first answer tags, else the whole text; lower case."""
    tagged = _ANSWER.search(text)
    return (tagged[1] if tagged else text).strip().lower()


def _findings(text: str) -> set[str]:
    return {part.strip() for part in text.split(";")} - {""}


def _jaccard(ours: set[str], theirs: set[str]) -> float:
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0
