"""Pictures of an ECG-Byte tokenizer: how long its entries are, how often each is used, what of an ECG each covers.

Figures are made without pyplot: no global state, no display. Dimension letters: C leads, L samples, N ids.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from elm_jax.folders import write_atomic, write_json
from elm_jax.symbols.coder import EcgByte
from elm_jax.symbols.corpus import Reader
from elm_jax.symbols.report import Encoded, Usage, encode, encode_by_all, median, token_of_sample, totals

_INK, _GREY, _BLUE, _ORANGE = "#16161d", "#6b6b76", "#2f5d9b", "#d97a1e"
_SCALE = ListedColormap(colormaps["YlGnBu"](np.linspace(0.05, 0.7, 256)))  # pale for short tokens, deep for long ones
_WHITE = (0.5, 0.2)  # part of white in the colour of every other token
_LONGEST = 256  # samples; longer tokens have its colour
_INCH_PER_LEAD, _WIDTH, _DPI = 0.82, 17.0, 100


def inspect(
    tokenizer: EcgByte, paths: Sequence[Path], reader: Reader, out: Path, method: str = "longest", pictures: int = 8
) -> dict[str, Any]:
    """Write lengths.png, and with recordings ranks.png and a picture of each of the first `pictures` into `out`.

    Returns, and writes as summary.json, what the pictures are about in figures. `method` says what is drawn.
    """
    counts = np.zeros(len(tokenizer), np.int64)

    def work(signal: np.ndarray) -> tuple[np.ndarray, dict[str, Encoded]]:
        return signal, {method: encode(tokenizer, signal, method)} | encode_by_all(tokenizer, signal)

    def counted() -> Iterator[dict[str, Encoded]]:
        for number, (path, (signal, by_method)) in enumerate(reader.each(paths, work, "encoding"), 1):
            one = by_method[method]
            np.add(counts, np.bincount(one.ids, minlength=len(counts)), out=counts)
            if number <= pictures:
                title = f"{path.stem}: {_count(len(one.ids))} tokens for {_count(signal.size)} samples ({method})"
                place, form = out / f"{number:03d}_{path.stem}.png", reader.form
                draw_recording(tokenizer, signal, one, form.leads, form.sampling_rate, title, place)
            yield by_method

    figures = totals(counted()) if paths else {}
    usage = Usage(tokenizer.lengths, counts)
    draw_lengths(usage, out / "lengths.png")
    summary = usage.describe()
    if paths:
        draw_ranks(usage, out / "ranks.png")
        summary |= {"method": method, "unreadable": len(reader.unreadable), **figures}
    write_json(out / "summary.json", summary)
    return summary


def draw_lengths(usage: Usage, path: Path) -> None:
    """A PNG of how many merges have which length, and, where recordings were given, how many of their tokens have."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    ax = figure.add_subplot()
    kinds = ((*usage.merges, "vocabulary: {} merges", _BLUE), (*usage.used, "as used: {} tokens", _ORANGE))
    shown = [kind for kind in kinds if len(kind[0])]
    top = max((int(lengths.max()) for lengths, *_ in shown), default=1)
    bins = (np.unique(np.round(2 ** np.arange(0, np.log2(top + 1) + 0.5, 0.5))) - 0.5).tolist()  # two for each doubling
    for lengths, counts, words, colour in shown:
        share, label = 100 * counts / counts.sum(), words.format(_count(counts.sum()))
        ax.hist(lengths, bins, weights=share, color=colour, alpha=0.3)
        ax.hist(lengths, bins, weights=share, color=colour, histtype="step", linewidth=1.4, label=label)
        ax.axvline(median(lengths, counts), color=colour, linestyle=":", linewidth=1.4)
    ax.set(xscale="log", xlabel="samples that one token covers (dotted: median)", ylabel="share, %")
    ax.set_title("Lengths of tokens", loc="left")
    _plain_log(ax)
    if shown:
        ax.legend(frameon=False)
    _save(figure, path)


def draw_ranks(usage: Usage, path: Path) -> None:
    """A PNG of how often each id occurs, from the commonest to the rarest, on logarithmic scales."""
    counts = np.sort(usage.counts[usage.counts > 0])[::-1]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(np.arange(1, len(counts) + 1), counts, color=_BLUE, linewidth=1.8)
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="occurrences")
    ax.set_title(f"{_count(len(counts))} of {_count(len(usage.counts))} ids occur, {_count(counts.sum())} times in all",
                 loc="left")  # fmt: skip
    ax.grid(color="#e6e6ec", linewidth=0.6)
    _plain_log(ax)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    _save(figure, path)


