"""Encoders to be judged: where they come from, and their embeddings of recordings.

N recordings, D the encoder's width.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elm_jax.assemble import Assembly, assemble_encoder
from elm_jax.cli import ConfigFlags
from elm_jax.config import Config
from elm_jax.data.labels import Labelled, LabelTable
from elm_jax.errors import UserError, printable
from elm_jax.folders import CONFIG, ECG_BYTE, FACTS, read_json
from elm_jax.models.functional import Arrays
from elm_jax.run.config import config_of_run
from elm_jax.run.weights import TrainedWeights, Weights, frozen_fingerprints
from elm_jax.runtime.compilation import cache_folder
from elm_jax.runtime.mesh import array_shardings, make_mesh
from elm_jax.training.encoder_cache import keep_features
from elm_jax.weights.encoders import EXPORTED


@dataclass(frozen=True)
class Encoder:
    """An encoder to judge. name: what it is called; assembly: of it alone, with one token in float32."""

    name: str
    assembly: Assembly
    arrays: Arrays
    folder: Path


def open_encoder(checkpoint: str | None, flags: ConfigFlags, step: str) -> Encoder:
    """The encoder of a run folder or an exported folder (`checkpoint`), or the one that a config file names.

    Raises:
        UserError: there is none there, or it cannot be read.
    """
    if checkpoint is not None and not (Path(checkpoint) / CONFIG).is_file() and (Path(checkpoint) / FACTS).is_file():
        config = flags.over(_exported(Path(checkpoint)))
        return _of_config(config, Path(checkpoint))
    if checkpoint is None:
        config = flags.load()
        if not (Path(config.workdir) / CONFIG).is_file():
            return _of_config(config, Path(config.workdir))
    config = config_of_run(checkpoint, flags)
    weights = TrainedWeights(folder := Path(config.workdir), step, config, alone=True)
    alone = _alone(config)
    mesh = make_mesh(config.mesh)
    mine = [name for name in weights.leaves if weights.leaves[name].part == "encoder"]
    arrays = weights.place(array_shardings(weights.assembly.structure, mesh), mine)
    frozen = {name: x for name, x in arrays.items() if name in weights.frozen}
    weights.check(frozen_fingerprints(weights.leaves, frozen), "encoder")
    arrays = {name: x.astype(alone.structure.leaves[name].dtype) for name, x in arrays.items()}
    return Encoder(f"{folder}, step {weights.step}", alone, arrays, folder)


def random_encoder(like: Encoder) -> Encoder:
    """One of the same sizes as it is drawn from the config's seed: the control."""
    config = like.assembly.config
    ((_, fields),) = like.assembly.encoders.items()  # also what the checkpoint's own config.json says
    sizes = {name: value for name, value in fields.items() if name != "text"}
    alone = _alone(replace(config, encoder=replace(config.encoder, checkpoint=None, config=sizes)))
    drawn = alone.draw(array_shardings(alone.structure, make_mesh(config.mesh)))
    return Encoder("random", alone, drawn, like.folder)


def _exported(folder: Path) -> dict[str, Any]:
    """The config of an exported encoder."""
    facts = read_json(folder / FACTS)
    encoder, signal, weights = facts.get("encoder"), facts.get("signal"), folder / EXPORTED
    if not isinstance(encoder, Mapping) or not isinstance(signal, Mapping) or not weights.is_file():
        found, expected = f"{folder} without an encoder", f"an export with {EXPORTED}"
        raise UserError("--checkpoint", found, expected, "export a model that has an encoder")
    data = {name: signal[name] for name in ("representation", "leads", "sampling_rate", "segment_len", "normalize",
                                            "norm_eps") if name in signal}  # fmt: skip
    if (folder / ECG_BYTE).is_file():
        data["ecg_tokenizer"] = str(folder / ECG_BYTE)
    own = {"name": encoder.get("name"), "config": encoder.get("config", {}), "checkpoint": str(weights)}
    tree: dict[str, Any] = {"workdir": str(folder), "data": data, "encoder": own, "compat": facts.get("compat", ())}
    if isinstance(text := facts.get("text"), Mapping):  # its tower's sizes and tokenizer are where it came from
        tree |= {"ssl": {"text": text.get("tower")}, "data": {**data, "max_len": text.get("max_len")}}
    if "objective" in facts:  # pretrained alone: its decoder lies beside it
        return tree | {"objective": facts["objective"], "update": ("encoder",)}
    return tree | {"elm": facts.get("elm")}


def _of_config(config: Config, folder: Path) -> Encoder:
    if config.encoder.name is not None and config.encoder.checkpoint is None:
        found = f"{config.encoder.name} without weights, and no run in {config.workdir}"
        fix = "give --config.encoder.checkpoint=FILE, or the workdir of a run"
        raise UserError("encoder.checkpoint", found, "an encoder to judge", fix)
    alone = _alone(config)
    arrays = Weights(alone).place(array_shardings(alone.structure, make_mesh(config.mesh)))
    return Encoder(str(config.encoder.checkpoint), alone, arrays, folder)


def _alone(config: Config) -> Assembly:
    one = replace(config.encoder, tokens=1, cache=False)
    llm = replace(config.llm, compute_dtype="float32", param_dtype="float32")
    data = replace(config.data, augment_ecg=False, augment_rgb=False)
    return assemble_encoder(replace(config, encoder=one, llm=llm, data=data))


def embeddings(
    encoder: Encoder, table: LabelTable, progress: bool, compared: bool = False
) -> tuple[list[Labelled], np.ndarray]:
    """The recordings of a table that can be read, and their embeddings (N, D) float32: computed in batches on the
    mesh, and kept in the cache (`encoder_cache`, which says what is `compared`), so that they are computed once.

    Raises:
        UserError: more than `data.max_bad_records` of them cannot be read, or an embedding is not finite.
    """
    config = encoder.assembly.config
    signal = replace(encoder.assembly.signal, root=str(table.root), prefixes={})
    assembly = replace(encoder.assembly, signal=signal)
    mesh, wanted = make_mesh(config.mesh), [(record.path, 0) for record in table.records]
    features = keep_features(assembly, encoder.arrays, wanted, mesh, cache_folder(), progress, compared)
    kept, found, bad = replace(signal, features=features), [], 0
    read: list[Labelled] = []
    for record in table.records:
        try:
            tokens = kept.load(record.path, 0)
        except UserError as error:
            bad += 1
            if bad > config.data.max_bad_records * len(table.records):
                limit = f"at most {config.data.max_bad_records:g} of them may be bad (--config.data.max_bad_records)"
                raise UserError(error.where, error.found, error.expected, f"{error.fix}; {limit}") from None
            print(printable(f"left out: {error}"), file=sys.stderr)
        else:
            read.append(record)
            found.append(np.asarray(tokens, np.float32).mean(0))
    values = np.stack(found)
    if wrong := [record.path for record, row in zip(read, values, strict=True) if not np.isfinite(row).all()]:
        what = f"{len(wrong)} of {len(read)} embeddings that are not finite, the first of {wrong[0]}"
        raise UserError(encoder.name, what, "finite numbers", "judge other weights: another --step or --checkpoint")
    return read, values
