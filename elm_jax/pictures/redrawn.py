"""Pictures of ECGs that a model has rebuilt or made."""

from __future__ import annotations

import os

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INK, _BLUE, _SHADE = "#9a9aa6", "#2f5d9b", "#eef2f8"


def draw_redrawn(
    path: str | os.PathLike[str], truth: np.ndarray | None, made: np.ndarray, hidden: np.ndarray, sampling_rate: float,
    leads: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """A PNG of ECGs side by side, their leads below each other; all arrays (n, C, L).

    What was hidden is shaded, with the true signal in grey (truth None: there is none) and the model's in blue; what
    was not is grey alone. leads: their names.
    """
    count, rows, samples = made.shape
    figure = Figure(figsize=(5.0 * count, 0.75 * rows + 0.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    seconds = np.arange(samples) / sampling_rate
    axes = figure.subplots(rows, count, squeeze=False, sharex=True)
    for (row, column), ax in np.ndenumerate(axes):
        own, under = made[column, row].astype(np.float64), hidden[column, row]
        values = own if truth is None else truth[column, row]
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        room = 0.1 * (high - low) or 0.1
        if truth is not None:
            ax.fill_between(seconds, low - room, high + room, where=under, color=_SHADE, linewidth=0)
            ax.plot(seconds, truth[column, row], color=_INK, linewidth=0.8)
        ax.plot(seconds, np.where(under, own, np.nan), color=_BLUE, linewidth=0.8)
        ax.set(ylim=(low - room, high + room), yticks=[])
        ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
        if leads and not column:
            ax.set_ylabel(leads[row], rotation=0, ha="right", va="center", fontsize=8)
        ax.tick_params(bottom=row == rows - 1, labelsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=80, format="png")