def draw_recording(
    tokenizer: EcgByte, signal: np.ndarray, encoded: Encoded, leads: Sequence[str], rate: float, title: str, path: Path
) -> None:
    """A PNG of a recording (C, L), a row for each lead, and behind it the stretch that each token covers.

    A token's colour tells its length, every other one is paler. An orange edge is where a token goes on in the next
    lead, as leads are flattened one after the other. `rate` in Hz.
    """
    rows, token = len(signal), token_of_sample(tokenizer, encoded)
    height = _INCH_PER_LEAD * rows + 1.2
    figure = Figure(figsize=(_WIDTH, height))
    grid = figure.add_gridspec(rows, 1, left=0.04, right=0.93, top=1 - 0.55 / height, bottom=0.6 / height, hspace=0.12)
    colours = _colours(tokenizer.lengths[encoded.ids])
    for row in range(rows):
        ax = figure.add_subplot(grid[row])
        _draw_lead(ax, signal[row], token[row], colours, rate)
        ax.set_ylabel(leads[row], rotation=0, ha="right", va="center", color=_INK, fontsize=11)
        before = row > 0 and token[row - 1, -1] == token[row, 0]
        after = row + 1 < rows and token[row, -1] == token[row + 1, 0]
        for side, crossed in (("left", before), ("right", after)):
            ax.spines[side].set(visible=bool(crossed), color=_ORANGE, linewidth=3)
        if row + 1 < rows:
            ax.set_xticklabels([])
    ax.set_xlabel("seconds", color=_GREY)
    at = 1 - 0.25 / height
    # The name of a file can be anything: a formula to matplotlib, or bytes that are no text.
    title = title.encode("utf-8", "replace").decode()
    figure.text(0.04, at, title, fontsize=13, color=_INK, va="center", parse_math=False)
    figure.text(0.93, at, "orange edge: the token goes on in the next lead", color=_ORANGE, va="center", ha="right")
    scale, place = ScalarMappable(LogNorm(1, _LONGEST), _SCALE), figure.add_axes((0.945, 0.25, 0.009, 0.5))
    bar = figure.colorbar(scale, cax=place, alpha=1 - sum(_WHITE) / 2)
    bar.set_label("samples that the token covers", color=_GREY)
    bar.set_ticks([1, 4, 16, 64, _LONGEST], labels=["1", "4", "16", "64", f"{_LONGEST}+"])
    bar.minorticks_off()
    _save(figure, path)


def _colours(lengths: np.ndarray) -> np.ndarray:
    """The colour of each token (N, 3): by its length, mixed with white, by turns more and less."""
    full = _SCALE(LogNorm(1, _LONGEST, clip=True)(lengths))[:, :3]
    white = np.where(np.arange(len(lengths)) % 2, *_WHITE)[:, None]
    return white + (1 - white) * full


def _draw_lead(ax: Axes, lead: np.ndarray, token: np.ndarray, colours: np.ndarray, rate: float) -> None:
    low, high = float(lead.min()), float(lead.max())
    margin = 0.08 * (high - low) or 1.0
    end = len(lead) / rate
    view = (0.0, end, low - margin, high + margin)
    ax.imshow(colours[token][None], extent=view, aspect="auto", interpolation="nearest", origin="lower")
    edges = np.flatnonzero(np.diff(token)) + 1
    ax.vlines(edges / rate, low - margin, high + margin, color="white", linewidth=0.5)
    # A sample is drawn in the middle of the stretch that it stands for.
    ax.plot((np.arange(len(lead)) + 0.5) / rate, lead, color=_INK, linewidth=0.9)
    ax.set(xlim=view[:2], ylim=view[2:], yticks=[])
    ax.tick_params(colors=_GREY, length=2)
    for side in ("top", "bottom"):
        ax.spines[side].set_visible(False)


def _plain_log(ax: Axes) -> None:
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _count(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    write_atomic(path, lambda file: figure.savefig(file, dpi=_DPI, format="png", metadata={"Software": None}))
