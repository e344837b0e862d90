"""Attention on the waveform: each lead with the weights under it, and the words that have most of the rest."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from elm_jax.ecg.recording import LEADS
from elm_jax.errors import printable
from elm_jax.evaluation.attention import Attention

WORDS = 20  # text tokens in the picture
_INK, _BAR = "#16161d", "#2f5d9b"
# The lighter half of a map: the trace stays readable on the largest.
_HEAT = ListedColormap(colormaps["Oranges"](np.linspace(0, 0.5, 128)), "light oranges")
_PLAIN: dict[str, Any] = {"parse_math": False}  # what is asked and answered may look like a formula


def draw_attention(
    found: Attention, ecg: int, signal: np.ndarray, rate: float, leads: tuple[int, ...], title: str, path: Path
) -> None:
    """A PNG of ECG number `ecg`: `signal` (12, L) in mV as read, of which the model saw the rows `leads`."""
    rows = -(-len(leads) // 2)
    figure = Figure(figsize=(15, 1.05 * rows + 4.2), facecolor="white", layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[1.0] * rows + [3.0])
    shape = len(leads), signal.shape[1]
    weights = found.over_signal(ecg, shape)
    axes = []
    for place, lead in enumerate(leads):
        column, row = divmod(place, rows)
        axes.append(figure.add_subplot(grid[row, column]))
        _lead(axes[-1], signal[lead], weights[place], rate, LEADS[lead])
        if row == rows - 1 or lead == leads[-1]:
            axes[-1].set_xlabel("time in s", fontsize=8)
    scale = figure.colorbar(axes[0].images[0], ax=axes, fraction=0.02, pad=0.01)
    scale.set_label("attention, 1 where it is largest", fontsize=8)
    scale.ax.tick_params(labelsize=7)
    _words(figure.add_subplot(grid[rows, :]), found)
    figure.suptitle("\n".join(textwrap.wrap(printable(title), 140)), fontsize=11, ha="left", x=0.01, **_PLAIN)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100, format="png")


def _lead(ax: Axes, trace: np.ndarray, weights: np.ndarray, rate: float, name: str) -> None:
    seconds = np.arange(len(trace)) / rate
    trace = trace - np.median(trace)
    low, high = min(float(trace.min()), -0.5), max(float(trace.max()), 0.5)
    extent = (0.0, float(len(trace) / rate), low, high)
    ax.imshow(weights[None], aspect="auto", extent=extent, cmap=_HEAT, vmin=0, vmax=1, interpolation="nearest")
    ax.plot(seconds, trace, color=_INK, linewidth=0.8)
    ax.set_ylabel(name, rotation=0, ha="right", va="center", fontweight="bold")
    ax.set(xlim=extent[:2], ylim=(low, high), yticks=[])
    ax.tick_params(labelsize=7)


def _words(ax: Axes, found: Attention) -> None:
    """The text tokens with most attention, in the order of the text."""
    ecgs = {place for places in found.ecg_tokens for place in places}
    text = [i for i in range(len(found.tokens)) if i not in ecgs]
    top = sorted(sorted(text, key=lambda i: -found.weights[i])[:WORDS])
    shown = [printable(found.tokens[i].strip()) or repr(found.tokens[i]) for i in top]
    names = [f"{name}{'*' if i >= found.answer_start else ''}" for i, name in zip(top, shown, strict=True)]
    ax.bar(range(len(top)), found.weights[top], color=_BAR)
    ax.set_xticks(range(len(top)), names, rotation=45, ha="right", fontsize=8, **_PLAIN)
    ax.set_title(
        f"ECG tokens have {found.ecg_share:.1%} of the attention (with the same for every token of the prompt:"
        f" {found.uniform_share:.1%}). Text tokens with most of the rest; * in the answer",
        fontsize=9,
    )
    ax.spines[["top", "right"]].set_visible(False)


def as_json(found: Attention, facts: dict[str, Any]) -> dict[str, Any]:
    """The attention as plain values, with what was asked and answered."""
    return {
        **facts,
        "ecg_share": found.ecg_share,
        "uniform_share": found.uniform_share,
        "answer_start": found.answer_start,
        "tokens": [{"text": t, "weight": float(w)} for t, w in zip(found.tokens, found.weights, strict=True)],
        "ecgs": [
            [
                {"place": place, "weight": float(found.weights[place]), "parts": parts}
                for place, parts in zip(places, spans, strict=True)
            ]
            for places, spans in zip(found.ecg_tokens, found.spans, strict=True)
        ],
    }
