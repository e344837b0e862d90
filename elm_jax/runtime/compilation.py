"""Compiled programs are kept between runs, so that a restart does not pay for compilation again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where the program keeps what it can make again: $ELM_JAX_CACHE, else the user's cache folder."""
    return Path(os.environ.get("ELM_JAX_CACHE") or Path.home() / ".cache" / "elm_jax")


def keep_compiled() -> None:
    """Use the persistent compilation cache: JAX_COMPILATION_CACHE_DIR if that is set, else in our cache folder."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
