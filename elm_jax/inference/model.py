"""A trained model, ready to answer: a run folder's weights on a mesh."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from elm_jax.assemble import Assembly, assemble, make_arrays
from elm_jax.config import Config
from elm_jax.errors import UserError
from elm_jax.inference.speaker import Answer, Prompt, Speaker
from elm_jax.run import folder as run
from elm_jax.run.checkpoint import Checkpoints
from elm_jax.runtime.mesh import array_shardings, check_heads, make_mesh

__all__ = ["Answer", "Prompt", "TrainedModel"]


class TrainedModel(Speaker):
    """The model of the run folder `config.workdir`, laid out on `config.mesh`.

    Args:
        which: `latest`, `best` (else latest) or a step.
    Raises:
        UserError: no checkpoint, or weights that are not the run's.
    """

    def __init__(self, config: Config, which: str = "best") -> None:
        self.folder = Path(config.workdir)
        mesh, assembly = make_mesh(config.mesh), assemble(config, self.folder / "tokenizer")
        check_heads(mesh, assembly.llm)
        self.step, arrays = _load(self.folder, assembly, mesh, which)
        super().__init__(assembly, mesh, arrays)


def _load(folder: Path, assembly: Assembly, mesh: jax.sharding.Mesh, which: str) -> tuple[int, dict[str, jax.Array]]:
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.find(which)
    if step is None:
        raise UserError(str(folder), "no checkpoint", "a trained run", "train it first")
    structure = assembly.structure
    shardings = array_shardings(structure, mesh)
    like = structure.abstract(shardings)
    restored, inherited = checkpoints.restore_arrays(step, like), run.inherited(folder, like)
    saved = checkpoints.meta(step)["frozen"]
    checkpoints.close()
    frozen = inherited | make_arrays(assembly, shardings, known={*restored, *inherited})
    run.check_frozen(str(folder), saved, structure, frozen, set(saved))
    compute = jnp.dtype(assembly.config.llm.compute_dtype)
    # What is multiplied in the compute dtype is kept in it; norms and statistics stay as they are.
    cast = {n: x.astype(compute) if n.endswith((".kernel", ".table")) else x for n, x in restored.items()}
    return step, {**frozen, **cast}
