"""A picture of what tables of records hold: their kinds of questions, lengths and splits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_BLUE, _MOST, _LONGEST = "#2f5d9b", 12, 32


def draw_table_stats(path: str | os.PathLike[str], tables: Mapping[str, Mapping[str, Any]]) -> None:
    """A PNG, SVG or PDF (by the ending of `path`) with a row for each table of `data/prepare/stats.table_stats`."""
    figure = Figure(figsize=(14, 3.2 * len(tables)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, found) in zip(figure.subplots(len(tables), 4, squeeze=False), tables.items(), strict=True):
        for ax, what in zip(axes[:3], ("types", "answers", "splits"), strict=True):
            _counts(ax, what, found[what])
        for tokenizer, texts in found["tokens"].items():
            starts, counts = zip(*texts["conversation"].get("bins", [(0, 0)]), strict=True)
            axes[3].step(starts, counts, where="post", label=_short(tokenizer))
        if any(texts["conversation"] for texts in found["tokens"].values()):
            axes[3].legend(fontsize=7)
            axes[3].set_title("conversations by tokens", fontsize=9)
            axes[3].set_xlabel("tokens", fontsize=7)
            axes[3].set_ylabel("conversations", fontsize=7)
        else:
            axes[3].set_axis_off()
        axes[0].set_title(f"{_short(os.path.basename(name))}: {found['rows']} rows\ntypes", fontsize=9)
    figure.savefig(path, dpi=100)


def _counts(ax: Axes, title: str, counts: Mapping[str, int]) -> None:
    shown = list(counts.items())[:_MOST][::-1]
    ax.barh(range(len(shown)), [count for _, count in shown], color=_BLUE)
    ax.set_yticks(range(len(shown)), [_short(name) for name, _ in shown], fontsize=7)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("answers" if title == "answers" else "rows", fontsize=7)


def _short(text: str) -> str:
    """Without what Matplotlib would take for mathematics."""
    return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…").replace("$", r"\$")
