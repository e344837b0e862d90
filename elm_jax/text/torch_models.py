"""Folders of Hugging Face models that PyTorch runs: what their config.json claims, before memory is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from elm_jax.errors import UserError
from elm_jax.folders import check_regular, read_json

_PARTS = 10_000  # the most layers, or labels, that config.json may speak of: lists of them are made as it is read
_SMALL = 1 << 24  # numbers that a model may have room for beside those of its files
_WEIGHTS = ("*.safetensors", "*.bin")


def check_parts(file: Path, where: str, fix: str) -> None:
    """Raise UserError, naming `where`, if config.json claims more layers or labels than any model has."""
    for name, count in re.findall(r'"(\w*(?:layer|label)\w*)": (\d+)', json.dumps(read_json(file, fix))):
        if len(count) > len(str(_PARTS)) or int(count) > _PARTS:
            raise UserError(where, f"{file} with {name}={count}", f"at most {_PARTS}", fix)


def check_room(
    folder: str | Path, where: str, expected: str, fix: str, *parts: Any, held: int | None = None
) -> None:  # fmt: skip
    """Raise UserError, naming `where`, if a model, which has no memory yet, would have more numbers than its files
    hold: `held`, or not more than they have bytes."""
    if held is None:
        held = 0
        for file in (file for pattern in _WEIGHTS for file in Path(folder).glob(pattern)):
            check_regular(file, "a file of a model")
            held += file.stat().st_size
    for claimed in zip(*(map(_size, (part.parameters(), part.buffers())) for part in parts), strict=True):
        if sum(claimed) > held + _SMALL:
            found = f"{folder}, whose config.json asks for {sum(claimed)} numbers where its files hold {held} at most"
            raise UserError(where, found, expected, fix)


def _size(arrays: Iterable[Any]) -> int:
    return sum(array.numel() for array in arrays)
