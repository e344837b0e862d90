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
from elm_jax.errors import UserError
from elm_jax.models.functional import Arrays
from elm_jax.models.hints import placed
from elm_jax.runtime import distributed
from elm_jax.runtime.checkpoint import fingerprint
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, batch_ways, host_part, replicated, to_device

VERSION = 1
ROWS = 16  # recordings of a batch on each way of the mesh
READERS = 4


def keep_features(
    assembly: Assembly, arrays: Arrays, datasets: Sequence[Dataset], mesh: Mesh, cache: Path, progress: bool
) -> Features:
    """The outputs of the encoder, whose `arrays` begin with "encoder.", for all recordings of `datasets`.

    Those that are in the folder `cache` already are not computed again: it knows them by the encoder's weights, the
    preparation of the signals, and each file's path, size and time. Recordings that cannot be read are left out.
    """
    config, structure = assembly.config, encoder_structure(assembly)
    own = {name.removeprefix("encoder."): x for name, x in arrays.items() if name.startswith("encoder.")}
    spec = replace(assembly.signal, root=str(Path(assembly.signal.root).absolute()))
    told = (VERSION, spec, config.encoder.name, config.encoder.tokens, assembly.encoder, config.compat)
    key = hashlib.sha256(repr((*told, config.llm.compute_dtype, fingerprint(own))).encode()).hexdigest()[:32]

    rows = ROWS * batch_ways(mesh)
    part, parts = host_part(mesh)
    sharding, mine = batch_sharding(mesh, micro_batches=False), slice(part * rows // parts, (part + 1) * rows // parts)

    def encode(arrays: Arrays, signals: Any) -> jax.Array:
        with placed(MeshPlacement(mesh)):
            outputs = structure.bind(arrays)(signals, jnp.ones(rows, jnp.float32), train=False)
        return outputs.astype(config.llm.compute_dtype)

    run = jax.jit(encode, out_shardings=replicated(mesh))
    signals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty_signals(spec.layout, rows))
    shape = jax.eval_shape(encode, own, signals).shape[1:]
    features = Features(str(cache / "encoder" / key), shape, config.llm.compute_dtype)

    wanted = {spec.name_of(path, k): (path, k) for dataset in datasets for path, k in dataset.recordings()}
    missing = [name for name in wanted if name not in features]
    missing = sorted({name for names in distributed.gather(missing) for name in names})
    if not missing:
        return features
    writer = FeatureWriter(features, missing)
    unread: list[str] = []

    def read(name: str | None) -> Any:
        if name is None:
            return None
        try:
            return spec.load(*wanted[name])
        except (UserError, KeyError):  # KeyError: processes that see different files
            unread.append(name)
            return None

    with ThreadPoolExecutor(READERS) as pool, tqdm(
        total=len(missing), desc="encoding recordings", disable=not progress, mininterval=1.0
    ) as bar:
        for first in range(0, len(missing), rows):
            names: list[str | None] = [*missing[first : first + rows]]
            names += [None] * (rows - len(names))
            local = empty_signals(spec.layout, len(names[mine]))
            for place, signal in enumerate(pool.map(read, names[mine])):
                if signal is not None:
                    put_signal(local, (place,), signal)
            batch = jax.tree.map(lambda x: to_device(mesh, x, sharding, row_axis=0), local)
            writer.put(first, np.asarray(run(own, batch))[: len(missing) - first])
            bar.update(min(rows, len(missing) - first))
    writer.close(frozenset(name for names in distributed.gather(unread) for name in names))
    return Features(features.folder, features.shape, features.dtype)  # which reads what there is now
