"""A run's folder: is it new, to be resumed, or done; whose checkpoint it is; what a new run starts from."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from elm_jax.cli import ConfigFlags
from elm_jax.config import Config, DataConfig, LoraConfig, differences, to_dict
from elm_jax.data.ecg_tokens import EcgTokens
from elm_jax.data.plan import ECG_ROWS
from elm_jax.data.represent import SIGNALS
from elm_jax.errors import UserError
from elm_jax.folders import ECG_BYTE, TOKENIZER, read_json, run_folder, write_json
from elm_jax.models.decoder import DecoderConfig
from elm_jax.models.functional import Arrays, Structure
from elm_jax.models.lora import is_lora
from elm_jax.run.checkpoint import Checkpoints, fingerprint, load_arrays, save_arrays
from elm_jax.runtime import distributed
from elm_jax.runtime.mesh import replicated
from elm_jax.runtime.telemetry import WANDB_ID
from elm_jax.weights.peft import save_adapter, spec_of

REFERENCE = "reference"  # folder of what an objective compares with: what is trained, as it was in the beginning
INHERITED = "inherited"  # folder of the frozen arrays that came from `init_from`


def open_folder(config: Config) -> Path:
    """Make the run's folder and write config.json, or check that the folder is of this run.

    Raises:
        UserError: the folder holds a run of another configuration (names the keys, with both values), or one whose
            config.json is gone.
    """
    folder = Path(config.workdir)
    path = folder / "config.json"
    trained = (folder / "DONE").exists() or any(child.name.isdigit() for child in folder.glob("checkpoints/*"))
    if not path.is_file() and (trained or (folder / TOKENIZER).exists() or (folder / INHERITED).exists()):
        raise UserError(
            str(folder), "a run without config.json, which says what its weights are of", "the config.json of this run",
            "put it back, or choose another --config.workdir",
        )  # fmt: skip
    changed = differences(read_json(path), config) if path.is_file() else {}
    if changed and trained:
        raise UserError(
            str(folder), _other(changed), "the same configuration, to resume",
            "undo these changes, or choose another --config.workdir",
        )  # fmt: skip
    problem = ""
    if jax.process_index() == 0:
        try:
            if changed:  # nothing has been trained yet: what is left of the other configuration goes
                for kept in (TOKENIZER, INHERITED, REFERENCE):
                    shutil.rmtree(folder / kept, ignore_errors=True)
                (folder / WANDB_ID).unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, to_dict(config))
        except UserError as error:
            problem = f"{error.where}: {error.found}"
        except OSError as error:
            problem = str(error)
    problem = distributed.gather(problem)[0]  # the others wait here, and end as the first one does
    if problem:
        raise UserError("config.workdir", problem, "a folder that can be written", "name another")
    return folder


def _other(changed: Mapping[str, str]) -> str:
    return "a run with other " + "; ".join(f"{name} ({values})" for name, values in changed.items())


def keep_tokenizer(folder: Path, tokenizer: Any, symbols: EcgTokens | None = None) -> None:
    """Put the run's tokenizer, and its ECG-Byte, into `folder` where they are not there yet; whole or not at all."""
    target, fresh = folder / TOKENIZER, folder / f"{TOKENIZER}.tmp"
    if jax.process_index() == 0 and not target.is_dir():
        shutil.rmtree(fresh, ignore_errors=True)
        tokenizer.save_pretrained(fresh)
        if symbols is not None:
            symbols.coder.save(fresh / ECG_BYTE)
        fresh.rename(target)


def keep_adapter(folder: Path, config: Config, llm: DecoderConfig, trained: Arrays, mesh: Mesh) -> None:
    """Leave the adapter, if one was trained, as a folder that PEFT opens: `adapter/`."""
    spec = spec_of(config.llm.lora)
    mine = {name: x for name, x in trained.items() if is_lora(name)}
    if spec is None or not mine:
        return
    whole = {n.removeprefix("llm."): np.asarray(jax.device_put(x, replicated(mesh))) for n, x in mine.items()}
    if jax.process_index() == 0:
        save_adapter(folder / "adapter", whole, spec, llm, config.llm.name)


def is_done(folder: Path, total_steps: int) -> bool:
    """Whether the run in this folder has finished, with at least `total_steps` to do.

    Raises:
        UserError: its file DONE is damaged.
    """
    path = folder / "DONE"
    if not path.is_file():
        return False
    done = read_json(path).get("total_steps")
    if type(done) is not int:
        raise UserError(
            str(path), f"total_steps {done!r}", "a whole number", "remove the file: the run goes on from its last step"
        )
    return done >= total_steps


def write_done(folder: Path, steps: int, total_steps: int) -> None:
    """Mark the run as finished after `steps` of `total_steps` steps: fewer where it stopped early."""
    done = {"steps": steps, "total_steps": total_steps, "stopped_early": steps < total_steps}
    write_json(folder / "DONE", done)


def frozen_fingerprints(structure: Structure, frozen: Arrays) -> dict[str, str]:
    """Part -> fingerprint of what is frozen of it."""
    parts: dict[str, Arrays] = {}
    for name, array in frozen.items():
        parts.setdefault(structure.leaves[name].part, {})[name] = array
    return {part: fingerprint(parts[part]) for part in sorted(parts)}


