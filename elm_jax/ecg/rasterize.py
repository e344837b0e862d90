"""An ECG drawn on ECG paper, as a vision encoder sees it.

One lead per row, or as on printed pages two or four leads one after the other in a row, each for its part of the time,
with leads drawn whole below for the rhythm. A row every 2.5 mV, 2 inches of paper a second; the page ends 2 mV above
the zero line of the first lead and 2 mV below that of the last. A fine line every 0.04 s and 0.1 mV, a strong one all
0.2 s and 0.5 mV. The page (paper, lines, names) is drawn once for each layout and kept. A trace is what a round pen
covers on its way from sample to sample: at each of several places in a column of pixels the pen reaches from a
top to a bottom, and a pixel is as dark as the share of these stretches that falls into it.

Dimension letters: C leads, L samples, N places, H x W pixels, P pixels that a trace touches.
"""

import itertools
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elm_jax.errors import UserError

DPI = 50  # four pixels or more to one of an encoder's
REFERENCE_DPI = 250
ROW_MV, EDGE_MV = 2.5, 2.0
INCH_PER_SECOND, INCH_PER_ROW = 2.0, 2.5 * 1.1
PAPER, FINE, STRONG, INK = (255, 250, 247), (250, 218, 213), (236, 165, 158), (16, 24, 120)
FINE_POINTS, STRONG_POINTS, INK_POINTS, NAME_POINTS = 0.4, 0.8, 0.6, 20
FINE_STEP, STRONG_STEP = (0.04, 0.1), (0.2, 0.5)  # seconds, mV
NAME_AT = (0.06, 0.9)  # seconds from the left, mV above the zero line
LAYOUTS = {"12x1": 1, "6x2": 2, "3x4": 4}  # rows by columns of twelve leads -> columns
_LIFTED = 0.04  # inches on either side of where another lead begins
_POINT, _LEAST_DPI = 1 / 72, 10
_PLACES_PER_PIXEL, _PLACES_PER_PEN = 4, 4
_SLIVER = 0.01  # of a pixel: what lies on the page's lower edge belongs to the last row
_FAR_MV = 1e3  # far off any page, and float32 still tells a fraction of a pixel there


