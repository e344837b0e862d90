"""docs/data has a page for each dataset, which says what the package knows of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from elm_jax.data.prepare import DATASETS
from elm_jax.data.prepare.about import ABOUT, about_page
from elm_jax.data.prepare.conversations import CONVERSATIONS
from elm_jax.data.prepare.ecg_qa import HOLDS
from elm_jax.data.prepare.ptb_xl_plus import HOLDS as PLUS

DOCS = Path(__file__).resolve().parents[2] / "docs/data"
HELD = {name: row.holds for name, row in DATASETS.packaged().items()} | CONVERSATIONS
HELD |= {"ecg_qa": HOLDS, "ecg_lm": PLUS}


def test_each_dataset_has_a_page_that_is_listed() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert not [name for name in HELD if f"({name}.md)" not in index or not (DOCS / f"{name}.md").is_file()]
    assert HELD.keys() - ABOUT.keys() == {"folder", "conversations"}  # of which there is nothing to know


@pytest.mark.parametrize("name", ABOUT)
def test_a_page_begins_with_what_is_known(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(about_page(name, HELD[name])), "run scripts/dataset_pages.py"
    assert "\n## What comes out\n" in page


def test_a_dataset_whose_licence_is_not_known_to_the_hub_is_not_taken_for_free() -> None:
    assert not [name for name, about in ABOUT.items() if not about.hub and about.licence and not about.restricted]
