"""What a dataset asks of retrieval, which is above it (`elm_jax.retrieval`): words about recordings like an ECG."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from elm_jax.text.turns import Words


class Sought(NamedTuple):
    """An ECG for which others are retrieved.

    about: the patients whose recordings must not be found. name: tells it, with these and as its file is now, from all
    others. signal: reads its leads (C, L) in mV; raises UserError.
    """

    path: str
    about: frozenset[str]
    name: int
    signal: Callable[[], np.ndarray]


class Retrieving(Protocol):
    """What `retrieval.lookup` does for a view: words about the recordings that are most like an ECG."""

    @property
    def fingerprint(self) -> str: ...

    def words(self, sought: Sought) -> Words: ...

    def looked_up(self, everything: Iterable[Sought], cache: Path, progress: bool) -> Retrieving: ...