def page_size(leads: int, seconds: float, dpi: float = DPI, layout: str = "12x1", rhythm: int = 0) -> tuple[int, int]:
    """(H, W) of what `draw` draws: of rows * 2.75 * dpi by 2 * seconds * dpi pixels, rounded down."""
    rows = -(-leads // LAYOUTS[layout]) + rhythm
    return _whole(rows * INCH_PER_ROW * dpi), _whole(seconds * INCH_PER_SECOND * dpi)


def draw(
    signal: np.ndarray,
    sampling_rate: float,
    leads: tuple[str, ...],
    dpi: float = DPI,
    out: np.ndarray | None = None,
    layout: str = "12x1",
    rhythm: tuple[str, ...] = (),
) -> np.ndarray:
    """The ECG on paper: (H, W, 3) uint8, see `page_size`.

    signal (C, L) is in mV, with one name in `leads` for each row; what leaves the page is cut off. `out`, of
    that shape, is drawn on in place of a new array: at REFERENCE_DPI, the size that the reference draws, a new
    one costs more than the drawing. layout: a name in LAYOUTS; rhythm: leads that are drawn once more, whole, below.
    Raises UserError for a signal without a picture, or without a lead of `rhythm`, or leads that fill no layout.
    """
    _check(signal, sampling_rate, leads, dpi)
    check_layout(leads, layout, rhythm)
    signal, names = _laid_out(signal, tuple(leads), LAYOUTS[layout], rhythm)
    empty = _page(names, signal.shape[1] / sampling_rate, dpi)
    height, width = empty.shape[:2]
    page = np.empty_like(empty) if out is None else out
    assert page.shape == empty.shape and page.dtype == np.uint8 and page.flags.c_contiguous, page.shape
    np.copyto(page, empty)
    zero, per_mv = _rows(len(signal), dpi)
    places = _places(signal.shape[1], INCH_PER_SECOND * dpi / sampling_rate, INK_POINTS * _POINT * dpi, width)
    for row, y in enumerate((zero[:, None] - np.clip(signal, -_FAR_MV, _FAR_MV) * per_mv).astype(np.float32)):
        pixels, cover = _stroke(y, places, height, width)
        if len(names[row]) > 1:  # the pen is lifted where another lead begins
            gaps = np.linspace(0, width, len(names[row]) + 1)[1:-1]
            on_lead = (np.abs(pixels[:, None] % width - gaps) > _LIFTED * dpi).all(axis=1)
            pixels, cover = pixels[on_lead], cover[on_lead]
        _ink(page, pixels, cover)
    return page


def check_layout(leads: tuple[str, ...], layout: str, rhythm: tuple[str, ...]) -> None:
    """Raise UserError where these leads fill no such layout, or have none for the rhythm."""
    if len(leads) % LAYOUTS[layout]:
        expected = f"a number of leads that divides into {LAYOUTS[layout]} columns"
        raise UserError("image_layout", f"{layout} of {len(leads)} leads", expected, "choose another layout")
    for lead in rhythm:
        if lead not in leads:
            raise UserError("image_rhythm", lead, f"one of the leads {', '.join(leads)}", "choose one of these")


def _laid_out(
    signal: np.ndarray, leads: tuple[str, ...], columns: int, rhythm: tuple[str, ...]
) -> tuple[np.ndarray, tuple[tuple[str, ...], ...]]:
    """The rows (R, L) of a page with so many columns, and the names of the leads in each; leads go down the columns."""
    if columns == 1 and not rhythm:
        return signal, tuple((lead,) for lead in leads)
    rows, edges = len(leads) // columns, np.linspace(0, signal.shape[1], columns + 1).astype(int)
    page = np.empty((rows + len(rhythm), signal.shape[1]), signal.dtype)
    for column, (first, last) in enumerate(itertools.pairwise(edges)):
        page[:rows, first:last] = signal[column * rows : (column + 1) * rows, first:last]
    for row, lead in enumerate(rhythm, rows):
        page[row] = signal[leads.index(lead)]
    return page, (*(leads[row::rows] for row in range(rows)), *((lead,) for lead in rhythm))


def _check(signal: np.ndarray, sampling_rate: float, leads: tuple[str, ...], dpi: float) -> None:
    if signal.ndim != 2 or signal.shape[1] < 2 or not len(signal) == len(leads) > 0:
        raise UserError(
            "signal", f"shape {signal.shape} for {len(leads)} leads", "(leads, samples)", "give one row for each lead"
        )
    bad = signal.size - np.count_nonzero(np.isfinite(signal))
    if bad:
        raise UserError("signal", f"{bad} samples that are not finite", "finite numbers", "repair or leave it out")
    if not (math.isfinite(sampling_rate) and sampling_rate > 0):
        raise UserError("sampling_rate", f"{sampling_rate}", "a positive number of Hz", "correct it")
    if not dpi >= _LEAST_DPI:
        raise UserError("dpi", f"{dpi}", f"at least {_LEAST_DPI} pixels an inch", f"leave it at {DPI}")


def _rows(rows: int, dpi: float) -> tuple[np.ndarray, float]:
    """Where the zero lines lie, in pixels from the top, and pixels per mV.

    The fraction of a pixel that a page has too many is cut off its top, as matplotlib does.
    """
    height = rows * INCH_PER_ROW * dpi
    per_mv = height / ((rows - 1) * ROW_MV + 2 * EDGE_MV)
    return (EDGE_MV + ROW_MV * np.arange(rows)) * per_mv - (height - _whole(height)), per_mv


def _whole(pixels: float) -> int:
    return int(pixels + 1e-6)


# --- the page ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _page(leads: tuple[tuple[str, ...], ...], seconds: float, dpi: float) -> np.ndarray:
    """Paper, lines and the names of the leads in each row: (H, W, 3) uint8, not to be written to."""
    height, width = page_size(len(leads), seconds, dpi)
    zero, per_mv = _rows(len(leads), dpi)
    per_second = INCH_PER_SECOND * dpi
    fine, strong = FINE_POINTS * _POINT * dpi, STRONG_POINTS * _POINT * dpi
    across = [
        _lines(width, 0.0, FINE_STEP[0] * per_second, fine),
        _lines(width, 0.0, STRONG_STEP[0] * per_second, strong),
    ]
    down = [
        _lines(height, zero[0], FINE_STEP[1] * per_mv, fine),
        _lines(height, zero[0], STRONG_STEP[1] * per_mv, strong),
    ]
    page = np.empty((height, width, 3), np.uint8)
    # Most rows of the page equal another one: each kind is mixed once.
    kinds, kind_of_row = np.unique(np.round(np.stack(down, 1), 3), axis=0, return_inverse=True)
    for kind, (fine_row, strong_row) in enumerate(kinds):
        row = _over(np.array(PAPER, np.float32), FINE, across[0][:, None])
        row = _over(_over(row, FINE, fine_row), STRONG, across[1][:, None])
        page[kind_of_row.ravel() == kind] = _over(row, STRONG, strong_row) + 0.5
    page = _with_names(page, leads, zero - NAME_AT[1] * per_mv, NAME_AT[0] * per_second, NAME_POINTS * _POINT * dpi)
    page.flags.writeable = False
    return page


def _over(below: np.ndarray, colour: tuple[int, int, int], cover: np.ndarray) -> np.ndarray:
    return below + (np.array(colour, np.float32) - below) * cover


def _lines(size: int, origin: float, step: float, width: float) -> np.ndarray:
    """(size,) float32: the share of each pixel that lines `width` wide, one every `step`, cover."""
    width = min(width, step)
    periods = (np.arange(size + 1) - origin + width / 2) / step
    whole = np.floor(periods)
    covered_up_to = whole * width + np.minimum((periods - whole) * step, width)
    return np.diff(covered_up_to).astype(np.float32)


def _with_names(
    page: np.ndarray, leads: tuple[tuple[str, ...], ...], y: np.ndarray, x: float, size: float
) -> np.ndarray:
    import matplotlib  # for its font alone: the bold face that the reference writes with

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"), size)
    picture = Image.fromarray(page)
    pen = ImageDraw.Draw(picture)
    for names, middle in zip(leads, y, strict=True):
        for column, name in enumerate(names):
            at = (x + column * page.shape[1] / len(names), float(middle))
            pen.text(at, name, fill=(0, 0, 0), font=font, anchor="lm")
    return np.array(picture)


# --- the traces ----------------------------------------------------------------------------------------------


class _Places(NamedTuple):
    """Where traces of one length are measured; places lie `gap` pixels apart, `per_sample` of them to a sample."""

    per_sample: int
    gap: float
    radius: float  # of the pen, in pixels
    aside: int  # so many places to either side can the pen's centre be, and still be over a place
    on_page: slice  # of all places that the pen reaches, those on the page
    column: np.ndarray  # (columns,) that have a place
    starts: np.ndarray  # (columns,): the first place in each
    counts: np.ndarray  # (columns,): how many


@lru_cache(maxsize=8)
def _places(samples: int, step: float, pen: float, width: int) -> _Places:
    """For samples that lie `step` pixels apart, and a pen `pen` pixels wide."""
    per_sample = math.ceil(step * max(_PLACES_PER_PIXEL, _PLACES_PER_PEN / pen))
    gap, radius = step / per_sample, pen / 2
    aside = int(radius / gap)
    column = np.floor((np.arange((samples - 1) * per_sample + 1 + 2 * aside) - aside) * gap + 1e-4).astype(np.intp)
    on_page = slice(aside, int(np.searchsorted(column, width)))
    column = column[on_page]
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    counts = np.diff(starts, append=len(column))
    return _Places(per_sample, gap, radius, aside, on_page, column[starts], starts, counts)


def _stroke(y: np.ndarray, places: _Places, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What the pen covers on its way along y (L,) float32, in pixels from the top.

    Pixels (P,) as indices into H * W, each once, and the share (P,) float32 in [0, 1] that is covered.
    """
    top, bottom = (np.clip(edge[places.on_page], 0, height - _SLIVER) for edge in _reach(y, places))
    # Each column has a window of slots, one for each pixel from the highest to the lowest that is touched.
    first = np.minimum.reduceat(top, places.starts).astype(np.intp)
    sizes = np.maximum.reduceat(bottom, places.starts).astype(np.intp) + 1 - first
    shift = np.cumsum(sizes) - sizes - first  # from a row of the page to its slot
    slots = np.arange(sizes.sum())
    shifts = np.repeat(shift.astype(np.float64), places.counts)
    cover = _covered(top + shifts, bottom + shifts, slots) * places.gap
    pixels = slots * width + np.repeat(places.column - shift * width, sizes)
    return pixels, np.clip(cover, 0, 1).astype(np.float32)


def _reach(y: np.ndarray, places: _Places) -> tuple[np.ndarray, np.ndarray]:
    """How high and how low the round pen reaches at each place: two arrays (N,)."""
    fraction = np.arange(places.per_sample, dtype=np.float32) / np.float32(places.per_sample)
    path = np.append((y[:-1, None] + np.diff(y)[:, None] * fraction).ravel(), y[-1])
    top = np.full(len(path) + 2 * places.aside, np.inf, np.float32)
    bottom = -top
    for offset in range(2 * places.aside + 1):
        half = np.float32(math.sqrt(places.radius**2 - ((offset - places.aside) * places.gap) ** 2))
        there = slice(offset, offset + len(path))
        np.minimum(top[there], path - half, out=top[there])
        np.maximum(bottom[there], path + half, out=bottom[there])
    return top, bottom


def _covered(top: np.ndarray, bottom: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """For each of slots 0, 1, 2, ..., the sum of what the stretches from top to bottom (N,) cover of it.

    Above an edge e lies clip(e - j, 0, 1) of slot j: all of it before the edge's slot, a fraction in it and
    nothing behind. Fractions add up slot by slot; the whole ones are a running count of edges.
    """
    count = len(slots)
    of_top, of_bottom = top.astype(np.intp), bottom.astype(np.intp)
    opened = np.bincount(of_top, minlength=count) - np.bincount(of_bottom, minlength=count)
    fractions = np.bincount(of_bottom, bottom, count) - np.bincount(of_top, top, count) + slots * opened
    return fractions + np.cumsum(opened)


def _ink(page: np.ndarray, pixels: np.ndarray, cover: np.ndarray) -> None:
    """Mix INK into these pixels of the page, as far as they are covered."""
    whole_pixels = page.reshape(-1).view("V3")  # one item a pixel: many times faster to index than rows of 3
    colours = whole_pixels.take(pixels).view(np.uint8).reshape(-1, 3)
    for channel, ink in enumerate(INK):
        below = colours[:, channel].astype(np.float32)
        colours[:, channel] = below + (ink - below) * cover + np.float32(0.5)
    whole_pixels[pixels] = colours.reshape(-1).view("V3")
