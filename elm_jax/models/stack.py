"""Layers that differ in their parts, stacked part by part.

Each part of a layer ("attention", "mlp_norm", ...) has its parameters, and what else goes with it, on a leading axis of
those layers that have such a part. A table of parts maps their names to these trees. A name that is no part stands for
what all layers have.
"""

from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from elm_jax.models.decoder_layer import DecoderConfig, Layer

Parts = Mapping[str, Any]


def stacked_layers(config: DecoderConfig, rngs: nnx.Rngs, build: Callable[[nnx.Rngs], Layer]) -> Layer:
    """The layers that `build` makes, with every part in them, stacked."""
    made = nnx.vmap(build, in_axes=(0,), out_axes=0)
    layers = nnx.split_rngs(splits=config.layers)(made)(rngs)
    for name in ("attention", "delta", "mlp", "experts"):
        count, part = len(config.layers_with(name)), getattr(layers, name)
        if 0 < count < config.layers:
            nnx.update(part, jax.tree.map(lambda x, count=count: x[:count], nnx.state(part)))
    return layers


def of_kinds(config: DecoderConfig, layers: Layer) -> tuple[list[nnx.GraphDef], dict[str, nnx.State]]:
    """Stacked layers -> the graph of each layer of a period, and the table of their parts."""
    graphs = []
    for place in range(config.period):
        alone = nnx.merge(*nnx.split(layers))
        for name in ("attention", "delta", "mlp", "experts"):
            if place not in config.layers_with(name):
                setattr(alone, name, nnx.data(None))
        graphs.append(nnx.split(alone)[0])
    return graphs, dict(nnx.state(layers).items())


def taken(config: DecoderConfig, parts: Parts, layer: int) -> dict[str, Any]:
    """What the table has of a layer."""
    found = {}
    for name, part in parts.items():
        owners = config.layers_with(name)
        if layer in owners:
            found[name] = jax.tree.map(itemgetter(owners.index(layer)), part)
    return found


def folded(parts: Parts, groups: int) -> Parts:
    """With an axis of so many groups of layers before that of the layers of a group."""
    return jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), parts)


def unfolded(parts: Parts) -> Parts:
    """The inverse of `folded`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parts)


def gathered(of_layers: Iterable[Parts]) -> dict[str, Any]:
    """A table of what single layers have."""
    found: dict[str, list[Any]] = {}
    for parts in of_layers:
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    return {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for name, each in found.items()}


def separate(config: DecoderConfig, parts: Parts) -> list[dict[str, Any]]:
    """For each layer its own, in arrays of their own where the stack was."""
    each = {name: _slices(part, len(config.layers_with(name))) for name, part in parts.items()}
    owners = {name: config.layers_with(name) for name in parts}
    return [
        {name: each[name][owners[name].index(layer)] for name in parts if layer in owners[name]}
        for layer in range(config.layers)
    ]


def _slices(stacked: Any, count: int) -> list[Any]:
    def slices(leaf: jax.Array) -> list[jax.Array]:
        if isinstance(leaf, Tracer):
            return [leaf[i] for i in range(count)]
        place = leaf.sharding
        if isinstance(place, jax.sharding.NamedSharding):
            place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*place.spec[1:]))
        return jax.jit(lambda x: [x[i] for i in range(count)], out_shardings=place)(leaf)

    leaves, tree = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(tree, parts) for parts in zip(*map(slices, leaves), strict=True)]
