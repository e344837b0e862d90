"""A frozen encoder's outputs, computed once for each recording and kept on disk (`encoder.cache`).

B recordings of a batch, N signal tokens, E encoder width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from elm_jax.assemble import Assembly, encoder_structure
from elm_jax.data.batch import empty_signals, put_signal
from elm_jax.data.dataset import Dataset
from elm_jax.data.features import Features, FeatureWriter
from elm_jax.data.represent import SignalSpec
from elm_jax.errors import UserError
from elm_jax.models.functional import Arrays
from elm_jax.models.hints import placed
from elm_jax.runtime import distributed
from elm_jax.runtime.checkpoint import summaries
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, batch_ways, host_parts, replicated, to_device

VERSION = 1
ROWS = 16  # recordings of a batch on each way of the mesh
PART = 4096  # recordings that an interruption loses at most
READERS = 4


def keep_features(
    assembly: Assembly, arrays: Arrays, datasets: Sequence[Dataset], mesh: Mesh, cache: Path, progress: bool
) -> Features:
    """The outputs of the encoder, whose `arrays` begin with "encoder.", for all recordings of `datasets`.

    Those that are in the folder `cache` already are not computed again: it knows them by the encoder's weights, the
    preparation of the signals, and each file's path, size and time; nothing is ever removed. Recordings that cannot be
    read are left out. What is done is kept, part by part, if this is interrupted. Raises UserError for a full disk.
    """
    config, structure = assembly.config, encoder_structure(assembly)
    own = {name.removeprefix("encoder."): x for name, x in arrays.items() if name.startswith("encoder.")}
    spec = replace(assembly.signal, root=str(Path(assembly.signal.root).absolute()))
    if spec.perturb != "noise":
        spec = replace(spec, seed=0)  # nothing of a recording is drawn from it
    told = (VERSION, spec, config.encoder.name, config.encoder.tokens, assembly.encoder, config.compat)
    weights = sorted(summaries(own).items())
    key = hashlib.sha256(repr((*told, config.llm.compute_dtype, weights)).encode()).hexdigest()[:32]

    rows = ROWS * batch_ways(mesh)
    sharding = batch_sharding(mesh, micro_batches=False)
    mine = [part * ROWS + row for part in host_parts(mesh) for row in range(ROWS)]  # of a batch

    def encode(arrays: Arrays, signals: Any) -> jax.Array:
        with placed(MeshPlacement(mesh)):
            outputs = structure.bind(arrays)(signals, jnp.ones(rows, jnp.float32), train=False)
        return outputs.astype(config.llm.compute_dtype)

    run = jax.jit(encode, out_shardings=replicated(mesh))
    signals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty_signals(spec.layout, rows))
    shape = jax.eval_shape(encode, own, signals).shape[1:]
    features = Features(str(cache / "encoder" / key), shape, config.llm.compute_dtype)

    wanted = list(dict.fromkeys(recording for dataset in datasets for recording in dataset.recordings()))
    # Names may differ where processes have disks of their own: what they tell each other is the place in this list.
    names = [spec.name_of(*recording) for recording in wanted]
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    own_missing = [place for name, place in first.items() if name not in features]
    missing = sorted({place for places in distributed.gather(own_missing) for place in places})
    size = len(missing) * int(np.prod(shape)) * features.layout.dtype.itemsize
    try:
        with ThreadPoolExecutor(READERS) as pool, tqdm(
            total=len(missing), desc=f"encoding recordings, {size / 1e9:.2g} GB", disable=not progress, mininterval=1.0
        ) as bar:
            for begin in range(0, len(missing), PART):
                part_of_them = missing[begin : begin + PART]
                with FeatureWriter(features, [names[place] for place in part_of_them]) as writer:
                    unread: list[int] = []
                    for at in range(0, len(part_of_them), rows):
                        places = part_of_them[at : at + rows]
                        local = empty_signals(spec.layout, len(mine))
                        own_places = [places[row] for row in mine if row < len(places)]  # `mine` rises: the first slots
                        read = pool.map(lambda place: _read(spec, wanted[place]), own_places)
                        for slot, (place, signal) in enumerate(zip(own_places, read, strict=True)):
                            if signal is None:
                                unread.append(place)
                            else:
                                put_signal(local, (slot,), signal)
                        batch = jax.tree.map(lambda x: to_device(mesh, x, sharding, row_axis=0), local)
                        writer.put(np.asarray(run(own, batch))[: len(places)])
                        bar.update(len(places))
                    writer.leave_out({names[place] for places in distributed.gather(unread) for place in places})
    except OSError as error:
        fix = f"make room for {size / 1e9:.2g} GB, set ELM_JAX_CACHE to another folder, or encoder.cache=False"
        raise UserError(features.folder, error.strerror or str(error), "a place to write to", fix) from error
    return Features(features.folder, features.shape, features.dtype)  # which reads what there is now


def _read(spec: SignalSpec, recording: tuple[str, int]) -> Any:
    try:
        return spec.load(*recording)
    except UserError:
        return None  # the loader will say so, and count it
