"""WordNet's database files, for the synonyms that METEOR needs. Princeton WordNet 3.0: index.*, data.*, *.exc."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from elm_jax.errors import UserError

VARIABLE = "WNSEARCHDIR"  # WordNet's own
_PLACES = (
    "/usr/share/wordnet", "/usr/local/share/wordnet", "~/nltk_data/corpora/wordnet",
    "/usr/share/nltk_data/corpora/wordnet",
)  # fmt: skip
_PARTS = ("noun", "verb", "adj", "adv")
_ENDINGS = {
    "noun": (
        ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
        ("men", "man"), ("ies", "y"),
    ),
    "verb": (
        ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip
_MARKER = re.compile(r"\([a-z]+\)$")  # where an adjective may stand: "galore(ip)"


def find_wordnet(folder: str | None = None) -> Path:
    """The folder with WordNet's files: `folder`, else the variable WNSEARCHDIR, else one of the usual places.

    Raises:
        UserError: it is nowhere.
    """
    named = folder or os.environ.get(VARIABLE)
    for place in [named] if named else _PLACES:
        path = Path(str(place)).expanduser()
        if (path / "index.noun").is_file():
            return path
    raise UserError(
        "eval.wordnet", f"no index.noun in {named or ', '.join(_PLACES)}", "WordNet 3.0's database files",
        f"install WordNet (Debian: wordnet-base) or set --config.eval.wordnet or {VARIABLE}; METEOR needs it",
    )  # fmt: skip


class WordNet:
    """Synonyms of words. `folder` holds the database files, which are read whole (30 MB, about a second)."""

    def __init__(self, folder: Path) -> None:
        self._synsets: dict[str, dict[str, list[int]]] = {part: _index(folder / f"index.{part}") for part in _PARTS}
        self._lemmas = {part: _data(folder / f"data.{part}") for part in _PARTS}
        self._irregular = {part: _exceptions(folder / f"{part}.exc") for part in _PARTS}
        self.synonyms = lru_cache(maxsize=65536)(self._synonyms)

    def _synonyms(self, word: str) -> set[str]:
        """The word itself and all single words that share a meaning with it."""
        found = {word}
        for part in _PARTS:
            for form in self._base_forms(word.lower(), part):
                for synset in self._synsets[part][form]:
                    found.update(self._lemmas[part][synset])
        return found

    def _base_forms(self, word: str, part: str) -> list[str]:
        """What `word` may be an inflection of, itself included (WordNet's morphy)."""
        known = self._synsets[part]

        def kept(forms: list[str]) -> list[str]:
            return [form for form in dict.fromkeys(forms) if form in known]

        if word in self._irregular[part]:
            return kept([word, *self._irregular[part][word]])
        forms = self._detached([word], part)
        found = kept([word, *forms])
        while forms and not found:
            forms = self._detached(forms, part)
            found = kept(forms)
        return found

    @staticmethod
    def _detached(forms: list[str], part: str) -> list[str]:
        return [
            form[: len(form) - len(old)] + new for form in forms for old, new in _ENDINGS[part] if form.endswith(old)
        ]


def _index(path: Path) -> dict[str, list[int]]:
    """Lemma -> where its synsets begin in the data file."""
    found = {}
    for line in _lines(path):
        lemma, _, synsets, pointers, *rest = line.split()
        found[lemma] = [int(offset) for offset in rest[int(pointers) + 2 :][: int(synsets)]]
    return found


def _data(path: Path) -> dict[int, tuple[str, ...]]:
    """Synset -> its lemmas of one word."""
    found = {}
    for line in _lines(path):
        offset, _, _, count, *rest = line.split(" ")
        lemmas = (_MARKER.sub("", lemma) for lemma in rest[: 2 * int(count, 16) : 2])
        found[int(offset)] = tuple(lemma for lemma in lemmas if "_" not in lemma)
    return found


def _exceptions(path: Path) -> dict[str, list[str]]:
    return {form: bases for form, *bases in (line.split() for line in _lines(path))}


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), str(error), "a file of WordNet's database", "install WordNet again") from error
    return [line for line in text.splitlines() if line and not line.startswith("  ")]  # the licence is indented
