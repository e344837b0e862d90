"""The ECG on paper: the trace lies where matplotlib draws it, to a pixel; the layout; what has no picture."""

import threading

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import maximum_filter, maximum_filter1d, minimum_filter1d

from elm_jax.ecg.rasterize import DPI, INK, PAPER, REFERENCE_DPI, draw
from elm_jax.ecg.recording import LEADS, read_ecg, to_segment
from elm_jax.ecg.synthetic import synthesize
from elm_jax.errors import UserError

RATE = 250.0
OFF_THE_PAGE = 1e6  # mV
RNG = np.random.default_rng(3)
ECG = synthesize((1, 2), RATE, 2500)
SIGNALS = {
    "ecg": ECG,
    "steep spikes": (RNG.random((12, 2500)) < 0.01) * RNG.normal(0, 3, (12, 2500)),
    "noise": RNG.normal(0, 0.5, (12, 2500)),
    "cut off at the page's ends": ECG * 9,
}


def by_matplotlib(signal, dpi):
    """What share of each pixel is inked in matplotlib's rendering at the same size: (H, W)."""
    rows, samples = signal.shape
    figure = Figure(figsize=(2 * samples / RATE, rows * 2.5 * 1.1), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, samples / RATE)
    axes.set_ylim(-(rows - 1) * 2.5 - 2.0, 2.0)
    for row, lead in enumerate(signal):
        axes.plot(np.arange(samples) / RATE, lead - 2.5 * row, color="black", linewidth=0.6)
    canvas.draw()
    return 1 - np.asarray(canvas.buffer_rgba())[..., 0] / 255


def by_us(signal, dpi, leads):
    """The same of ours, from a page with traces and one without; and where no name stands."""
    blank = draw(np.full(signal.shape, OFF_THE_PAGE), RATE, leads, dpi)[..., 0].astype(float)
    page = draw(signal, RATE, leads, dpi)[..., 0]
    return (blank - page) / np.maximum(blank - INK[0], 1), blank > 100


def assert_within_one_pixel(ours, theirs, beside_names):
    """Wherever one has ink, the other has some in that pixel or one of its eight neighbours."""
    for a, b in ((ours, theirs), (theirs, ours)):
        inked = (a > 0.2) & beside_names
        assert inked.sum() > 500
        alone = inked & (maximum_filter(b, 3) < 0.1)
        assert not alone.any(), f"{alone.sum()} of {inked.sum()} at {np.argwhere(alone)[:5].tolist()}"


@pytest.mark.parametrize("dpi", [DPI, 100])
@pytest.mark.parametrize("kind", SIGNALS)
def test_the_trace_is_within_one_pixel_of_matplotlib(kind, dpi):
    ours, beside_names = by_us(SIGNALS[kind], dpi, LEADS)
    theirs = by_matplotlib(SIGNALS[kind], dpi)
    assert ours.shape == theirs.shape == (33 * dpi, 20 * dpi)
    assert_within_one_pixel(ours, theirs, beside_names)
    assert abs(ours[beside_names].sum() / theirs[beside_names].sum() - 1) < 0.06, "not as much ink"


@pytest.mark.parametrize("dpi", [DPI, 80, REFERENCE_DPI])
def test_in_each_column_the_trace_begins_and_ends_within_one_pixel_of_matplotlib(dpi):
    lead = ECG[1:2, :1250]
    ours, _ = by_us(lead, dpi, ("",))
    theirs = by_matplotlib(lead, dpi)
    a, b = ours > 0.1, theirs > 0.1
    drawn = a.any(0) & b.any(0)
    assert drawn.sum() >= a.shape[1] - 2
    for edge in (lambda x: x.argmax(0), lambda x: len(x) - 1 - x[::-1].argmax(0)):
        x, y = edge(a)[drawn], edge(b)[drawn]
        # One pixel up or down, or on a steep flank one to the side.
        assert (x >= minimum_filter1d(y, 3) - 1).all() and (x <= maximum_filter1d(y, 3) + 1).all()
        assert np.median(np.abs(x - y)) == 0