def check_frozen(where: str, saved: dict[str, str], structure: Structure, frozen: Arrays, parts: set[str]) -> None:
    """Raise UserError where a frozen part is not the one that the checkpoint was trained with."""
    now = frozen_fingerprints(structure, {n: x for n, x in frozen.items() if structure.leaves[n].part in parts})
    check_fingerprints(where, {part: saved[part] for part in parts & set(saved)}, now)


def check_fingerprints(where: str, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """`check_frozen` of fingerprints."""
    for part in sorted(saved):
        if now.get(part) != saved[part]:
            raise UserError(
                where, f"a checkpoint trained with other {part} weights", "the frozen weights of that run",
                f"use the same weights for the {part}, or start a new run",
            )  # fmt: skip


def data_facts(fingerprint: str) -> dict[str, Any]:
    """What a checkpoint keeps of its data: their fingerprint, and how this version makes rows and signals of them."""
    return {"data": fingerprint, "ecg_rows": ECG_ROWS, "signals": SIGNALS}


def check_data(where: str, saved: Mapping[str, Any], fingerprint: str, data: DataConfig) -> None:
    """Hold the `data_facts` of a checkpoint against the data now; says where another version read recordings otherwise.

    Raises:
        UserError: they are other data, or would come in another order.
    """
    if saved["data"] != fingerprint:
        raise UserError(
            where, "a checkpoint of other data: records, who is held out, tokenizer, system prompt or, where ECGs are "
            "symbols, how recordings are read have changed", "the data and the version that the run began with",
            "restore them, or start a new run with init_from",
        )  # fmt: skip
    if data.pack and data.share == "ecg" and saved.get("ecg_rows", 1) != ECG_ROWS:
        raise UserError(
            where, "a checkpoint of a version that divided questions about one ECG otherwise over rows",
            f"version {ECG_ROWS}, whose order of samples differs", "finish it there, or start anew with init_from",
        )  # fmt: skip
    if saved.get("signals", 1) != SIGNALS and jax.process_index() == 0:
        print(
            f"warning: {where} was begun by a version that read some recordings otherwise: it resampled without a "
            "low-pass, averaged the samples of a frame, and did not scale all units to mV. Where its data have such "
            "recordings, they now differ from those so far", file=sys.stderr,
        )  # fmt: skip


def start_from(source: str, structure: Structure, shardings: Mapping[str, Any], lora: LoraConfig) -> Arrays:
    """What the run folder `source` knows of a model of this structure: what it trained, and what it inherited.

    Raises:
        UserError: no checkpoint, or arrays of another model, or an adapter that would mean something else here.
    """
    folder = run_folder(source, "config.init_from")
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.find("best")
    if step is None:
        raise UserError(
            "config.init_from", f"{source} without a checkpoint", "a trained run", "train it first"
        )
    _check_adapter(folder, lora)
    like = structure.abstract(shardings)
    known = {**inherited(folder, like), **checkpoints.restore_arrays(step, like)}
    checkpoints.close()
    return known


def _check_adapter(folder: Path, lora: LoraConfig) -> None:
    """Raise UserError unless the adapter of the run in `folder`, where it has one, means the same under `lora`."""
    there = spec_of(LoraConfig(**read_json(folder / "config.json").get("llm", {}).get("lora", {})))
    if there is None:
        return
    here = None if lora.adapter is not None and lora.rank == 0 else spec_of(replace(lora, adapter=None))
    if here is None or (here.rank, here.alpha, here.targets) != (there.rank, there.alpha, there.targets):
        found = "none" if here is None else f"rank {here.rank}, alpha {here.alpha:g}, targets {here.targets}"
        expected = f"that of {folder}: rank {there.rank}, alpha {there.alpha:g}, targets {there.targets}"
        fix = "set llm.lora.rank, alpha and targets so, without llm.lora.adapter"
        raise UserError("llm.lora", found, expected, fix)


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
    missing = {leaf.part for name, leaf in structure.leaves.items() if name not in known}
    if "llm.lora" not in saved:  # a new adapter changes nothing until it is trained: no run need have it
        missing.discard("llm.lora")
    lacking = missing - {leaf.part for leaf in structure.leaves.values() if leaf.is_of(missing_ok)}
    without = sorted(lacking - set(saved))
    if without:
        raise UserError(
            "config.init_from", f"no {', '.join(without)} in {source}", "all parts of the model",
            f"name what may start afresh: --config.init_missing_ok={','.join(without)}",
        )  # fmt: skip
    # There it was frozen, in the dtype that run computes in; here it may be trained, in another.
    frozen_in = jnp.dtype(read_json(folder / "config.json")["llm"]["compute_dtype"])
    there = {n: x if structure.leaves[n].statistic else x.astype(frozen_in) for n, x in made.items()}
    check_frozen(source, saved, structure, there, lacking)


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
    before = read_json(folder / "config.json")
    changed = {name: x for name, x in differences(before, config).items() if not name.startswith("data.")}
    if changed:
        raise UserError(str(folder), _other(changed), "the run's own model", "leave these keys as they are")
    return config
