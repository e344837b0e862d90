"""An import from its beginning to its end: a checkpoint in, a run folder out, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.assemble import Assembly, assemble
from elm_jax.cli import ConfigFlags
from elm_jax.config import to_dict
from elm_jax.errors import UserError
from elm_jax.exchange.config import Imported, configure
from elm_jax.exchange.foreign import Foreign, open_foreign
from elm_jax.exchange.match import ImportedArray, arrays_of
from elm_jax.folders import whole_folder, write_run_config
from elm_jax.keys import LoraConfig
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.run.folder import keep_tokenizer
from elm_jax.run.verification import own_checksums, write_list
from elm_jax.run.weights import IMPORTED, INHERITED
from elm_jax.weights.peft import spec_of
from elm_jax.weights.safetensors import SafetensorsWriter

REPORT = "import_report.json"
_OPTIMIZER = "the state of an optimizer: a new run starts with its own"
_OTHER = "no weights of a model"


def import_weights(path: str | Path, out: str | Path, flags: ConfigFlags, merge: bool = False) -> dict[str, Any]:
    """Import the checkpoint at `path` into the new run folder `out`; the report, which is written into it too.

    `merge`: an adapter is added to the weights beneath it.

    Raises:
        UserError: the checkpoint cannot be read or does not fit, or `out` is there; nothing has been written then.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("--out", f"{out}, which is not empty", "a new folder", "name another, or remove it")
    source = open_foreign(path)
    imported = configure(source, flags, str(out))
    spec = spec_of(imported.assembly.config.llm.lora)
    if merge and (spec is None or source.kind == "encoder"):
        raise UserError("--merge", f"no adapter in {path}", "LoRA, to be merged", "leave --merge out")
    arrays, left_out = arrays_of(source, imported, spec if merge else None)
    assembly = _merged(imported.assembly) if merge else imported.assembly
    report = _report(source, imported, assembly, arrays, left_out, merge)
    _write(out.resolve(), assembly, arrays, report)
    return report


def _merged(assembly: Assembly) -> Assembly:
    return assemble(replace(assembly.config, llm=replace(assembly.config.llm, lora=LoraConfig())))


def _report(
    source: Foreign, imported: Imported, assembly: Assembly, arrays: Mapping[str, ImportedArray],
    left_out: Mapping[str, str], merge: bool,
) -> dict[str, Any]:  # fmt: skip
    """What went where, as a JSON object."""
    config = assembly.config
    names = assembly.structure.leaves
    parts = dict.fromkeys(leaf.part for name, leaf in names.items() if name not in arrays)
    made = {part: _from_elsewhere(part, assembly) for part in parts}
    return {
        "source": str(source.path), "kind": source.kind, "elm": config.elm, "llm": config.llm.name,
        "encoder": config.encoder.name, "merged": merge, "vocabulary": _vocabulary(imported, assembly),
        "told": {key: {"value": fact.value, "by": fact.tensor} for key, fact in imported.facts.items()},
        "assumed": imported.assumed,
        "tensors": _tensors(source, arrays),
        "left_out": {**left_out, **{name: _OPTIMIZER if "optim" in name else _OTHER for name in source.rest}},
        "from_elsewhere": made,
    }  # fmt: skip


def _tensors(source: Foreign, arrays: Mapping[str, ImportedArray]) -> list[dict[str, Any]]:
    """Every tensor: its place in our arrays, its shape and its dtype."""
    bare, told = {written: name for name, written in source.written.items()}, []
    for ours, array in arrays.items():
        for origin, layer in array.origins.items():
            spec = source.info[bare[origin]] if origin in bare else array.spec  # a base model's is not in the file
            place = ours if layer is None else f"{ours}[{layer}]"
            told.append({"from": origin, "to": place, "shape": list(spec.shape), "dtype": str(spec.dtype)})
    return told


def _vocabulary(imported: Imported, assembly: Assembly) -> dict[str, int]:
    rows = {"rows": assembly.llm.vocab_size, "tokens": len(assembly.tokenizer)}
    return rows if imported.rows is None else {"in_file": imported.rows, **rows}


def _from_elsewhere(part: str, assembly: Assembly) -> str:
    config = assembly.config
    if part == "llm" and assembly.llm_folder is not None:
        return f"loaded from {config.llm.name} whenever the run is"
    encoder = config.encoder_parts.get(part)
    if encoder is not None and encoder.checkpoint is not None:
        return f"loaded from {encoder.checkpoint} whenever the run is"
    return f"as drawn from seed {config.seed}, untrained"


def _write(out: Path, assembly: Assembly, arrays: Mapping[str, ImportedArray], report: Mapping[str, Any]) -> None:
    """Make the folder beside its place, then move it there: who stops this finds nothing at `out`."""
    with whole_folder(out) as fresh:
        write_run_config(fresh, to_dict(assembly.config))
        keep_tokenizer(fresh, assembly.tokenizer, assembly.signal.ecg_byte)
        (fresh / INHERITED).mkdir()
        layout = {name: (np.dtype(array.spec.dtype), array.spec.shape) for name, array in arrays.items()}
        writer = SafetensorsWriter(fresh / INHERITED / IMPORTED, layout)
        for name, array in arrays.items():
            writer.write_pieces(name, array.pieces())  # a piece is on its way to the file: the model is never in memory
        writer.close()
        write_list(fresh / INHERITED, own_checksums(fresh / INHERITED))
        _write_checkpoint(fresh)
        (fresh / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _write_checkpoint(folder: Path) -> None:
    """Checkpoint 0, of a run that has not been trained: all its arrays are those that it has inherited."""
    checkpoints = Checkpoints(folder)
    history = {"best_step": None, "best_val_loss": None, "val_losses": [], "bad": []}
    checkpoints.save(0, {}, {"frozen": {}, "frozen_ids": {}, "data": "imported", "history": history})
    checkpoints.wait()
    checkpoints.close()
