"""Which of two answers is better, by a model of people's preferences: a folder of Hugging Face's on this machine.

Sources: PairRM, arXiv 2306.02561, in its Hugging Face form (DeBERTa-v2, the head on the vectors of the marks of the
question and of each answer); reward models, sequence classifiers with one output. They need PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elm_jax.errors import UserError
from elm_jax.text.vocabulary import load_tokenizer

_MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
_LONGEST = 2048  # tokens of a question with both answers, of PairRM
_QUESTION = 1224  # of these, the most of the question
_FIX = "give the folder of a pair-preference model (PairRM-hf) or of a reward model"


class PairJudge:
    """A judge from `folder`.

    Raises:
        UserError: PyTorch is not there, or the folder has no such model.
    """

    def __init__(self, folder: str | Path) -> None:
        where, path = "--judge", str(folder)
        if not Path(path, "config.json").is_file():
            raise UserError(where, f"{path} without config.json", "a model's folder on this machine", _FIX)
        try:
            import torch
            from transformers import AutoConfig, AutoModelForSequenceClassification
        except ImportError as error:
            raise UserError(where, str(error), "PyTorch, for a judge", "pip install torch") from error
        local: dict[str, Any] = {"local_files_only": True}
        self._torch, self._compares = torch, False
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **local)
            self._compares = hasattr(config, "source_prefix_id")
            if self._compares:
                self._model, self._head = _pair_ranker(path, config)
                self._marks = [config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id]
            else:
                more: dict[str, Any] = {**local, "use_safetensors": True, "adapter_kwargs": local}
                model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False, **more)
                self._model = model.eval()
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            found = f"{path}, which cannot be read: {str(error).splitlines()[0][:200]}"
            raise UserError(where, found, "a whole model with safetensors", _FIX) from error
        if not self._compares and (config.num_labels != 1 or not _classifies(config)):
            found = f"{path}, a {', '.join(config.architectures or ['model'])} with {config.num_labels} outputs"
            raise UserError(where, found, "a classifier with one output, or PairRM", _FIX)
        self._tokenizer = load_tokenizer(path, where, local_files_only=True)

    def margin(self, question: str, one: str, other: str) -> float:
        """How much better the first answer is; below 0 where the second is. Asked in both orders."""
        with self._torch.no_grad():
            if self._compares:
                return (self._ahead(question, one, other) - self._ahead(question, other, one)) / 2
            return self._worth(question, one) - self._worth(question, other)

    def _worth(self, question: str, answer: str) -> float:
        if getattr(self._tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            given = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            given = self._tokenizer(question, answer, return_tensors="pt")
        ids = {name: given[name] for name in ("input_ids", "attention_mask")}
        return float(self._model(**ids).logits[0, 0])

    def _ahead(self, question: str, one: str, other: str) -> float:
        encode = self._tokenizer.encode
        ids = encode(_MARKS[0] + question, max_length=_QUESTION, truncation=True)
        left = (_LONGEST - len(ids)) // 2
        for mark, answer in zip(_MARKS[1:], (one, other), strict=True):
            ids = ids + encode(mark + answer, max_length=left, truncation=True)
        given = self._torch.tensor([ids])
        states = self._model(input_ids=given, attention_mask=self._torch.ones_like(given)).last_hidden_state[0]
        asked, first, second = (states[ids.index(mark)] for mark in self._marks)
        scores = [self._head(self._torch.cat([asked, answer])) for answer in (first, second)]
        return float((scores[0] - scores[1]).mean())


def _classifies(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _pair_ranker(path: str, config: Any) -> tuple[Any, Any]:
    """PairRM's encoder, and its head: (2 D,) -> (tasks,)."""
    from safetensors.torch import load_file
    from torch import nn
    from transformers import DebertaV2Model

    arrays = load_file(Path(path) / "model.safetensors")
    model, width = DebertaV2Model(config), config.hidden_size
    head = nn.Sequential(
        nn.Dropout(0.0), nn.Linear(2 * width, width), nn.Tanh(), nn.Dropout(0.0), nn.Linear(width, config.n_tasks)
    )
    for part, prefix in ((model, "pretrained_model."), (head, "head_layer.")):
        part.load_state_dict({n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)})
    return model.eval(), head.eval()
