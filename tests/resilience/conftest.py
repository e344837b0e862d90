"""Runs in the test's own process know the layout `tiny`, and have a cache of their own."""

from pathlib import Path

import pytest
import runs


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs.prepare(monkeypatch, tmp_path / "cache")
