"""Where the goldens are, and what is in them: for tests that are listed before any fixture is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "tests" / "data" / "golden"  # copies of some, small enough to come along


def shared() -> Path:
    """The folder with reference data: ELM_JAX_SHARED, else `shared` beside the project."""
    return Path(os.environ.get("ELM_JAX_SHARED") or ROOT.parent / "shared")


def find(name: str) -> Path:
    """The folder of a golden, which need not be there: what ELM_JAX_SHARED names goes before our own copies."""
    folder = shared() / "golden" / name
    if os.environ.get("ELM_JAX_SHARED") and folder.is_dir():
        return folder
    return OWN / name if (OWN / name).is_dir() else folder


def config(name: str, file: str = "config.json") -> dict[str, Any]:
    """A JSON object of a golden; empty where there are no goldens."""
    path = find(name) / file
    return json.loads(path.read_text()) if path.is_file() else {}


def cases(name: str, file: str = "cases.npz", keep: Callable[[str], bool] = lambda case: True) -> list[str]:
    """The names before the stroke in a file of arrays, in their order; none where there are no goldens."""
    path = find(name) / file
    if not path.is_file():
        return []
    with np.load(path) as arrays:
        return [case for case in dict.fromkeys(key.split("/")[0] for key in arrays) if keep(case)]
