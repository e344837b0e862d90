"""Small plots as SVG text: bars with intervals, and counts. No library, no style from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from elm_jax.errors import printable

BLUE, GREY, ORANGE, RED = "#2f5d9b", "#9a9aa6", "#d97a1e", "#b3261e"
INK, FAINT = "#16161d", "#e6e6ea"
_ROW, _LABEL, _PLOT, _NUMBER, _AXIS = 24, 210, 380, 150, 26
_LONGEST = 80  # characters of a label


@dataclass(frozen=True)
class Bar:
    """One bar: from zero to `value`, with an interval if there is one."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    colour: str = BLUE


def bars(title: str, rows: Sequence[Bar], low: float = 0.0, high: float = 1.0, digits: int = 3) -> str:
    """Horizontal bars on an axis from `low` to `high`."""
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return _LABEL + _PLOT * (min(max(value, low), high) - low) / span

    height = _AXIS + _ROW * len(rows) + _AXIS
    parts = [_opened(title, _LABEL + _PLOT + _NUMBER, height), _text(_LABEL, 15, title, "start", 12)]
    for i in range(5):
        tick = low + span * i / 4
        parts.append(_line(x(tick), _AXIS, x(tick), height - _AXIS, FAINT))
        parts.append(_text(x(tick), height - 8, f"{tick:g}", "middle", 11))
    for i, row in enumerate(rows):
        y = _AXIS + _ROW * i
        left, right = sorted((x(0.0 if low <= 0 <= high else low), x(row.value)))
        parts.append(_text(_LABEL - 8, y + 16, _short(row.label, 32), "end", 12, full=row.label))
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 4}" width="{max(right - left, 0.8):.1f}" height="{_ROW - 8}"'
            f' fill="{row.colour}" opacity="0.85"/>'
        )
        number = f"{row.value:.{digits}f}" if digits else f"{row.value:.0f}"
        if row.interval is not None:
            a, b = row.interval
            middle = y + _ROW / 2
            parts.append(_line(x(a), middle, x(b), middle, INK, 1.6))
            parts += [_line(x(end), middle - 4, x(end), middle + 4, INK, 1.6) for end in (a, b)]
            number += f"  [{a:.{digits}f}, {b:.{digits}f}]"
        parts.append(_text(_LABEL + _PLOT + 8, y + 16, number, "start", 11))
    return printable("".join([*parts, "</svg>"]))


def counts(title: str, rows: Sequence[tuple[str, int]], colour: str = BLUE) -> str:
    """Horizontal bars of counts."""
    most = max((count for _, count in rows), default=1)
    return bars(title, [Bar(label, count, colour=colour) for label, count in rows], 0, most, 0)


def _opened(title: str, width: int, height: int) -> str:
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{name}"'
        f' font-family="system-ui, sans-serif"><title>{name}</title>'
    )


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}" stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, size: int, full: str = "") -> str:
    hover = f"<title>{escape(full)}</title>" if full else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{INK}">'
        f"{hover}{escape(text)}</text>"
    )


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())[:_LONGEST]
    return text if len(text) <= most else f"{text[: most - 1]}…"
