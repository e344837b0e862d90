"""A run's folder: is it new, to be resumed, or done; whose checkpoint it is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from elm_jax.config import Config, DataConfig, differences, to_dict
from elm_jax.data.plan import ECG_ROWS
from elm_jax.data.represent import SIGNALS
from elm_jax.errors import UserError
from elm_jax.folders import (
    CONFIG,
    ECG_BYTE,
    TOKENIZER,
    claim_folder,
    read_json,
    read_run_config,
    write_checksums,
    write_json,
    write_run_config,
)
from elm_jax.run.config import told
from elm_jax.run.weights import INHERITED
from elm_jax.runtime import distributed
from elm_jax.runtime.telemetry import WANDB_ID
from elm_jax.symbols.coder import EcgByte

REFERENCE = "reference"  # folder of what an objective compares with: what is trained, as it was in the beginning


def open_folder(config: Config) -> Path:
    """Make the run's folder and write config.json, or check that the folder is of this run. Nobody else may train in it
    until `leave_folder`, or this process's end in any way.

    Raises:
        UserError: the folder holds a run of another configuration (names the keys, with both values), or one whose
            config.json is gone; or another process trains in it.
    """
    folder = Path(config.workdir)
    path = folder / CONFIG
    trained = (folder / "DONE").exists() or any(child.name.isdigit() for child in folder.glob("checkpoints/*"))
    if not path.is_file() and (trained or (folder / TOKENIZER).exists() or (folder / INHERITED).exists()):
        raise UserError(
            str(folder), "a run without config.json, which says what its weights are of", "the config.json of this run",
            "put it back, or choose another --config.workdir",
        )  # fmt: skip
    changed = differences(read_run_config(folder), config) if path.is_file() else {}
    if changed and trained:
        raise UserError(
            str(folder), told(changed), "the same configuration, to resume",
            "undo these changes, or choose another --config.workdir",
        )  # fmt: skip
    problem, other = "", ""
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            other = claim_folder(folder)
            if changed and not other:  # nothing has been trained yet: what is left of the other configuration goes
                for kept in (TOKENIZER, INHERITED, REFERENCE):
                    shutil.rmtree(folder / kept, ignore_errors=True)
                (folder / WANDB_ID).unlink(missing_ok=True)
            if not other:
                write_run_config(folder, to_dict(config))
        except UserError as error:
            problem = f"{error.where}: {error.found}"
        except OSError as error:
            problem = str(error)
    problem, other = distributed.gather((problem, other))[0]  # the others wait here, and end as the first one does
    if other:
        fix = "wait for its end or stop it, or choose another --config.workdir"
        raise UserError(str(folder), f"a run that {other} trains", "one training in a folder at a time", fix)
    if problem:
        raise UserError("config.workdir", problem, "a folder that can be written", "name another")
    return folder


def keep_tokenizer(folder: Path, tokenizer: Any, ecg_byte: EcgByte | None = None) -> None:
    """Put the run's tokenizer and its ECG-Byte, those that it has, into `folder` where they are not there yet; whole
    or not at all."""
    target, fresh = folder / TOKENIZER, folder / f"{TOKENIZER}.tmp"
    if jax.process_index() == 0 and not target.is_dir() and (tokenizer is not None or ecg_byte is not None):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        if ecg_byte is not None:
            ecg_byte.save(fresh / ECG_BYTE)
        write_checksums(fresh)
        fresh.rename(target)


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
