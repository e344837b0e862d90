"""Writes how each page docs/data/<name>.md begins, from what `elm_jax.data.prepare.about` knows.

    python scripts/dataset_pages.py

A page's own text, from its first heading of the second order on, stays. `tests/unit/test_dataset_pages.py` holds the
pages against the same facts.
"""

import argparse
from pathlib import Path

from elm_jax.data.prepare import DATASETS
from elm_jax.data.prepare.about import ABOUT, about_page
from elm_jax.data.prepare.conversations import CONVERSATIONS
from elm_jax.data.prepare.ecg_qa import HOLDS
from elm_jax.data.prepare.ptb_xl_plus import HOLDS as PLUS

DOCS = Path(__file__).resolve().parents[1] / "docs/data"


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    holds = {name: row.holds for name, row in DATASETS.items()} | CONVERSATIONS
    holds |= {"ecg_qa": HOLDS, "ecg_lm": PLUS}
    for name in ABOUT:
        page = DOCS / f"{name}.md"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        own = text[text.index("\n## ") :] if "\n## " in text else "\n"
        page.write_text(about_page(name, holds[name]) + own, encoding="utf-8")


if __name__ == "__main__":
    main()
