"""Packages that a format needs and the base installation lacks."""

import importlib
from pathlib import Path
from typing import Any

from elm_jax.errors import UserError


def needed(path: Path, package: str, what: str) -> Any:
    """The package that reads `what`. Raises UserError, which says how to get it, where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        fix = f"pip install {package} (or elm_jax with its extra `formats`)"
        raise UserError(path, f"{what}, but {error}", f"the Python package {package}", fix) from None
