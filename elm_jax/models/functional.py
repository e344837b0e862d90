"""An NNX module as a function of a flat dictionary of arrays.

The module is declared with NNX and split once; from then on the program handles `{name: array}`, which is what
is sharded, differentiated, saved and compared. Names are state paths joined by dots, such as
`llm.layers.attention.q.kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from elm_jax.models.lora import is_lora

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Leaf:
    """What is known of one array before it exists."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]  # logical names of the trailing dimensions
    statistic: bool  # no parameter: no gradient moves it (running statistics, and what is `layers.Held`)
    part: str = ""  # of the model: "encoder", of several views "encoder.<view>"; "llm", its adapter "llm.lora"

    def is_of(self, parts: Collection[str]) -> bool:
        """Whether it belongs to one of `parts`, of which "encoder" means that of every view."""
        return self.part in parts or self.part.partition(".")[0] in parts


@dataclass(frozen=True)
class Structure:
    """A module without its arrays."""

    graphdef: nnx.GraphDef
    treedef: Any
    leaves: Mapping[str, Leaf]  # in tree order

    def bind(self, arrays: Mapping[str, jax.Array]) -> Any:
        """The module holding these arrays; `arrays` may hold more than its own."""
        state = jax.tree.unflatten(self.treedef, [arrays[name] for name in self.leaves])
        return nnx.merge(self.graphdef, state)

    def abstract(self, shardings: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Each array's shape, dtype and place, before it exists."""
        return {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[n]) for n, v in self.leaves.items()}

    def arrays(self, module: Any) -> Arrays:
        """The arrays of a module of this structure."""
        return dict(zip(self.leaves, jax.tree.leaves(nnx.split(module)[1]), strict=True))


def structure_of(build: Callable[[], Any]) -> Structure:
    """The structure of the module that `build` makes, without making its arrays."""
    module = nnx.eval_shape(build)
    several = {name for name, value in vars(module).items() if isinstance(value, nnx.Dict)}
    graphdef, state = nnx.split(module)
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    variables = {_name(path): v for path, v in nnx.to_flat_state(state)}
    leaves = {}
    for path, leaf in paths:
        name = _name(key.key for key in path[:-1])  # the last step leads from the variable to its array
        variable, (first, second, *_) = variables[name], (*path, "")
        part = f"{first.key}.{second.key}" if first.key in several else str(first.key)
        leaves[name] = Leaf(
            tuple(leaf.shape),
            leaf.dtype,
            tuple(variable.get_metadata().get("axes", ())),
            not isinstance(variable, nnx.Param),
            f"{part}.lora" if is_lora(name) else part,
        )
    return Structure(graphdef, treedef, leaves)


def initialise(build: Callable[[], Any], structure: Structure, shardings: Mapping[str, Any]) -> Arrays:
    """Draw the arrays that `shardings` names, each where it belongs: no device ever holds all of them."""

    def draw() -> Arrays:
        arrays = structure.arrays(build())
        return {name: arrays[name] for name in shardings}

    return jax.jit(draw, out_shardings=dict(shardings))()


def _name(path: Any) -> str:
    return ".".join(str(p) for p in path)
