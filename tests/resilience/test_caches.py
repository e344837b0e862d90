"""Each file of a run's config, tokenizer and caches, damaged: the short form of scripts/reliability/caches.py."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "reliability"


def test_every_damage_is_found_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # which the script sets
    import caches

    found = caches.all_kinds(tmp_path, 2, 0, random.Random(0))
    assert {kind: caches.failures(counts) for kind, counts in found.items()} == dict.fromkeys(found, 0), found
    assert sum(map(sum, (counts.values() for counts in found.values()))) > 70
    sys.modules.pop("caches")
