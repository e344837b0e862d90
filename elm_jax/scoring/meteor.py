"""METEOR, by NLTK, which needs WordNet's synonyms. Banerjee and Lavie 2005."""

from __future__ import annotations

import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from elm_jax.errors import UserError
from elm_jax.scoring.overlap import WORDS, stemmer

_FIX = "run `python -m nltk.downloader wordnet`, or set --config.eval.wordnet (of compare: --wordnet)"


class Meteor:
    """Scores of answers, from 0 to 1. `folder` is one of NLTK's data, with corpora/wordnet or wordnet.zip in it.

    Without `folder` NLTK's usual places are looked at, those of NLTK_DATA among them.

    Raises:
        UserError: there is no WordNet, or it is not whole.
    """

    def __init__(self, folder: str | None = None) -> None:
        import nltk.data  # slow to import, and not needed for anything else
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
        from nltk.translate.meteor_score import single_meteor_score

        places, looked_at = nltk.data.path, "NLTK's folders"
        if folder is not None:
            looked_at = str(Path(folder).expanduser().absolute())
            places = [looked_at]
            nltk.data.path[:0] = set(places).difference(nltk.data.path)  # it reads nothing that lies elsewhere
        wanted = "corpora/wordnet, for METEOR"
        try:
            root: Any = nltk.data.find("corpora/wordnet", places)
            with warnings.catch_warnings():  # there are no other languages here
                warnings.simplefilter("ignore")
                reader: Any = WordNetCorpusReader(root, None)
        except LookupError:
            raise UserError("eval.wordnet", f"no WordNet in {looked_at}", wanted, _FIX) from None
        except (OSError, ValueError, AssertionError, StopIteration) as error:
            raise UserError("eval.wordnet", f"{looked_at}: {error}", f"{wanted}, whole", _FIX) from error
        reader.synsets = lru_cache(WORDS)(reader.synsets)  # it reads them in its files
        self._score = partial(single_meteor_score, stemmer=stemmer(), wordnet=reader)

    def __call__(self, answer: str, truth: str) -> float:
        """The score of one pair; words are what stands between blanks, in lower case."""
        return self._score(truth.split(), answer.split())
