"""The encoder that a run pretrains, judged at each validation by labelled recordings (`ssl.probe`): cheap, by a head in
closed form.

n recordings, D the encoder's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax import stopping
from elm_jax.assemble import Assembly
from elm_jax.data.batch import empty_signals, put_signal
from elm_jax.data.labels import Labelled, read_labels
from elm_jax.errors import UserError
from elm_jax.runtime import distributed
from elm_jax.runtime.mesh import batch_sharding, batch_ways, host_parts, to_device
from elm_jax.scoring.probing import apply_head, macro_auroc, ridge_head, standardised
from elm_jax.training.encoder_cache import ROWS, encoding

MOST = 400  # recordings to learn from, and as many to judge by
PENALTY = 0.1


class EncoderProbe:
    """The macro AUROC of a ridge regression on embeddings. Recordings are read once, and kept in memory.

    Raises:
        UserError: the model has more than an encoder, the labels cannot be used, or a recording cannot be read.
    """

    def __init__(self, assembly: Assembly, mesh: Mesh) -> None:
        config = assembly.config
        if assembly.llm is not None:
            expected = f"None with objective={config.objective}: it judges an encoder that is pretrained alone"
            raise UserError("ssl.probe", str(config.ssl.probe), expected, "leave --config.ssl.probe out")
        task, _, labels = str(config.ssl.probe).partition("=")
        try:
            table = read_labels(task, labels or None, config.seed)
        except UserError as error:  # flags are those of elm_jax.probe
            where = "ssl.probe" if error.where.startswith("--") else error.where
            raise UserError(where, error.found, error.expected, error.fix) from None
        self._spec = replace(assembly.signal, root=str(table.root), prefixes={}, augment_ecg=False, augment_rgb=False)
        parts = [_some(table.of_split(split), config.seed) for split in ("train", "val")]
        self._count, records = len(parts[0]), [record for part in parts for record in part]
        true = np.array([[name in record.labels for name in table.classes] for record in records], float)
        true = true.reshape(len(records), len(table.classes))  # of no records, too
        both = [_both(true[: self._count]), _both(true[self._count :])]
        self._true = true[:, both[0] & both[1]]
        if not self._true.size:
            found = f"{self._count} recordings to learn from and {len(records) - self._count} to judge by"
            expected = "some of each that show a class, and some that do not"
            raise UserError("ssl.probe", found, expected, "give more labelled recordings")
        self._mesh, self._encode = mesh, encoding(assembly, mesh)
        self._batches = list(self._read(records))

    def __call__(self, arrays: Mapping[str, jax.Array]) -> float:
        """Of an encoder whose arrays begin with "encoder."; the same in each process.

        Raises:
            UserError: an embedding is not finite.
        """
        own = {name.removeprefix("encoder."): x for name, x in arrays.items() if name.startswith("encoder.")}
        sharding = batch_sharding(self._mesh, micro_batches=False)
        found = []
        for local in stopping.each(self._batches, "batch of the probe"):
            batch = jax.tree.map(lambda x: to_device(self._mesh, x, sharding, row_axis=0), local)
            found.append(np.asarray(self._encode(own, batch), np.float32).mean(1))
        features = np.concatenate(found)[: len(self._true)]
        if not np.isfinite(features).all():
            bad = f"{(~np.isfinite(features)).any(1).sum()} of {len(features)} embeddings that are not finite"
            raise UserError("ssl.probe", bad, "finite numbers", "lower optim.lr, and start again from an earlier step")
        learnt, judged = standardised(features[: self._count], features[self._count :])
        head = ridge_head(learnt, self._true[: self._count], PENALTY)
        value = macro_auroc(apply_head(judged, head), self._true[self._count :])
        return distributed.broadcast(value, 0)  # hosts may solve with other last bits

    def _read(self, records: Sequence[Labelled]) -> Any:
        """This process's rows of each batch."""
        rows = ROWS * batch_ways(self._mesh)
        mine = [part * ROWS + row for part in host_parts(self._mesh) for row in range(ROWS)]
        for start in stopping.each(range(0, len(records), rows), "recordings of the probe"):
            local = empty_signals(self._spec.own_layout, len(mine))
            for slot, row in enumerate(mine):
                if start + row < len(records):
                    put_signal(local, (slot,), self._spec.load(records[start + row].path, 0))
            yield local


def _some(records: Sequence[Labelled], seed: int) -> list[Labelled]:
    """MOST of them, chosen by a hash."""
    chosen = sorted(records, key=lambda record: hashlib.sha256(f"{seed}:{record.path}".encode()).digest())
    return chosen[:MOST]


def _both(true: np.ndarray) -> np.ndarray:
    """(K,) which classes some show, and some do not."""
    shown = true.sum(axis=0)
    return (shown > 0) & (shown < len(true))
