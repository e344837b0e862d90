"""ECG-Reasoning-Benchmark's samples as conversations: each step a question with its options, and its true answer.

`evaluate` asks every answer of a conversation after the true ones before it, which is the benchmark's protocol. A
published sample is {"metadata", "data": {"initial_diagnostic_question", "reasoning"}}, as `scoring.reasoning` says.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from elm_jax.errors import UserError
from elm_jax.scoring import reasoning
from elm_jax.text.turns import decode_text

NAME = "ecg_reasoning_benchmark"
_PATHS = {"ptbxl": "PTB-XL", "mimic_iv_ecg": "MIMIC-IV-ECG"}
_ONE, _SEVERAL = "One of the following options is right:", "One or more of the following options are right:"
_ALONE = "Answer with the full text of the option and nothing else."
_FIX = "download it again"


def is_sample(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the benchmark."""
    return {"metadata", "data"} <= row.keys()


def recording_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """(path of the recording as its dataset has it, the dataset, the diagnosis). Raises UserError."""
    about = _mapping(row, "metadata")
    source, diagnosis = (_text(about, key, "metadata") for key in ("data_source", "target_dx"))
    if source not in _PATHS:
        raise UserError("metadata.data_source", repr(source), f"one of {', '.join(_PATHS)}", _FIX)
    number = _number(about, "ecg_id")
    if source == "ptbxl":
        return f"records500/{int(number) // 1000 * 1000:05d}/{int(number):05d}_hr", source, diagnosis
    subject = _number(about, "subject_id")
    return f"files/p{subject[:4]}/p{subject}/s{number}/{number}", source, diagnosis


def turns_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation; answers are told by `step`. Raises UserError where it is not as the benchmark has it."""
    return [turn for step, asked, where in _steps(row) for turn in _exchange(step, asked, where)]


def _steps(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """(step, question, where it stands) in the order in which they are asked."""
    data = _mapping(row, "data")
    first = _mapping(data, reasoning.INITIAL, "data")
    label, said = _mapping(row, "metadata").get("dx_label"), str(first.get("answer")).strip().lower()
    if not isinstance(label, bool) or said != ("yes" if label else "no"):
        found = f"dx_label {label} and the answer {first.get('answer')!r} to the first question"
        raise UserError("metadata.dx_label", found, "true and Yes, or false and No", _FIX)
    yield reasoning.INITIAL, first, f"data.{reasoning.INITIAL}"
    loops = data.get("reasoning")
    if not isinstance(loops, list) or not loops:
        raise UserError("data.reasoning", _shown(loops), "a list of loops", _FIX)
    for number, loop in enumerate(loops):
        where = f"data.reasoning[{number}]"
        if not isinstance(loop, Mapping):
            raise UserError(where, _shown(loop), "a loop with its steps", _FIX)
        for step in (reasoning.CRITERION, reasoning.FINDING):
            yield step, _mapping(loop, step, where), f"{where}.{step}"
        grounding = loop.get("ecg_grounding") or []
        if not isinstance(grounding, list):
            raise UserError(f"{where}.ecg_grounding", _shown(grounding), "a list of questions", _FIX)
        for place, asked in enumerate(grounding):
            kind = asked.get("question_type") if isinstance(asked, Mapping) else asked
            if kind not in reasoning.GROUNDING:
                expected = f"a question_type of {', '.join(reasoning.GROUNDING)}"
                raise UserError(f"{where}.ecg_grounding[{place}]", _shown(kind), expected, _FIX)
            yield kind, asked, f"{where}.ecg_grounding[{place}]"
        decision = _mapping(loop, reasoning.DECISION, where)
        last = reasoning.FINAL if number == len(loops) - 1 else reasoning.DECISION
        yield last, decision, f"{where}.{reasoning.DECISION}"


def _exchange(step: str, asked: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    question, options, said = _text(asked, "question", where), asked.get("options"), asked.get("answer")
    answers: list[Any] = said if isinstance(said, list) else [said]
    if not isinstance(options, list) or not all(isinstance(one, str) and one.strip() for one in options):
        raise UserError(f"{where}.options", _shown(options), "a list of texts", _FIX)
    if not answers or not all(one in options for one in answers):
        raise UserError(f"{where}.answer", _shown(said), "one of the options, or a list of them", _FIX)
    right = _SEVERAL if "select all" in question.lower() else _ONE
    text = "\n".join([question, right, *(f"- {option}" for option in options), _ALONE])
    return [{"from": "human", "value": text}, {"from": "gpt", "value": ", ".join(answers), "step": step}]


def _mapping(within: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    value = decode_text(within.get(key))
    if not isinstance(value, Mapping):
        raise UserError(f"{where}.{key}".strip("."), _shown(value), "an object, as the benchmark has it", _FIX)
    return value


def _text(within: Mapping[str, Any], key: str, where: str) -> str:
    value = within.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}.{key}", _shown(value), "a text", _FIX)
    return value.strip()


def _number(about: Mapping[str, Any], key: str) -> str:
    value = str(about.get(key))
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise UserError(f"metadata.{key}", _shown(about.get(key)), "the number of the recording or patient", _FIX)
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
