"""Pictures of a run: ECGs on ECG paper with question, answer and truth, and the loss curve.

Paper: 25 mm/s and 10 mm/mV, a fine line every millimetre, a strong one every 5 mm (0.2 s, 0.5 mV). Axes are
laid out in millimetres of paper, so that squares are square and a print is to scale. Figures are made
without pyplot: no global state, no display, any thread.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image

from elm_jax.ecg.recording import LEADS
from elm_jax.errors import printable

MM_PER_SECOND, MM_PER_MV = 25.0, 10.0
RHYTHM_LEAD = "II"
_COLUMNS, _ROWS = 4, 3
_ROW_MM, _EDGE_MM, _PULSE_MM, _LINE_MM, _MARGIN_MM = 30.0, 5.0, 10.0, 7.0, 3.0
_INCH = 25.4
_DPI, _COLOURS = 110, 32  # of one ECG's picture; paper, grid and ink
_PAPER, _FINE, _STRONG, _INK, _GREY = "#fffaf7", "#fae3df", "#efb9b2", "#16161d", "#6b6b76"
_RIGHT, _WRONG, _BLUE, _ORANGE = "#1f7a4d", "#b3261e", "#2f5d9b", "#d97a1e"
_PLAIN: dict[str, Any] = {"parse_math": False}  # what data or a model says may look like a formula, a broken one too
_LABEL_BOX = {"facecolor": _PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.6}


@dataclass(frozen=True)
class Example:
    """One held-out question: its ECGs, each (12, L) in mV as read, what was asked, what came and what is true."""

    ecgs: Sequence[np.ndarray]
    question: str
    answer: str
    truth: str
    correct: bool


def draw_ecg(
    signal: np.ndarray, sampling_rate: float, path: str | os.PathLike[str] | IO[bytes], title: str = "",
    caption: Sequence[str] = (),
) -> None:  # fmt: skip
    """A PNG of a 12-lead ECG, as `draw_on` draws it."""
    _save(_sheet(signal, sampling_rate, title, caption), path, dpi=_DPI)


def small_png(signal: np.ndarray, sampling_rate: float) -> bytes:
    """The PNG of `draw_ecg` in a few colours: a quarter as large, and made in half the time."""
    figure = _sheet(signal, sampling_rate)
    figure.set_dpi(_DPI)
    canvas, png = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(_COLOURS, Image.Quantize.FASTOCTREE).save(png, "png")
    return png.getvalue()


def _sheet(signal: np.ndarray, sampling_rate: float, title: str = "", caption: Sequence[str] = ()) -> Figure:
    x0, x1, y0, y1 = _view(signal, sampling_rate, bool(title), len(caption))
    figure = Figure(figsize=((x1 - x0) / _INCH, (y1 - y0) / _INCH), facecolor="white")
    draw_on(figure.add_axes((0, 0, 1, 1)), signal, sampling_rate, title, caption)
    return figure


def gallery(
    examples: Sequence[Example], sampling_rate: float, path: str | os.PathLike[str], columns: int = 2
) -> None:
    """One PNG of ECGs of equal length: above each its question, below it the model's answer and the truth."""
    assert examples, "nothing to draw"
    x0, x1, y0, y1 = _view(examples[0].ecgs[0], sampling_rate, True, 1)
    columns = min(columns, len(examples))
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(columns * (x1 - x0) / _INCH, rows * (y1 - y0) / _INCH), facecolor="white")
    for index, example in enumerate(examples):
        row, column = divmod(index, columns)
        ax = figure.add_axes((column / columns, 1 - (row + 1) / rows, 1 / columns, 1 / rows))
        first = f" (the first of {len(example.ecgs)} ECGs)" if len(example.ecgs) > 1 else ""
        draw_on(ax, example.ecgs[0], sampling_rate, _shorten(example.question, 100 - len(first)) + first, ("",))
        colour, mark = (_RIGHT, "correct") if example.correct else (_WRONG, "wrong")
        answer = _shorten(example.answer, 45) or "(empty)"
        ax.text(0, _line(0), f"Answer: {answer}", color=colour, **_PLAIN, **_bold(12))
        ax.text(0.45 * x1, _line(0), f"Truth: {_shorten(example.truth, 45)}", color=_INK, **_PLAIN, **_bold(12))
        ax.text(x1 + x0, _line(0), mark, color=colour, ha="right", **_bold(12))
    _save(figure, path, dpi=80)


