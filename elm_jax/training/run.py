"""A run's folder: is it new, to be resumed, or done; whose checkpoint it is; what a new run starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from elm_jax.cli import ConfigFlags
from elm_jax.config import Config, differences, to_dict
from elm_jax.errors import UserError
from elm_jax.models.functional import Arrays, Structure
from elm_jax.models.lora import is_lora
from elm_jax.runtime import distributed
from elm_jax.runtime.checkpoint import Checkpoints, fingerprint, load_arrays, save_arrays

INHERITED = "inherited"  # folder of the frozen arrays that came from `init_from`


def open_folder(config: Config) -> Path:
    """Make the run's folder and write config.json, or check that the folder is of this run.

    Raises:
        UserError: the folder holds a run of another configuration; names the keys.
    """
    folder = Path(config.workdir)
    path = folder / "config.json"
    changed = differences(read_json(path), config) if path.is_file() else []
    if changed and any(child.name.isdigit() for child in folder.glob("checkpoints/*")):
        raise UserError(
            str(folder), f"a run with other {', '.join(changed)}", "the same configuration, to resume",
            "undo these changes, or choose another --config.workdir",
        )  # fmt: skip
    problem = ""
    if jax.process_index() == 0:
        try:
            if changed:  # nothing has been trained yet: what is left of the other configuration goes
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
                shutil.rmtree(folder / INHERITED, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, to_dict(config))
        except OSError as error:
            problem = str(error)
    problem = distributed.gather(problem)[0]  # the others wait here, and end as the first one does
    if problem:
        raise UserError("config.workdir", problem, "a folder that can be written", "name another")
    return folder


def keep_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Put the run's tokenizer into `folder` where it is not there yet; whole or not at all."""
    target, fresh = folder / "tokenizer", folder / "tokenizer.tmp"
    if jax.process_index() == 0 and not target.is_dir():
        shutil.rmtree(fresh, ignore_errors=True)
        tokenizer.save_pretrained(fresh)
        fresh.rename(target)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object; who reads or is stopped meanwhile finds the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder. Raises UserError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), str(error), "a run folder's JSON file", "check the folder") from error
    if not isinstance(value, dict):
        raise UserError(str(path), type(value).__name__, "a JSON object", "check the folder")
    return value


def is_done(folder: Path, total_steps: int) -> bool:
    """Whether the run in this folder has finished, with at least `total_steps` to do."""
    path = folder / "DONE"
    if not path.is_file():
        return False
    return int(read_json(path).get("total_steps", 0)) >= total_steps


def write_done(folder: Path, steps: int, total_steps: int) -> None:
    """Mark the run as finished after `steps` of `total_steps` steps: fewer where it stopped early."""
    done = {"steps": steps, "total_steps": total_steps, "stopped_early": steps < total_steps}
    write_json(folder / "DONE", done)


def frozen_fingerprints(frozen: Arrays) -> dict[str, str]:
    """Component -> fingerprint of what is frozen of it."""
    components = sorted({name.split(".")[0] for name in frozen})
    return {c: fingerprint({n: x for n, x in frozen.items() if n.startswith(f"{c}.")}) for c in components}


def check_frozen(where: str, saved: dict[str, str], frozen: Arrays, components: set[str]) -> None:
    """Raise UserError where a frozen part is not the one that the checkpoint was trained with."""
    now = frozen_fingerprints({n: x for n, x in frozen.items() if n.split(".")[0] in components})
    for component in sorted(components & set(saved)):
        if now.get(component) != saved[component]:
            raise UserError(
                where, f"a checkpoint trained with other {component} weights", "the frozen weights of that run",
                f"use the same weights for the {component}, or start a new run",
            )  # fmt: skip


