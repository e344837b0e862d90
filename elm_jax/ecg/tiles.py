"""An image of any resolution as square tiles, and the order in which a model reads their patches.

LLaVA 1.6's "anyres", as PULSE has it: the image is laid on the grid that keeps most of its pixels and cut there; before
the tiles comes all of the image in one. The rules, their roundings too, are those of LLaVA's `mm_utils.py` and
`llava_arch.py`. Patches are merged
    flat: tile after tile;
    spatial: the first tile, then the rows of the whole grid;
    spatial_unpad: so, without what lies outside of the image, and after each row a place for a learnt newline.

H x W pixels of an image, S pixels a side of a tile, n tiles, p patches a side of a tile.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

MERGES = ("flat", "spatial", "spatial_unpad")
NEWLINE = -1  # in the order of patches, the place of a newline
Size = tuple[int, int]  # height, width


def grid_of(size: Size, grids: Sequence[Size]) -> Size:
    """Of some grids, (height, width) in pixels, the one on which most pixels of an image are told apart; of several
    that with least room left over, and of these the first."""

    def told(grid: Size) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return -kept, grid[0] * grid[1] - kept

    return min(grids, key=told)


def on_grid(image: np.ndarray, grid: Size, resample: int, around: int = 0) -> np.ndarray:
    """An image (H, W, 3) uint8 as large as fits on a grid, in the middle of it; `around` it black, or another grey."""
    (height, width), (rows, columns) = image.shape[:2], grid
    across, down = columns / width, rows / height
    if across < down:
        columns, rows = columns, min(math.ceil(height * across), rows)
    else:
        columns, rows = min(math.ceil(width * down), columns), rows
    page, top, left = np.full((*grid, 3), around, np.uint8), (grid[0] - rows) // 2, (grid[1] - columns) // 2
    resized = np.asarray(Image.fromarray(image).resize((columns, rows), resample))
    page[top : top + rows, left : left + columns] = resized
    return page


def tiles(image: np.ndarray, side: int, grids: Sequence[Size], resample: int) -> np.ndarray:
    """An image (H, W, 3) uint8 -> (1 + n, S, S, 3) uint8: all of it, squeezed, and its tiles row by row."""
    whole = np.asarray(Image.fromarray(image).resize((side, side), resample))
    page = on_grid(image, grid_of((image.shape[0], image.shape[1]), grids), resample)
    cut = page.reshape(page.shape[0] // side, side, -1, side, 3).swapaxes(1, 2)
    return np.concatenate([whole[None], cut.reshape(-1, side, side, 3)])


def count(size: Size, side: int, grids: Sequence[Size]) -> int:
    """1 + n, of an image of this size."""
    height, width = grid_of(size, grids)
    return 1 + (height // side) * (width // side)


def order(size: Size, side: int, grids: Sequence[Size], patches: int, merge: str) -> np.ndarray:
    """The patches of an image of this size, as numbers among the (1 + n) p² of its tiles, in the order in which they
    are read; `NEWLINE` where one stands. (N,) int."""
    height, width = grid_of(size, grids)
    each, base = patches * patches, np.arange(patches * patches)
    numbers = each + np.arange(height // side * (width // side) * each)
    if merge == "flat":
        return np.concatenate([base, numbers])
    grid = numbers.reshape(height // side, width // side, patches, patches).swapaxes(1, 2)
    grid = grid.reshape(height // side * patches, -1)
    if merge == "spatial":
        return np.concatenate([base, grid.ravel()])
    grid = _unpadded(grid, size)
    lines = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)
    return np.concatenate([base, lines.ravel()])


def _unpadded(grid: np.ndarray, size: Size) -> np.ndarray:
    """The rows and columns of patches that the image lies on."""
    (rows, columns), (height, width) = grid.shape, size
    if width / height > columns / rows:
        margin = (rows - int(height * (columns / width))) // 2
        return grid[margin : rows - margin]
    margin = (columns - int(width * (rows / height))) // 2
    return grid[:, margin : columns - margin]