def loss_plot(
    steps: Sequence[int],
    loss: Sequence[float],
    val_loss: Sequence[float | None],
    path: str | os.PathLike[str],
) -> None:
    """The loss over steps with its running mean, and the validation loss at the steps that have one."""
    assert len(steps) == len(loss) == len(val_loss), "one loss and one val_loss (or None) per step"
    figure = Figure(figsize=(7, 4.2), facecolor="white", layout="constrained")
    ax = figure.add_subplot()
    values = np.asarray(loss, float)
    span = len(values) // 40 | 1  # odd: as many before as behind
    ax.plot(steps, values, color=_BLUE, alpha=0.3 if span > 1 else 1, linewidth=1, label="training loss")
    if span > 1:
        ax.plot(
            steps, _running_mean(values, span), color=_BLUE, linewidth=1.8, label=f"mean of {span} points"
        )
    evaluated = [(step, value) for step, value in zip(steps, val_loss, strict=True) if value is not None]
    if evaluated:
        ax.plot(
            *zip(*evaluated, strict=True),
            "o-",
            color=_ORANGE,
            linewidth=1.5,
            markersize=4,
            label="validation loss",
        )
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
        ax.set_yscale("log")
        for axis_part in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis_part(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    ax.set(xlabel="optimizer step", ylabel="cross-entropy per supervised token (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(True, color="#e6e6ea", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    _save(figure, path, dpi=130)


def draw_on(
    ax: Axes, signal: np.ndarray, sampling_rate: float, title: str = "", caption: Sequence[str] = ()
) -> None:
    """A 12-lead ECG on paper: three rows of four leads, consecutive in time, and all of lead II.

    `signal` (12, L) in mV, leads in the order of LEADS; `sampling_rate` in Hz. A lead is drawn about its median, as
    recorders are AC-coupled. `title` stands above the paper, the lines of `caption` below it. `ax` is in millimetres
    then, the paper's lower left at (0, 0).
    """
    assert signal.shape[0] == len(LEADS), f"expected ({len(LEADS)}, L), got {signal.shape}"
    width, height = _paper_size(signal, sampling_rate)
    x0, x1, y0, y1 = _view(signal, sampling_rate, bool(title), len(caption))
    ax.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal")
    ax.axis("off")
    paper = ax.add_patch(Rectangle((0, 0), width, height, facecolor=_PAPER, edgecolor=_STRONG, linewidth=0.8))
    for step, colour, thickness in ((1.0, _FINE, 0.4), (5.0, _STRONG, 0.6)):
        ax.add_collection(
            LineCollection(list(_grid(width, height, step)), colors=colour, linewidths=thickness)
        )
    for trace in _traces(signal, sampling_rate):
        (line,) = ax.plot(*trace.T, color=_INK, linewidth=0.9, solid_joinstyle="round")
        line.set_clip_path(paper)
    quarter = signal.shape[1] / sampling_rate * MM_PER_SECOND / _COLUMNS
    for index, lead in enumerate((*LEADS, RHYTHM_LEAD)):
        column, row = divmod(index, _ROWS) if index < len(LEADS) else (0, _ROWS)
        x, y = _EDGE_MM + _PULSE_MM + column * quarter, _baseline(row)
        ax.text(x + 1.2, y + 0.38 * _ROW_MM, lead, color=_INK, bbox=_LABEL_BOX, zorder=3, **_bold(10))
        if column:
            ax.plot((x, x), (y - 3, y + 3), color=_GREY, linewidth=0.7)
    note = f"{MM_PER_SECOND:g} mm/s   {MM_PER_MV:g} mm/mV   read at {sampling_rate:g} samples/s"
    ax.text(
        width - 1.5, 2.3, note, ha="right", va="center", fontsize=7, color=_GREY, bbox=_LABEL_BOX, zorder=3
    )
    if title:
        ax.text(0, height + 0.55 * _LINE_MM, printable(title), color=_INK, **_PLAIN, **_bold(12))
    for index, text in enumerate(caption):
        ax.text(0, _line(index), printable(text), color=_INK, va="center", fontsize=10, **_PLAIN)


def _view(
    signal: np.ndarray, sampling_rate: float, titled: bool, lines: int
) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the picture in millimetres: the paper, a margin, room for the text."""
    width, height = _paper_size(signal, sampling_rate)
    top = height + (_LINE_MM if titled else 0) + _MARGIN_MM
    return -_MARGIN_MM, width + _MARGIN_MM, -_LINE_MM * lines - _MARGIN_MM, top


def _line(index: int) -> float:
    """The height of a line of the caption."""
    return -_LINE_MM * (index + 0.6)


def _traces(signal: np.ndarray, sampling_rate: float) -> Iterator[np.ndarray]:
    """(n, 2) points in millimetres: calibration pulses, twelve short leads, the rhythm strip."""
    pulse = np.array([[0, 0], [1.5, 0], [1.5, 10], [6.5, 10], [6.5, 0], [8, 0]])
    for row in range(_ROWS + 1):
        yield pulse + [_EDGE_MM, _baseline(row)]
    height = MM_PER_MV * (signal - np.median(signal, axis=1, keepdims=True))
    x = _EDGE_MM + _PULSE_MM + np.arange(signal.shape[1]) / sampling_rate * MM_PER_SECOND
    edges = np.linspace(0, signal.shape[1], _COLUMNS + 1).round().astype(int)
    for index in range(len(LEADS)):
        column, row = divmod(index, _ROWS)
        part = slice(edges[column], edges[column + 1])
        yield np.stack([x[part], _baseline(row) + height[index, part]], axis=1)
    yield np.stack([x, _baseline(_ROWS) + height[LEADS.index(RHYTHM_LEAD)]], axis=1)


def _grid(width: float, height: float, step: float) -> Iterator[list[tuple[float, float]]]:
    for x in np.arange(0, width + 1e-6, step):
        yield [(x, 0), (x, height)]
    for y in np.arange(0, height + 1e-6, step):
        yield [(0, y), (width, y)]


def _paper_size(signal: np.ndarray, sampling_rate: float) -> tuple[float, float]:
    """Width and height of the paper in mm, whole strong squares."""
    width = 2 * _EDGE_MM + _PULSE_MM + signal.shape[1] / sampling_rate * MM_PER_SECOND
    return 5 * np.ceil(width / 5 - 1e-6), (_ROWS + 1) * _ROW_MM + 2 * _EDGE_MM


def _baseline(row: int) -> float:
    return _EDGE_MM + (_ROWS - row + 0.5) * _ROW_MM


def _running_mean(values: np.ndarray, span: int) -> np.ndarray:
    """The mean of the finite ones among the `span` (odd) values around each place; NaN if there are none."""
    finite, around = np.isfinite(values), np.ones(span)
    with np.errstate(invalid="ignore"):
        return np.convolve(np.where(finite, values, 0), around, "same") / np.convolve(finite, around, "same")


def _shorten(text: str, width: int) -> str:
    return textwrap.shorten(printable(text, "\n\t"), width, placeholder=" …")


def _bold(size: float) -> dict[str, Any]:
    return {"weight": "bold", "va": "center", "fontsize": size}


def _save(figure: Figure, path: str | os.PathLike[str] | IO[bytes], dpi: int) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=dpi, format="png")
