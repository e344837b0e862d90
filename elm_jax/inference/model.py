"""A trained model, ready to answer: a run folder's weights on a mesh."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from elm_jax.config import Config
from elm_jax.inference.speaker import Answer, Prompt, Speaker
from elm_jax.run.weights import TrainedWeights, Weights, frozen_fingerprints
from elm_jax.runtime.mesh import array_shardings, check_heads, make_mesh

__all__ = ["Answer", "Prompt", "TrainedModel"]


class TrainedModel(Speaker):
    """The model of the run folder `config.workdir`, laid out on `config.mesh`.

    Args:
        which: `latest`, `best` (else latest) or a step.
        weights: in place of those in the run folder.
    Raises:
        UserError: no checkpoint, or weights that are not the run's.
    """

    def __init__(self, config: Config, which: str = "best", weights: Weights | None = None) -> None:
        mesh, weights = make_mesh(config.mesh), weights or TrainedWeights(Path(config.workdir), which, config)
        check_heads(mesh, weights.assembly.llm)
        arrays = weights.place(array_shardings(weights.assembly.structure, mesh))
        weights.check(frozen_fingerprints(weights.leaves, {name: arrays[name] for name in weights.frozen}))
        compute = jnp.dtype(config.llm.compute_dtype)
        for name in weights.trained:
            # What is multiplied in the compute dtype is kept in it; norms and statistics stay as they are.
            if name.endswith((".kernel", ".table")):
                arrays[name] = arrays[name].astype(compute)
        self.folder, self.step = weights.folder, weights.step
        super().__init__(weights.assembly, mesh, arrays)
