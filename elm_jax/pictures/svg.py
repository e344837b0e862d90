"""Small plots as SVG text (`templates/bars.svg`): bars with intervals, and counts. No style from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elm_jax.pictures.page import filled

BLUE, GREY, ORANGE, RED = "#2f5d9b", "#9a9aa6", "#d97a1e", "#b3261e"
_ROW, _LABEL, _PLOT, _AXIS = 24, 210, 380, 26


@dataclass(frozen=True)
class Bar:
    """One bar: from zero to `value`, with an interval if there is one."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    colour: str = BLUE

    def told(self, digits: int) -> str:
        """The value and its interval in words."""
        low_high = f"  [{self.interval[0]:.{digits}f}, {self.interval[1]:.{digits}f}]" if self.interval else ""
        return f"{self.value:.{digits}f}{low_high}"


def bars(title: str, rows: Sequence[Bar], low: float = 0.0, high: float = 1.0, digits: int = 3) -> str:
    """Horizontal bars on an axis from `low` to `high`."""
    span = (high - low) or 1.0
    return filled(
        "bars.svg", title=title, bars=rows, digits=digits, height=_ROW * len(rows) + 2 * _AXIS, row=_ROW, top=_AXIS,
        left=_LABEL, right=_LABEL + _PLOT, zero=min(max(low, 0.0), high), ticks=[low + span * i / 4 for i in range(5)],
        x=lambda value: _LABEL + _PLOT * (min(max(value, low), high) - low) / span,
    )  # fmt: skip


def counts(title: str, rows: Sequence[tuple[str, int]], colour: str = BLUE) -> str:
    """Horizontal bars of counts."""
    most = max((count for _, count in rows), default=1)
    return bars(title, [Bar(label, count, colour=colour) for label, count in rows], 0, most, 0)
