"""The configuration of a trained run, as it is read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elm_jax.cli import ConfigFlags
from elm_jax.config import Config, differences, resolve
from elm_jax.errors import UserError
from elm_jax.folders import CONFIG, read_run_config, run_folder


def config_of_run(checkpoint: str | None, flags: ConfigFlags) -> Config:
    """The configuration that reads a trained run: of the folder `checkpoint` with what `flags` change of it, or of
    the config file that `flags` name, which must then be that of the folder `workdir`.

    What the model is made of cannot be changed; data.*, retrieval.*, eval.*, rl.*, mesh.* and log.* can. Without
    `mesh.*` each device holds a whole copy.

    Raises:
        UserError: no run there, or a change of the model.
    """
    if checkpoint is None:
        config = flags.load()
        folder = run_folder(config.workdir, "config.workdir")
    else:
        folder = run_folder(checkpoint, "--checkpoint")
        tree = read_run_config(folder) | {"workdir": str(folder), "mesh": {}}
        _check_own(folder, tree)
        config = flags.over(tree)
    before = read_run_config(folder)
    free = "data.", "retrieval.", "rl."
    changed = {name: x for name, x in differences(before, config).items() if not name.startswith(free)}
    if changed:
        raise UserError(str(folder), told(changed), "the run's own model", "leave these keys as they are")
    return config


def _check_own(folder: Path, tree: Mapping[str, Any]) -> None:
    """Raise UserError, which names the file, where the run's own configuration is none of this version."""
    try:
        resolve(tree)
    except UserError as error:
        fix = "put it back, or use the version that wrote it"
        raise UserError(f"{folder / CONFIG}, {error.where}", error.found, error.expected, fix) from None


def told(changed: Mapping[str, str]) -> str:
    """What `differences` found, in words."""
    return "a run with other " + "; ".join(f"{name} ({values})" for name, values in changed.items())
