"""Protocols: by which rules answers become numbers. One table; `eval.protocol` names a row.

Published scores of one model differ by more between protocols than many models do under one; a number without its
protocol says little. What a protocol decides about generation is not in its power here: `differs` says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elm_jax.scoring.answers import TAGS, composed, split_response

STRING_METRICS = ("exact_match", "token_f1", "bleu4", "rouge_l", "meteor")
BERT_METRICS = ("bert_precision", "bert_recall", "bert_f1")
ROUGE_PACKAGE = ("rouge_package_1", "rouge_package_2", "rouge_package_l")
BERT_MODEL = "roberta-large"


@dataclass(frozen=True)
class Protocol:
    """How predictions are scored.

    metrics: what is computed of each pair with a truth. bert: whether BERTScore is, even if no model is named.
    empty_answers: whether a pair with an empty answer counts, as wrong; else it is left out.
    special_tokens: what of them stays in answers and truths: the think and answer "tags"; "none"; or "end": tags, and
        behind each the end token, which an answer has only if it ended by itself.
    parts: whether thinking and answer are scored apart.
    intervals: over samples by "bootstrap", or over runs by "student_t" where there are several.
    any_script: whether words are those of any script, and characters where a script writes no blanks between words;
        else they are what stands between blanks, and for ROUGE-L ASCII letters and digits. Of ASCII texts both are one.
    own_metrics: whether questions that have a metric of their own (heart rate, answer sets) are scored by it too.
    differs: how the published runs generated otherwise than this program does by default.
    """

    meaning: str
    metrics: tuple[str, ...]
    bert: bool
    empty_answers: bool
    special_tokens: Literal["tags", "none", "end"]
    parts: bool
    intervals: Literal["bootstrap", "student_t"]
    any_script: bool
    own_metrics: bool
    differs: str


PROTOCOLS: dict[str, Protocol] = {
    "ours": Protocol(
        meaning="answer part; empty truths left out, empty answers wrong; bootstrap over patients",
        metrics=STRING_METRICS, bert=False, empty_answers=True, special_tokens="tags", parts=True,
        intervals="bootstrap", any_script=True, own_metrics=True, differs="",
    ),
    "elm-2026-08": Protocol(
        meaning="ECG-Language-Models since 2026-07-26: empty answers wrong, tags visible, Student's t over runs",
        metrics=STRING_METRICS, bert=False, empty_answers=True, special_tokens="tags", parts=True,
        intervals="student_t", any_script=False, own_metrics=False,
        differs="answers were drawn as the model's generation_config says, with seeds 1337 and 1338",
    ),
    "elm-2026-04": Protocol(
        meaning="ELM of April 2026: empty answers left out, all special tokens and so the tags removed, BERTScore",
        metrics=STRING_METRICS, bert=True, empty_answers=False, special_tokens="none", parts=False,
        intervals="student_t", any_script=False, own_metrics=False,
        differs="answers were drawn as the model's generation_config says, with seeds 1337 and 1338",
    ),
    "ecg-bench-2025": Protocol(
        meaning="ECG-Bench of 2025 and its papers: end tokens compared too, empty answers left out, ROUGE of the"
        " package rouge, BERTScore",
        metrics=("exact_match", "bleu4", "meteor", *ROUGE_PACKAGE), bert=True, empty_answers=False,
        special_tokens="end", parts=False, intervals="student_t", any_script=False, own_metrics=False,
        differs="later turns followed generated answers, not the true ones; answers were drawn, with seeds 0 and 1",
    ),
}  # fmt: skip


def seen_by(protocol: Protocol, text: str, end: str) -> tuple[str, str]:
    """(thinking, answer) of a text as the protocol compares it; `end` is what stands behind it: an end token, or "".

    Texts are composed (Unicode's NFC), answers as truths.
    """
    text = composed(text)
    if protocol.special_tokens == "none":
        for tag in TAGS:
            text = text.replace(tag, "")
        text = text.strip()
    if protocol.special_tokens == "end":
        text += end
    return split_response(text) if protocol.parts else ("", text)
