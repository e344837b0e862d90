"""METEOR as NLTK computes it: words are aligned if they are equal, have one stem, or are synonyms in WordNet.

Banerjee and Lavie 2005, with alpha 0.9, beta 3 and gamma 0.5.
"""

from __future__ import annotations

from collections.abc import Callable

from elm_jax.evaluation.scores.porter import stem
from elm_jax.evaluation.scores.wordnet import WordNet

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
_Words = list[tuple[int, str]]  # with their places


def meteor(answer: str, truth: str, wordnet: WordNet) -> float:
    """The score of `answer`, from 0 to 1; words are what stands between blanks, in lower case."""
    ours: _Words = list(enumerate(answer.lower().split()))
    theirs: _Words = list(enumerate(truth.lower().split()))
    words, expected = len(ours), len(theirs)
    pairs = _aligned(ours, theirs, lambda word: {word})
    # What is left over is compared by stems from here on, in WordNet too: NLTK hands on the stems.
    ours, theirs = ([(place, stem(word)) for place, word in part] for part in (ours, theirs))
    pairs += _aligned(ours, theirs, lambda word: {word})
    pairs += _aligned(ours, theirs, wordnet.synonyms)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / words, len(pairs) / expected
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    return mean * (1 - GAMMA * (_chunks(sorted(pairs)) / len(pairs)) ** BETA)


def _aligned(ours: _Words, theirs: _Words, meanings: Callable[[str], set[str]]) -> list[tuple[int, int]]:
    """Pairs of places, found from the end; what is paired is taken out of both lists."""
    pairs = []
    for i in reversed(range(len(ours))):
        same = meanings(ours[i][1])
        j = next((j for j in reversed(range(len(theirs))) if theirs[j][1] in same), None)
        if j is not None:
            pairs.append((ours.pop(i)[0], theirs.pop(j)[0]))
    return pairs


def _chunks(pairs: list[tuple[int, int]]) -> int:
    """Runs of pairs that are neighbours in both texts."""
    return 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in zip(pairs, pairs[1:], strict=False))
