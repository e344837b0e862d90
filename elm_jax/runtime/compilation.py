"""Compiled programs are kept between runs, so that a restart does not pay for compilation again."""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where the program keeps what it can make again: $ELM_JAX_CACHE, else the user's cache folder."""
    return Path(os.environ.get("ELM_JAX_CACHE") or Path.home() / ".cache" / "elm_jax")


def keep_compiled() -> None:
    """Use the persistent compilation cache: JAX_COMPILATION_CACHE_DIR if that is set, else in our cache folder.

    A program that has changed on the disk is compiled again.
    """
    import jax

    _hold_against_checksums()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


@functools.cache
def _hold_against_checksums() -> None:
    """Let JAX's cache believe no file. XLA runs what it is given, and nothing checks that but zlib, where JAX packs
    with it; a damaged file would also stay, and have its program compiled at every start."""
    from jax._src import compilation_cache, lru_cache  # no public call says how entries are read and written

    class Checked(lru_cache.LRUCache):
        """Entries whose names on the disk end with a checksum: others' are not seen, and not in the way."""

        def get(self, key: str) -> bytes | None:
            for file in self.path.glob(f"{glob.escape(key)}.*-cache"):
                name = file.name.removesuffix("-cache")
                content = super().get(name)
                if content is None or name == _named(key, content):
                    return content
                _log.warning("%s is damaged: its program is compiled again", file)
                file.unlink(missing_ok=True)
            return None

        def put(self, key: str, value: bytes) -> None:
            super().put(_named(key, value), value)

    compilation_cache.LRUCache = Checked  # pyright: ignore[reportPrivateImportUsage]
    compilation_cache.reset_cache()


def _named(key: str, content: bytes) -> str:
    return f"{key}.{hashlib.blake2b(content, digest_size=16).hexdigest()}"
