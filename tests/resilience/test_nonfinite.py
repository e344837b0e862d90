"""The short form of scripts/reliability/nonfinite.py: faults of every kind in one run."""

from pathlib import Path

import nonfinite
import pytest


@pytest.mark.slow
def test_what_is_not_finite_leaves_no_trace_and_is_named(tmp_path: Path) -> None:
    assert nonfinite.goes_on(tmp_path, *next(iter(nonfinite.CASES.values()))) == ""
