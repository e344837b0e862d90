"""BERTScore with a tiny model of random weights: what its definition promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elm_jax.errors import UserError
from elm_jax.scoring.bert import BertScore

torch = pytest.importorskip("torch", reason="BERTScore needs PyTorch")
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "sinus", "rhythm", "normal", "ecg", "af"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    out = tmp_path_factory.mktemp("bert") / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(out)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(out)
    return out


def test_equal_texts_score_one_and_empty_ones_zero(folder: Path) -> None:
    score = BertScore(str(folder), layer=1)
    found = score.scores(["sinus rhythm", "", "af", "normal ecg"], ["sinus rhythm", "af", "", "af"])
    assert found[0] == pytest.approx([1, 1, 1])
    assert found[1].tolist() == found[2].tolist() == [0, 0, 0]
    assert np.all(found[3] < 1)


def test_texts_are_stripped(folder: Path) -> None:
    found = BertScore(str(folder), layer=1).scores(["  sinus rhythm\n", " \n"], ["sinus rhythm", "af"])
    assert found[0] == pytest.approx([1, 1, 1]) and found[1].tolist() == [0, 0, 0]


def test_roberta_reads_the_first_word_as_one_behind_a_blank(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "\u0120": 6, "\u0120a": 7}
    whole = Tokenizer(models.BPE(words, [("\u0120", "a")], unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    RobertaTokenizerFast(tokenizer_object=whole).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(RobertaConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(tmp_path)
    score = BertScore(str(tmp_path), layer=1)
    assert score._tokenizer("a a")["input_ids"] == [0, 7, 7, 2]


def test_precision_and_recall_change_places_with_the_texts(folder: Path) -> None:
    score = BertScore(str(folder), layer=2)
    one = score.scores(["sinus rhythm normal"], ["af ecg"])[0]
    other = score.scores(["af ecg"], ["sinus rhythm normal"])[0]
    assert one == pytest.approx(other[[1, 0, 2]])
    assert one[2] == pytest.approx(2 * one[0] * one[1] / (one[0] + one[1]))


def test_what_is_not_there_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="reads each at its own layer"):
        BertScore(str(folder))
    with pytest.raises(UserError, match="no weights of"):
        BertScore(str(tmp_path / "roberta-large"))
