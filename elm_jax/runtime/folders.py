"""Folders that results go to: that can be written, or that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from elm_jax.errors import UserError, one_line


def writable_folder(out: Path, where: str) -> Path:
    """`out`, made where it was missing. Raises UserError, which names `where`, unless files can be written there."""
    check_writable(out, where)
    out.mkdir(parents=True, exist_ok=True)
    return out


def check_writable(out: Path, where: str) -> None:
    """Raise UserError, which names `where`, unless `out` is a folder that can be written, or can be made one."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise UserError(where, one_line(str(error)), "a folder that can be written", "name another") from error


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, to be filled; at the end it takes the place of `out`, and of what was there.

    An exception leaves `out` as it was. Raises UserError where files cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        old = fresh.with_name(f"{fresh.name}.old")
        try:
            yield fresh
            mask = os.umask(0)
            os.umask(mask)
            fresh.chmod(0o777 & ~mask)
            if out.exists():
                out.rename(old)
            fresh.rename(out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
            elif old.exists():
                old.rename(out)
    except OSError as error:
        fix = "name another, or make room"
        raise UserError("--out", str(error), "a folder that can be written", fix) from error
