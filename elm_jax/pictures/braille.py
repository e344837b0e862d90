"""An ECG in the terminal, out of Braille characters: 2 x 4 dots each.

C leads, L samples, W characters, X columns of dots, Y rows of dots.
"""

import numpy as np

LINES = 3  # of characters that a lead has
LABEL = 5  # characters in front of each lead
LEAST_MV = 0.5  # a lead's room never stands for less
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of U+2800, (row, column)


def in_characters(signal: np.ndarray, leads: tuple[str, ...], sampling_rate: float, width: int) -> list[str]:
    """The ECG (C, L) in mV as lines of at most `width` (40 or more) characters: lead below lead, all at one scale.

    A column of dots reaches from the least to the greatest of its samples, so that no narrow peak is lost.
    """
    columns = 2 * max(width - LABEL, 1)
    centred = signal - np.median(signal, axis=1, keepdims=True)
    mv = max(2 * float(np.abs(centred).max()), LEAST_MV)
    lines = []
    for name, lead in zip(leads, centred, strict=True):
        rows = _characters(_traced(lead / mv + 0.5, columns, 4 * LINES))
        lines += [f"{name if i == LINES // 2 else '':<{LABEL}}{row}".rstrip() for i, row in enumerate(rows)]
    return [*lines, f"{'':<{LABEL}}{signal.shape[1] / sampling_rate:g} s; each lead's room is {mv:.2g} mV"]


def _traced(heights: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Heights (L,) of 0 to 1 -> dots (Y, X) bool, the first row on top."""
    columns = min(columns, len(heights))
    edges = np.linspace(0, len(heights) - 1, columns + 1).round().astype(int)
    at = ((1 - heights) * (rows - 1)).round().astype(int).clip(0, rows - 1)
    dots = np.zeros((rows, columns), bool)
    for column in range(columns):
        part = at[edges[column] : edges[column + 1] + 1]  # with the next one's first, so that lines are connected
        dots[part.min() : part.max() + 1, column] = True
    return dots


def _characters(dots: np.ndarray) -> list[str]:
    """Dots (Y, X) as lines of characters."""
    rows, columns = dots.shape
    even = np.pad(dots, ((0, -rows % 4), (0, -columns % 2)))
    cells = even.reshape(even.shape[0] // 4, 4, even.shape[1] // 2, 2)
    codes = 0x2800 + np.einsum("rycx,yx->rc", cells.astype(int), _DOTS)
    return ["".join(map(chr, row)).replace("\u2800", " ") for row in codes.tolist()]  # some draw the empty one
