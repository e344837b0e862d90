"""Whether a file lies in a folder, wherever links lead; and where it may lie instead."""

import contextlib
import json
import os
from functools import lru_cache
from pathlib import Path

from elm_jax.ecg import shards
from elm_jax.ecg.wfdb_record import header_of

_DEEPEST, _MOST_FOLDERS = 16, 100  # parts of a path, and folders, among which a file is looked for that is not there


def is_inside(file: str, folder: str) -> bool:
    """Whether a file lies in a folder, wherever links lead."""
    try:
        above, name = os.path.split(os.path.join(os.getcwd(), file))  # as it is: `..` behind a link leads elsewhere
        real = os.path.join(_real(above), name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        return real.startswith(f"{_real(os.path.join(os.getcwd(), folder)).rstrip(os.sep)}{os.sep}")
    except ValueError:  # no file can be called so, as reading it says
        return True


@lru_cache(4096)
def is_still_inside(file: str, folder: str, cwd: str) -> bool:
    """`is_inside` of a file of thousands of recordings, looked for once."""
    return is_inside(file, folder)


@lru_cache(1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def mended(path: str, root: str) -> str:
    """What to do where a file in `root`, or in a folder of it, ends as the `path` of an ECG does, else ""."""
    parts = path.split("/")
    with contextlib.suppress(OSError, ValueError):
        below = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
        for cut in range(1, min(len(parts), _DEEPEST)):
            rest = "/".join(parts[cut:])
            for folder in (root, *below[:_MOST_FOLDERS]) if rest and ".." not in parts[cut:] else ():
                file = Path(folder, rest)
                if file.is_file() or header_of(file).is_file() or shards.find(str(file)):
                    prefixes = json.dumps({"/".join(parts[:cut]) + "/": folder})
                    return f"it lies in {folder} by another name: set --config.data.prefixes='{prefixes}'"
    return ""
