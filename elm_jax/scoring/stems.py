"""Stems of words, for the metrics that compare these."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

WORDS = 2**16  # that are remembered: words repeat, and to find a stem takes longer than all the rest of ROUGE-L


@cache
def stemmer() -> Any:
    """NLTK's Porter stemmer, which finds the stem of a word once."""
    from nltk.stem.porter import PorterStemmer  # slow to import

    found: Any = PorterStemmer()
    found.stem = lru_cache(WORDS)(found.stem)
    return found
