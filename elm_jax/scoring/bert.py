"""BERTScore: words matched by the similarity of their contextual embeddings. Zhang et al. 2020.

Defined as in the `bert_score` package without idf weights and without rescaling, texts stripped; not held against it.
It needs PyTorch and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_jax.errors import UserError
from elm_jax.text.vocabulary import load_tokenizer

# The layer that each model is read at, as the package has it.
LAYERS = {"roberta-large": 17, "roberta-base": 10, "distilroberta-base": 5, "bert-base-uncased": 9}
_BATCH = 64


class BertScore:
    """A model that embeds texts: `name` is one of LAYERS, on this machine, or a folder with `layer` given.

    Raises:
        UserError: PyTorch, the weights or the layer are not there.
    """

    def __init__(self, name: str, layer: int | None = None) -> None:
        where, known = "eval.bert_model", LAYERS.get(name.rstrip("/").rpartition("/")[2])
        if layer is None and known is None:
            expected = f"one of {', '.join(LAYERS)}, or a folder called so"
            raise UserError(where, name, expected, "name one of them; BERTScore reads each at its own layer")
        try:
            import torch
            from transformers import AutoModel

            # Where PEFT is installed, transformers asks the hub for adapters too, unless these are local as well.
            local: dict[str, Any] = {"local_files_only": True, "adapter_kwargs": {"local_files_only": True}}
            self._model: Any = AutoModel.from_pretrained(name, trust_remote_code=False, **local).eval()
            # RoBERTa has other tokens for a word behind a blank; the package reads the first one so too.
            behind_blank = {"add_prefix_space": True} if self._model.config.model_type == "roberta" else {}
        except ImportError as error:
            raise UserError(where, str(error), "PyTorch, for BERTScore", "pip install torch") from error
        except (OSError, ValueError) as error:
            fix = f"download it with `hf download {name}`, or give a folder"
            raise UserError(where, f"no weights of {name} on this machine", "a downloaded model", fix) from error
        self._tokenizer: Any = load_tokenizer(name, where, local_files_only=True, **behind_blank)
        self._torch, self._layer = torch, layer or known

    def scores(self, answers: Sequence[str], truths: Sequence[str]) -> np.ndarray:
        """(n, 3): precision, recall and F1 of each answer; an empty text scores 0."""
        order = np.argsort([len(a) + len(t) for a, t in zip(answers, truths, strict=True)], kind="stable")
        found = np.zeros((len(answers), 3))
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            ours, theirs = (self._embedded([str(texts[i]).strip() for i in chosen]) for texts in (answers, truths))
            for place, (a, b) in zip(chosen, zip(ours, theirs, strict=True), strict=True):
                if str(answers[place]).strip() and str(truths[place]).strip():
                    found[place] = _matched(a, b)
        return found

    def _embedded(self, texts: list[str]) -> list[np.ndarray]:
        """Of each text its tokens' unit vectors (T, D), those of the two special tokens at the ends included."""
        limit = min(self._tokenizer.model_max_length, 512)
        given = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=limit)
        with self._torch.no_grad():
            states = self._model(**given, output_hidden_states=True).hidden_states[self._layer].double().numpy()
        states /= np.linalg.norm(states, axis=-1, keepdims=True)
        return [row[mask.numpy() > 0] for row, mask in zip(states, given["attention_mask"], strict=True)]


def _matched(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Each token takes its best partner; the special tokens may be partners, but do not count."""
    similar = ours @ theirs.T
    precision, recall = float(similar.max(1)[1:-1].mean()), float(similar.max(0)[1:-1].mean())
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0
