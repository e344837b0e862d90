"""Losses of seven small runs, bit for bit as they are on record: what a change of structure must not move.

A change that is meant to move them writes new ones (`scripts/curves.py --write`) in a commit that says why.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
# On a processor or with a jaxlib that none was recorded with: sums in another order, enlarged by twenty steps.
ELSEWHERE = 1e-2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("curves", ROOT / "scripts" / "curves.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # seven trainings
def test_losses_are_those_on_record(script: ModuleType) -> None:
    here = script.RECORD.exists()
    record = script.RECORD if here else sorted(script.RECORD.parent.glob("*.json"))[-1]
    found = script.curves(ROOT, list(script.CASES), warm.python())
    expected = json.loads(record.read_text())
    assert found.keys() == expected.keys()
    for case, losses in found.items():
        assert len(losses) == script.STEPS and losses[-1] < losses[0], case
        assert losses == (expected[case] if here else pytest.approx(expected[case], rel=ELSEWHERE)), case
