"""How long the pictures of an ECG take on this machine, beside matplotlib; prints the table of docs/benchmarks.md.

    python scripts/bench_images.py

Times are of the processor (all threads of this process), the least of several repetitions, so that other work on
the machine changes them little.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from PIL import Image

from elm_jax.ecg import rasterize
from elm_jax.ecg.augment import augment_ecg, augment_image
from elm_jax.ecg.images import CLIP, SIGLIP2, VIT, process, stacked
from elm_jax.ecg.recording import LEADS, normalize
from elm_jax.ecg.synthetic import synthesize

RATE, SAMPLES = 250.0, 2500
PROCESSING = {"clip": CLIP, "vit": VIT, "siglip2": SIGLIP2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15, help="repetitions of ours; matplotlib's are a fifth")
    repeat = parser.parse_args().repeat
    ecg = synthesize((1, 2), RATE, SAMPLES)
    print(f"{_processor()}, one thread; 12 leads, 10 s, milliseconds\n")
    _drawing(ecg, repeat)
    _processing(ecg, repeat)
    _augmenting(ecg, repeat)


def _drawing(ecg: np.ndarray, repeat: int) -> None:
    print("| page | size | matplotlib | ours | times faster | ours, array reused | times faster |")
    print("|---|---|---|---|---|---|---|")
    for dpi in (rasterize.DPI, rasterize.REFERENCE_DPI):
        page = rasterize.draw(ecg, RATE, LEADS, dpi)
        theirs = _least(lambda dpi=dpi: draw_by_matplotlib(ecg, dpi), max(2, repeat // 5))
        ours = _least(lambda dpi=dpi: rasterize.draw(ecg, RATE, LEADS, dpi), repeat)
        reused = _least(lambda dpi=dpi, page=page: rasterize.draw(ecg, RATE, LEADS, dpi, out=page), repeat)
        size = f"{page.shape[1]} x {page.shape[0]}"
        times = f"{theirs:.0f} | {ours:.1f} | {theirs / ours:.0f} | {reused:.1f} | {theirs / reused:.0f}"
        print(f"| {dpi} dpi | {size} | {times} |")
    small, large = (rasterize.draw(ecg, RATE, LEADS, dpi) for dpi in (rasterize.DPI, rasterize.REFERENCE_DPI))
    print("\nWhat an encoder sees of the two sizes differs by, on average, in levels of 255:")
    for name, processing in PROCESSING.items():
        a, b = (_pixels(process(page, processing)) for page in (small, large))
        print(f"- {name}: {np.abs(a - b).mean():.2f}")


def _processing(ecg: np.ndarray, repeat: int) -> None:
    images = {
        f"page, {rasterize.DPI} dpi": rasterize.draw(ecg, RATE, LEADS),
        f"page, {rasterize.REFERENCE_DPI} dpi": rasterize.draw(ecg, RATE, LEADS, rasterize.REFERENCE_DPI),
        "stacked signal": stacked(normalize(ecg)),
    }
    print(f"\n| resizing | {' | '.join(PROCESSING)} |\n|---|{'---|' * len(PROCESSING)}")
    for name, image in images.items():
        times = [_least(lambda p=p, image=image: process(image, p), repeat) for p in PROCESSING.values()]
        print(f"| {name} | {' | '.join(f'{t:.1f}' for t in times)} |")


def _augmenting(ecg: np.ndarray, repeat: int) -> None:
    page = rasterize.draw(ecg, RATE, LEADS)
    rngs = [np.random.default_rng(i) for i in range(8 * repeat)]
    start = time.process_time()
    for rng in rngs:
        augment_image(page, rng)
    image = (time.process_time() - start) / len(rngs) * 1e3
    start = time.process_time()
    for rng in rngs:
        augment_ecg(ecg, rng)
    signal = (time.process_time() - start) / len(rngs) * 1e3
    print(f"\nAugmentation, on average: signal {signal:.1f} ms, page at {rasterize.DPI} dpi {image:.1f} ms.")


def draw_by_matplotlib(ecg: np.ndarray, dpi: float) -> np.ndarray:
    """The same page by matplotlib: paper, lines, names, traces."""
    rows, samples = ecg.shape
    seconds = samples / RATE
    size = (rasterize.INCH_PER_SECOND * seconds, rasterize.INCH_PER_ROW * rows)
    figure = Figure(figsize=size, dpi=dpi, facecolor=_colour(rasterize.PAPER))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, seconds)
    axes.set_ylim(-(rows - 1) * rasterize.ROW_MV - rasterize.EDGE_MV, rasterize.EDGE_MV)
    axes.set_facecolor(_colour(rasterize.PAPER))
    axes.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for axis, fine, strong in zip((axes.xaxis, axes.yaxis), rasterize.FINE_STEP, rasterize.STRONG_STEP, strict=True):
        axis.set_minor_locator(MultipleLocator(fine))
        axis.set_major_locator(MultipleLocator(strong))
    axes.grid(which="minor", linewidth=rasterize.FINE_POINTS, color=_colour(rasterize.FINE))
    axes.grid(which="major", linewidth=rasterize.STRONG_POINTS, color=_colour(rasterize.STRONG))
    x, y = rasterize.NAME_AT
    for row, (lead, name) in enumerate(zip(ecg, LEADS, strict=True)):
        zero = -row * rasterize.ROW_MV
        axes.plot(np.arange(samples) / RATE, lead + zero, linewidth=rasterize.INK_POINTS, color=_colour(rasterize.INK))
        axes.text(x, zero + y, name, fontsize=rasterize.NAME_POINTS, weight="bold", verticalalignment="center")
    canvas.draw()
    return np.asarray(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def _colour(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    return rgb[0] / 255, rgb[1] / 255, rgb[2] / 255


def _pixels(processed: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    return (processed["patches"] if isinstance(processed, dict) else processed).astype(float)


def _least(work: Callable[[], object], repeat: int) -> float:
    """Milliseconds of processor time."""
    work()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
