"""The averaged beat of a recording as a picture: all leads on each other, and each by itself, with its waves."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elm_jax.ecg.beats.amplitudes import milliseconds
from elm_jax.ecg.beats.measurements import Measurements
from elm_jax.errors import UserError, printable, refused

_COLOURS = {"p": "#2f5d9b", "qrs": "#b3261e", "t": "#1f7a4d"}
_ROWS = 3
_AROUND = -350.0, 650.0  # ms about the beginning of the QRS complex


def draw_beat(found: Measurements, path: Path, title: str) -> None:
    """The averaged beat as a PNG, SVG or PDF, by the ending of `path`; P, QRS, T are shaded. Raises UserError where no
    beat was found, or the file cannot be written."""
    if found.beat is None:
        raise UserError("--picture", found.values["rate"].reason, "a recording with heartbeats", "leave --picture out")
    time = milliseconds(np.arange(found.beat.shape[1]) - found.onset)
    seen = (time >= _AROUND[0]) & (time <= _AROUND[1])
    names = [name for name, lead in found.leads.items() if not lead.reason]
    columns = -(-len(names) // _ROWS)
    figure = Figure(figsize=(11, 10), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(_ROWS + 1, columns, height_ratios=(2.4, *[1] * _ROWS))
    whole = figure.add_subplot(grid[0, :])
    for lead in found.beat:
        whole.plot(time[seen], lead[seen], linewidth=0.9)
    _shade(whole, found.waves)
    whole.set(title=printable(title), xlabel="ms from the beginning of the QRS complex", ylabel="mV")
    whole.title.set_parse_math(False)
    for place, (name, lead) in enumerate(zip(names, found.beat, strict=True)):
        ax = figure.add_subplot(grid[1 + place % _ROWS, place // _ROWS])
        ax.plot(time[seen], lead[seen], color="#16161d", linewidth=0.9)
        _shade(ax, found.leads[name].waves)
        ax.set_title(printable(name), fontsize=9, loc="left")
    with refused("--picture", str(path), "a file that can be written", "name another", OSError):
        figure.savefig(path, dpi=100)


def _shade(ax: Axes, waves: dict[str, tuple[float, float]]) -> None:
    for name, (begin, end) in waves.items():
        ax.axvspan(begin, end, color=_COLOURS[name], alpha=0.15, linewidth=0)
    ax.grid(True, color="#e6e6ea", linewidth=0.6)
