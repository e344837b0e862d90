"""A frozen encoder's outputs, computed once for each recording and kept on disk (`encoder.cache`).

B recordings of a batch, N signal tokens, E encoder width.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from elm_jax import stopping
from elm_jax.assemble import Assembly, encoder_structure
from elm_jax.data.batch import empty_signals, put_signal
from elm_jax.data.kept_features import Features, FeatureWriter
from elm_jax.data.represent import PLAIN_PAPER, SIGNALS, SignalSpec
from elm_jax.errors import UserError
from elm_jax.models.functional import Arrays
from elm_jax.models.hints import placed
from elm_jax.run.fingerprints import summaries
from elm_jax.runtime import distributed
from elm_jax.runtime.mesh import MeshPlacement, batch_sharding, batch_ways, host_parts, replicated, to_device

ROWS = 16  # recordings of a batch on each way of the mesh
PART = 4096  # recordings that an interruption loses at most
READERS = 4
SEEN_SECONDS = 120.0  # in which a disk shows what another host has written: NFS keeps listings for a minute


def keep_features(
    assembly: Assembly, arrays: Arrays, recordings: Iterable[tuple[str, int]], mesh: Mesh, cache: Path, progress: bool,
    compared: bool = False,
) -> Features:  # fmt: skip
    """The outputs of the encoder, whose `arrays` begin with "encoder.", for all recordings: paths, each with its key.

    compared: in place of its tokens, what an encoder that is pretrained against texts has compared with these, (1, E).

    Those that are in the folder `cache` already are not computed again: it knows them by the encoder's weights, the
    preparation of the signals, and each file's path, size and time; nothing is ever removed. Recordings that cannot be
    read are left out. What is done is kept, part by part, if this is interrupted. Of several processes one writes for
    all that see the same folder.

    Raises:
        UserError: the disk is full, or does not show what another process has written.
    """
    config = assembly.config
    own = {name.removeprefix("encoder."): x for name, x in arrays.items() if name.startswith("encoder.")}
    spec = replace(assembly.signal, root=str(Path(assembly.signal.root).absolute()))
    if spec.perturb != "noise":
        spec = replace(spec, seed=0)  # nothing of a recording is drawn from it
    facts = (SIGNALS, spec, config.encoder.name, config.encoder.tokens, *assembly.encoders.values(), config.compat)
    weights = sorted(summaries(own).items())
    later = ["compared"] if compared else []  # each says something only where it is not as it always was
    later += [spec.normalize] if spec.normalize != "minmax" else []
    later += [repr(spec.ids)] if spec.ids else []
    later += [repr(spec.paper)] if spec.paper != PLAIN_PAPER else []
    facts = (*facts, config.llm.compute_dtype, weights, *later)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    rows = ROWS * batch_ways(mesh)
    sharding = batch_sharding(mesh, micro_batches=False)
    mine = [part * ROWS + row for part in host_parts(mesh) for row in range(ROWS)]  # of a batch

    run = encoding(assembly, mesh, compared)
    signals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty_signals(spec.own_layout, rows))
    shape = jax.eval_shape(run, own, signals).shape[1:]
    features = Features(str(cache / "encoder" / key), shape, config.llm.compute_dtype)

    wanted = list(dict.fromkeys(recordings))
    # Names may differ where processes have disks of their own: what they tell each other is the place in this list.
    named = [spec.names_of(*recording) for recording in wanted]
    names = [name for name, _ in named]
    features = replace(features, names={asked: name for name, asked in named})
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    own_missing = [place for name, place in first.items() if name not in features]
    if not any(distributed.gather(bool(own_missing))):
        return features
    size = len(own_missing) * int(np.prod(shape)) * features.layout.dtype.itemsize
    kept: set[str] = set()
    try:
        writers = distributed.writers(Path(features.folder), hashlib.sha256("\0".join(names).encode()).hexdigest())
        writes = writers[jax.process_index()] == jax.process_index()
        told = [distributed.broadcast(own_missing, writer) for writer in sorted(set(writers))]
        missing = sorted({place for places in told for place in places})
        with ThreadPoolExecutor(READERS) as pool, tqdm(
            total=len(missing), desc=f"encoding recordings, {size / 1e9:.2g} GB", disable=not progress, mininterval=1.0
        ) as bar:
            for begin in range(0, len(missing), PART):
                part_of_them = missing[begin : begin + PART]
                names_of_part = [names[place] for place in part_of_them]
                writer = FeatureWriter(features, names_of_part) if writes else None
                with writer or contextlib.nullcontext():
                    unread: list[int] = []
                    for at in range(0, len(part_of_them), rows):
                        places = part_of_them[at : at + rows]
                        local = empty_signals(spec.own_layout, len(mine))
                        own_places = [places[row] for row in mine if row < len(places)]  # `mine` rises: the first slots
                        read = pool.map(lambda place: _read(spec, wanted[place]), own_places)
                        for slot, (place, signal) in enumerate(zip(own_places, read, strict=True)):
                            if signal is None:
                                unread.append(place)
                            else:
                                put_signal(local, (slot,), signal)
                        batch = jax.tree.map(lambda x: to_device(mesh, x, sharding, row_axis=0), local)
                        outputs = jax.block_until_ready(run(own, batch))  # so that no process is batches ahead
                        if writer:
                            writer.put(np.asarray(outputs)[: len(places)])
                        bar.update(len(places))
                        stopping.doing("encoding recordings")
                    left_out = {names[place] for places in distributed.gather(unread) for place in places}
                    kept |= set(names_of_part) - left_out
                    if writer:
                        writer.leave_out(left_out)
        distributed.gather(None)  # every writer has left its last part
    except OSError as error:
        fix = f"make room for {size / 1e9:.2g} GB, set ELM_JAX_CACHE to another folder, or encoder.cache=False"
        raise UserError(features.folder, error.strerror or str(error), "a place to write to", fix) from error
    # What its writer has had before, this process may not see yet.
    kept |= {names[place] for place in set(own_missing) - set(missing)}
    return _seen(features, kept)


def encoding(assembly: Assembly, mesh: Mesh, compared: bool = False) -> Callable[[Arrays, Any], jax.Array]:
    """The jitted function (arrays of the encoder, a batch of signals over the mesh) -> its outputs (B, N, E), in every
    process. `compared` as in `keep_features`."""
    structure, dtype = encoder_structure(assembly), assembly.config.llm.compute_dtype

    def encode(arrays: Arrays, signals: Any) -> jax.Array:
        weights = jnp.ones(len(jax.tree.leaves(signals)[0]), jnp.float32)
        with placed(MeshPlacement(mesh)):
            encoder = structure.bind(arrays)
            outputs = encoder.ecgs(signals)[:, None] if compared else encoder(signals, weights, train=False)
        return outputs.astype(dtype)

    return jax.jit(encode, out_shardings=replicated(mesh))


def _seen(features: Features, names: set[str]) -> Features:
    """`features` as its folder is now, with all `names` in it: a network's disk may show some of them late."""
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        now = replace(features)  # which reads its folder anew
        absent = [name for name in names if name not in now]
        if not absent:
            return now
        if time.monotonic() > deadline:
            raise UserError(
                features.folder, f"{len(absent)} outputs absent that another process has written", "to see them here",
                "let ELM_JAX_CACHE be a folder that all processes see alike, and start again",
            )  # fmt: skip
        time.sleep(1.0)


def _read(spec: SignalSpec, recording: tuple[str, int]) -> Any:
    try:
        return spec.load(*recording)
    except UserError:
        return None  # the loader will say so, and count it