def start_from(source: str, structure: Structure, shardings: Mapping[str, Any]) -> Arrays:
    """What the run folder `source` knows of a model of this structure: what it trained, and what it inherited.

    Raises:
        UserError: no checkpoint, or arrays of another model.
    """
    folder = run_folder(source, "config.init_from")
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.find("best")
    if step is None:
        raise UserError(
            "config.init_from", f"{source} without a checkpoint", "a trained run", "train it first"
        )
    lora = read_json(folder / "config.json").get("llm", {}).get("lora", {})
    if (lora.get("rank") or lora.get("adapter")) and not any(is_lora(name) for name in structure.leaves):
        raise UserError(
            "llm.lora", f"none, but {source} was trained with it", "the same llm.lora as there",
            f"set --config.llm.lora.* as in {folder / 'config.json'}",
        )  # fmt: skip
    like = structure.abstract(shardings)
    known = {**inherited(folder, like), **checkpoints.restore_arrays(step, like)}
    checkpoints.close()
    return known


def check_start(
    source: str, structure: Structure, known: Collection[str], made: Arrays, missing_ok: tuple[str, ...]
) -> None:
    """Check what `start_from` left to be `made`: each part must be the one that `source` was trained with, frozen,
    or be named in `init_missing_ok`.

    Raises:
        UserError: a part is missing or another one.
    """
    folder = run_folder(source, "config.init_from")
    checkpoints = Checkpoints(folder, read_only=True)
    saved = checkpoints.meta(checkpoints.find("best") or 0).get("frozen", {})
    checkpoints.close()
    # A new adapter changes nothing until it is trained: no run need have it.
    missing = [name for name in structure.leaves if name not in known and not is_lora(name)]
    lacking = {name.split(".")[0] for name in missing} - set(missing_ok)
    without = sorted(lacking - set(saved))
    if without:
        raise UserError(
            "config.init_from", f"no {', '.join(without)} in {source}", "all parts of the model",
            f"name what may start afresh: --config.init_missing_ok={','.join(without)}",
        )  # fmt: skip
    # There it was frozen, in the dtype that run computes in; here it may be trained, in another.
    frozen_in = jnp.dtype(read_json(folder / "config.json")["llm"]["compute_dtype"])
    there = {n: x if structure.leaves[n].statistic else x.astype(frozen_in) for n, x in made.items() if not is_lora(n)}
    check_frozen(source, saved, there, lacking)


def keep_inherited(folder: Path, frozen: Arrays) -> None:
    """Save, once, the frozen arrays that came from another run: nothing else would have them later."""
    if frozen and not (folder / INHERITED).is_dir():
        save_arrays(folder / INHERITED, frozen)


def inherited(folder: Path, like: Mapping[str, Any]) -> Arrays:
    """The frozen arrays that the run in `folder` took from another run."""
    return load_arrays(folder / INHERITED, like) if (folder / INHERITED).is_dir() else {}


def config_of_run(checkpoint: str | None, flags: ConfigFlags) -> Config:
    """The configuration that reads a trained run: of the folder `checkpoint` with what `flags` change of it, or of
    the config file that `flags` name, which must then be that of the folder `workdir`.

    What the model is made of cannot be changed; data.*, eval.*, mesh.* and log.* can. Without `mesh.*` each device
    holds a whole copy.

    Raises:
        UserError: no run there, or a change of the model.
    """
    if checkpoint is None:
        config = flags.load()
        folder = run_folder(config.workdir, "config.workdir")
    else:
        folder = run_folder(checkpoint, "--checkpoint")
        tree = read_json(folder / "config.json") | {"workdir": str(folder), "mesh": {}}
        config = flags.over(tree)
    changed = [
        name
        for name in differences(read_json(folder / "config.json"), config)
        if not name.startswith("data.")
    ]
    if changed:
        raise UserError(
            str(folder),
            f"a run with other {', '.join(changed)}",
            "the run's own model",
            "leave these keys as they are",
        )
    return config


def run_folder(path: str, where: str) -> Path:
    """A folder that holds a run. Raises UserError, naming `where`, otherwise."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            where, f"{path} without config.json", "a run folder", "give the workdir of a training run"
        )
    return folder