@pytest.mark.parametrize("name", ["ptbxl/records500/00000/00002_hr", "cinc2021/JS20000"])
def test_real_recordings_are_within_one_pixel_of_matplotlib(shared, name):
    signal = to_segment(read_ecg(shared / "real/ecg" / name))
    ours, beside_names = by_us(signal, DPI, LEADS)
    assert_within_one_pixel(ours, by_matplotlib(signal, DPI), beside_names)


@pytest.mark.slow
def test_at_the_size_of_the_reference_the_trace_is_within_one_pixel_of_matplotlib():
    ours, beside_names = by_us(ECG, REFERENCE_DPI, LEADS)
    theirs = by_matplotlib(ECG, REFERENCE_DPI)
    assert ours.shape == theirs.shape == (8250, 5000)
    assert_within_one_pixel(ours, theirs, beside_names)


@pytest.mark.slow
def test_our_size_shows_an_encoder_what_the_size_of_the_reference_shows():
    small, large = (
        np.asarray(Image.fromarray(draw(ECG, RATE, LEADS, dpi)).resize((224, 369), Image.Resampling.BICUBIC), float)
        for dpi in (DPI, REFERENCE_DPI)
    )
    assert np.abs(small - large).mean() < 1.0, "levels of 255"


# ---- layout


def blank_page(rows=12, samples=2500, dpi=100):
    return draw(np.full((rows, samples), OFF_THE_PAGE), RATE, tuple(LEADS[:rows]), dpi)


@pytest.mark.parametrize("rows, samples, dpi, shape", [(12, 2500, 50, (1650, 1000)), (1, 500, 50, (137, 200))])
def test_the_size_is_two_inches_a_second_and_two_and_three_quarters_a_row(rows, samples, dpi, shape):
    page = draw(np.zeros((rows, samples)), RATE, tuple(LEADS[:rows]), dpi)
    assert page.shape == (*shape, 3) and page.dtype == np.uint8


def test_a_row_is_two_and_a_half_mv_and_the_first_lies_two_mv_from_the_top():
    levels = np.zeros((12, 2500))
    ink = by_us(levels, 100, LEADS)[0][:, 1000:]
    rows = np.arange(len(ink)) + 0.5
    per_mv = 3300 / 31.5
    for row in range(12):
        near = np.abs(rows - (2 + 2.5 * row) * per_mv) < per_mv
        centre = (ink[near].sum(1) * rows[near]).sum() / ink[near].sum()
        assert abs(centre - (2 + 2.5 * row) * per_mv) < 0.1, "a thin line within a pixel"


def test_up_is_positive_and_time_runs_to_the_right():
    signal = np.zeros((1, 500))
    signal[0, 400:] = 1.0
    ink = by_us(signal, 100, ("I",))[0]
    height = ink * (np.arange(len(ink)) + 0.5)[:, None]
    y = height.sum(0) / np.maximum(ink.sum(0), 1e-9)
    per_mv = 275 / 4
    assert abs(y[200] - 2 * per_mv) < 0.1 and abs(y[380] - per_mv) < 0.1
    assert y[315] > 1.9 * per_mv and y[325] < 1.1 * per_mv


def test_lines_are_where_seconds_and_mv_are_and_strong_ones_are_stronger():
    page = blank_page()[..., 1].astype(int)  # a column is 5 ms, a mV is 104.76 rows
    row, column = page[40], page[:, 1003]  # between horizontal and between vertical lines
    assert (row[8::40][:-1] < row[4::40][:-1]).all(), "a fine line every 8 columns"
    strong = row[np.arange(40, 2000, 40)]
    assert strong.max() < row[np.arange(8, 2000, 40)].min(), "a strong one every 40"
    at = (np.arange(-19, 290) * 0.1 + 2) * 3300 / 31.5
    fine = column[at[(at > 1) & (at < 3299)].astype(int)]
    assert np.median(column) > np.median(fine)
    assert (blank_page(dpi=250)[60, 5:15] == PAPER).all(), "paper between the lines"


