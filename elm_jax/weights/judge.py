"""Which of two answers is better, by a model of people's preferences: a folder of Hugging Face's on this machine.

Sources: PairRM, arXiv 2306.02561, in its Hugging Face form (DeBERTa-v2, the head on the vectors of the marks of the
question and of each answer); reward models, sequence classifiers with one output. They need PyTorch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from elm_jax.errors import UserError
from elm_jax.text.torch_models import check_parts, check_room
from elm_jax.text.vocabulary import load_tokenizer, refused_panics
from elm_jax.weights.safetensors import Safetensors

_MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
_LONGEST = 2048  # tokens of a question with both answers, of PairRM
_QUESTION = 1224  # of these, the most of the question
_WHERE, _EXPECTED = "--judge", "a whole model with safetensors"
_ENDLESS = 1 << 31  # what has no bound on its tokens says more
_FIX = "give the folder of a pair-preference model (PairRM-hf) or of a reward model"


class PairJudge:
    """A judge from `folder`.

    Raises:
        UserError: PyTorch is not there, or the folder has no such model.
    """

    def __init__(self, folder: str | Path) -> None:
        path = str(folder)
        if not Path(path, "config.json").is_file():
            raise UserError(_WHERE, f"{path} without config.json", "a model's folder on this machine", _FIX)
        try:
            import torch
            from transformers import AutoConfig, AutoModelForSequenceClassification
        except ImportError as error:
            raise UserError(_WHERE, str(error), "PyTorch, for a judge", "pip install torch") from error
        local: dict[str, Any] = {"local_files_only": True}
        self._torch, self._compares = torch, False
        with refused_panics(_WHERE, f"{path}, which cannot be read", _EXPECTED, _FIX):
            check_parts(Path(path, "config.json"), _WHERE, _FIX)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **local)
            self._compares = hasattr(config, "source_prefix_id")
            if self._compares:
                with torch.device("meta"):
                    check_room(path, _WHERE, _EXPECTED, _FIX, *_pair_ranker(config), held=_numbers(path))
                self._model, self._head = _pair_ranker(config)
                _load(path, self._model, self._head)
                self._marks = [config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id]
            else:
                with torch.device("meta"):
                    empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
                    check_room(path, _WHERE, _EXPECTED, _FIX, empty, held=_numbers(path))
                more: dict[str, Any] = {**local, "use_safetensors": True, "adapter_kwargs": local}
                model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False, **more)
                self._model = model.eval()
            if not self._compares and (config.num_labels != 1 or not _classifies(config)):
                found = f"{path}, a {', '.join(config.architectures or ['model'])} with {config.num_labels} outputs"
                raise UserError(_WHERE, found, "a classifier with one output, or PairRM", _FIX)
        self._tokenizer = load_tokenizer(path, _WHERE, local_files_only=True)

    def margin(self, question: str, one: str, other: str) -> float:
        """How much better the first answer is; below 0 where the second is. Asked in both orders.

        Raises:
            UserError: the model, its tokenizer or its chat template fails at them, or gives no finite number.
        """
        expected, fix = "a number for each answer", "leave the record out, or give another model"
        failing = refused_panics(_WHERE, "a model that fails at a question and its answers", expected, fix)
        with failing, self._torch.no_grad():
            if self._compares:
                margin = (self._ahead(question, one, other) - self._ahead(question, other, one)) / 2
            else:
                margin = self._worth(question, one) - self._worth(question, other)
        if not math.isfinite(margin):
            raise UserError(_WHERE, f"a model that finds an answer {margin} better", "a finite number", fix)
        return margin

    def _worth(self, question: str, answer: str) -> float:
        """The reward; of what is longer than the model takes, the end is left out."""
        most = getattr(self._model.config, "max_position_embeddings", None), self._tokenizer.model_max_length
        bounds = [n for n in most if n and 0 < n < _ENDLESS]
        options: dict[str, Any] = {"return_tensors": "pt"}
        options |= {"truncation": True, "max_length": min(bounds)} if bounds else {}
        if getattr(self._tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            given = self._tokenizer(text, add_special_tokens=False, **options)
        else:
            given = self._tokenizer(question, answer, **options)
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


def _numbers(path: str) -> int:
    """How many numbers are in a folder's safetensors files, by their headers."""
    files = Path(path).glob("*.safetensors")
    try:
        return sum(math.prod(info.shape) for file in files for info in Safetensors(file).info.values())
    except UserError as error:
        found = f"{path}, which cannot be read ({error.where}: {error.found})"
        raise UserError(_WHERE, found, _EXPECTED, _FIX) from None


def _pair_ranker(config: Any) -> tuple[Any, Any]:
    """PairRM's encoder, and its head: (2 D,) -> (tasks,)."""
    from torch import nn
    from transformers import DebertaV2Model

    width = config.hidden_size
    head = nn.Sequential(
        nn.Dropout(0.0), nn.Linear(2 * width, width), nn.Tanh(), nn.Dropout(0.0), nn.Linear(width, config.n_tasks)
    )
    return DebertaV2Model(config).eval(), head.eval()


def _load(path: str, model: Any, head: Any) -> None:
    """PairRM's weights; the names and shapes must be those of the file."""
    from safetensors.torch import load_file

    arrays = load_file(Path(path) / "model.safetensors")
    for part, prefix in ((model, "pretrained_model."), (head, "head_layer.")):
        part.load_state_dict({n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)})
