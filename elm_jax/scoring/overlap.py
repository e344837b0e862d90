"""BLEU and ROUGE: how many words, and runs of words, an answer has in common with its truth."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from rouge_score.tokenize import tokenize

from elm_jax.scoring.answers import spaced

BLEU_ORDERS = 4
_BLEU_EPSILON = 0.1
WORDS = 2**16  # that are remembered: words repeat, and to find a stem takes longer than all the rest of ROUGE-L


def bleu_counts(answer: str, truth: str) -> list[float]:
    """What corpus BLEU-4 sums over pairs, of words between blanks: hits and words in runs of 1 to 4, both lengths."""
    ours, theirs = answer.split(), truth.split()
    hits, totals = [], []
    for n in range(1, BLEU_ORDERS + 1):
        mine, other = _runs(ours, n), _runs(theirs, n)
        hits.append((mine & other).total())
        totals.append(max(1, mine.total()))
    return [float(x) for x in (*hits, *totals, len(ours), len(theirs))]


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4 (...) of summed counts (..., 10); an order without a hit counts 0.1 hits (NLTK's method 1).

    No word in common, or no word at all, is 0. Papineni et al. 2002. It is made for texts of four words and more: each
    shorter answer counts as one missed run of the lengths that it lacks, so that right answers of one word have 0.178
    alone, and 0.0002 where there are 10 000 of them.
    """
    hits, totals = sums[..., :BLEU_ORDERS], sums[..., BLEU_ORDERS : 2 * BLEU_ORDERS]
    ours, theirs = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(hits == 0, _BLEU_EPSILON, hits) / np.maximum(totals, 1)
        brevity = np.where(ours > theirs, 1.0, np.exp(1 - theirs / ours))
        score = brevity * np.exp(np.log(precision).mean(-1))
    return np.where((hits[..., 0] == 0) | (ours == 0), 0.0, score)


def rouge_l(answer: str, truth: str) -> float:
    """F-measure of the longest common subsequence of stemmed words, by the `rouge_score` package. Lin 2004.

    Words are runs of ASCII letters and digits: all else is dropped, so that a Chinese text has none.
    """
    return float(_rouge(_Stemmed).score(truth, answer)["rougeL"].fmeasure)


def rouge_l_in_any_script(answer: str, truth: str) -> float:
    """`rouge_l` of words in any script; of ASCII texts it is the same."""
    return float(_rouge(_InAnyScript).score(truth, answer)["rougeL"].fmeasure)


@cache
def stemmer() -> Any:
    """NLTK's Porter stemmer, which finds the stem of a word once."""
    from nltk.stem.porter import PorterStemmer  # slow to import

    found: Any = PorterStemmer()
    found.stem = lru_cache(WORDS)(found.stem)
    return found


class _Stemmed:
    """The package's own tokenizer, with stems that are remembered."""

    def tokenize(self, text: str) -> list[str]:
        return tokenize(text, stemmer())


class _InAnyScript(_Stemmed):
    """Words of letters, marks and digits of any script; English stems of those that are ASCII."""

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return super().tokenize(text)
        kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced(text).lower())
        return [stemmer().stem(w) if len(w) > 3 and w.isascii() else w for w in "".join(kept).split()]


@cache
def _rouge(tokenizer: type[_Stemmed]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    return RougeScorer(["rougeL"], tokenizer=tokenizer())


def rouge_n_of_sets(answer: str, truth: str, n: int) -> float:
    """F1 of the different runs of n words in common, as the `rouge` package counts (each run once, no stemming)."""
    ours, theirs = (set(_runs(" ".join(_sentences(text)).split(), n)) for text in (answer, truth))
    return _f_of(len(ours & theirs), len(ours), len(theirs))


def rouge_l_of_sets(answer: str, truth: str) -> float:
    """F1 of the words in the union of longest common subsequences over sentences, as the `rouge` package counts."""
    ours, theirs = _sentences(answer), _sentences(truth)
    union: set[str] = set()
    for theirs_one in theirs:
        for ours_one in ours:
            union.update(_common(theirs_one.split(), ours_one.split()))
    words = [set(" ".join(sentences).split()) for sentences in (ours, theirs)]
    return _f_of(len(union), len(words[0]), len(words[1]))


def _f_of(common: int, ours: int, theirs: int) -> float:
    precision, recall = (common / count if count else 0.0 for count in (ours, theirs))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(".") if part]


def _runs(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, one in enumerate(a, 1):
        row, above = table[i], table[i - 1]
        for j, other in enumerate(b, 1):
            row[j] = above[j - 1] + 1 if one == other else max(above[j], row[j - 1])
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