def test_each_row_bears_its_name_at_the_left():
    page = blank_page()
    dark = (page < 60).all(2)
    assert not dark[:, 200:].any()
    per_mv = 3300 / 31.5
    for row in range(12):
        zero = (2 + 2.5 * row) * per_mv
        assert dark[int(zero - 1.25 * per_mv) : int(zero - 0.5 * per_mv), :150].sum() > 40, LEADS[row]
    renamed = draw(np.full((1, 500), OFF_THE_PAGE), RATE, ("V6",), 100)
    assert (renamed != draw(np.full((1, 500), OFF_THE_PAGE), RATE, ("I",), 100)).any()


def test_the_trace_is_of_the_ink_and_crossing_traces_do_not_lighten():
    page = draw(np.zeros((1, 500)), RATE, ("I",), 500)
    assert (page[687, 500:900] == INK).all()
    crossing = np.zeros((2, 500))
    crossing[1] = np.linspace(0, 4, 500)
    both = draw(crossing, RATE, ("I", "II"), 100).astype(int)
    for row in range(2):
        alone = np.full((2, 500), OFF_THE_PAGE)
        alone[row] = crossing[row]
        assert (both <= draw(alone, RATE, ("I", "II"), 100).astype(int) + 1).all()


# ---- use


def test_the_same_signal_gives_the_same_page_and_pages_do_not_share_memory():
    first, second = draw(ECG, RATE, LEADS), draw(ECG, RATE, LEADS)
    np.testing.assert_array_equal(first, second)
    second[:] = 0
    np.testing.assert_array_equal(draw(ECG, RATE, LEADS), first)


def test_it_draws_on_the_array_it_is_given_whatever_was_there():
    out = np.full((1650, 1000, 3), 7, np.uint8)
    assert draw(ECG, RATE, LEADS, out=out) is out
    np.testing.assert_array_equal(out, draw(ECG, RATE, LEADS))


def test_threads_draw_what_one_draws():
    signals = [SIGNALS[kind][:, :500] for kind in SIGNALS]
    expected = [draw(signal, RATE, LEADS) for signal in signals]
    found = [None] * len(signals)

    def work(i):
        found[i] = draw(signals[i], RATE, LEADS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(signals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length, rate", [(500, 250.0), (1250, 250.0), (1000, 100.0), (5000, 500.0), (777, 123.4)])
def test_other_lengths_and_rates_have_their_pages(length, rate):
    page = draw(RNG.normal(0, 0.2, (12, length)), rate, LEADS)
    assert page.shape == (1650, int(2 * DPI * length / rate + 1e-6), 3)
    assert (page[:, -3:] != draw(np.full((12, length), OFF_THE_PAGE), rate, LEADS)[:, -3:]).any(), "to the very end"


def test_the_largest_numbers_are_only_off_the_page():
    signal = np.zeros((12, 500))
    signal[:, 100:200] = np.finfo(np.float64).max
    signal[:, 200:300] = -1e300
    assert draw(signal, RATE, LEADS).shape == (1650, 200, 3)


@pytest.mark.parametrize(
    "signal, rate, leads, dpi, what",
    [
        (np.array([[0.0, np.nan, np.inf]]), 250, ("I",), 50, "2 samples that are not finite"),
        (np.zeros((2, 500)), 250, ("I",), 50, "1 leads"),
        (np.zeros(500), 250, ("I",), 50, r"shape \(500,\)"),
        (np.zeros((0, 500)), 250, (), 50, "0 leads"),
        (np.zeros((1, 1)), 250, ("I",), 50, r"shape \(1, 1\)"),
        (np.zeros((1, 500)), 0, ("I",), 50, "sampling_rate: found 0"),
        (np.zeros((1, 500)), float("nan"), ("I",), 50, "sampling_rate"),
        (np.zeros((1, 500)), 250, ("I",), 3, "dpi: found 3"),
    ],
)
def test_what_has_no_picture_is_refused(signal, rate, leads, dpi, what):
    with pytest.raises(UserError, match=what):
        draw(signal, rate, leads, dpi)
