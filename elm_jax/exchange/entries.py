"""The arrays of an imported run, each with the tensors that it is made of and how it is read, a layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from elm_jax.errors import UserError
from elm_jax.exchange.config import Imported
from elm_jax.exchange.match import match
from elm_jax.exchange.reference import reference_of
from elm_jax.exchange.source import Source
from elm_jax.models.lora import LoraSpec, is_lora
from elm_jax.weights.load import LlmFolder
from elm_jax.weights.peft import load_adapter

Pieces = Iterator[np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One array. origins: the name of a tensor -> its place in the array: the layer, or None for all of it."""

    spec: jax.ShapeDtypeStruct
    pieces: Callable[[], Pieces]
    origins: Mapping[str, int | None]


def entries_of(
    source: Source, imported: Imported, merging: LoraSpec | None
) -> tuple[dict[str, Entry], Mapping[str, str]]:
    """The arrays by name; and what of the checkpoint is not needed, with the reason.

    `merging`: the adapter that is to be added to the weights beneath it.

    Raises:
        UserError: tensors are missing, left over or do not fit; by name.
    """
    if source.kind == "adapter":
        return (_adapter(source, imported) if merging is None else _merged_base(source, imported, merging)), {}
    found = match(source, imported)
    entries = {
        ours: Entry(found.spec(ours), functools.partial(found.pieces, ours), _places(found.origins(ours)))
        for ours in found.table.rules
    }
    if merging is not None:
        adapter = {ours: found.array(ours) for ours in entries if is_lora(ours)}
        origins = {ours: entries.pop(ours).origins for ours in adapter}
        for kernel in _adapted(adapter):
            entries[kernel] = _merged(
                entries[kernel], functools.partial(found.layers, kernel), kernel, adapter, origins, merging
            )
    return entries, found.left_out


def _adapter(source: Source, imported: Imported) -> dict[str, Entry]:
    """The arrays of an adapter folder."""
    assembly = imported.assembly
    _, arrays = load_adapter(source.path, assembly.llm)
    leaves = {name: leaf for name, leaf in assembly.structure.leaves.items() if name.startswith("llm.")}
    table = reference_of(leaves, assembly.llm.model_type, None, None, assembly.llm.vocab_size)

    def entry(ours: str, array: np.ndarray) -> Entry:
        names = [name.removeprefix("llm.").replace(".default.weight", ".weight") for name in table.names(ours)]
        return Entry(jax.ShapeDtypeStruct(array.shape, array.dtype), lambda: iter([array]), _places(names))

    return {f"llm.{name}": entry(f"llm.{name}", array) for name, array in arrays.items()}


def _merged_base(source: Source, imported: Imported, merging: LoraSpec) -> dict[str, Entry]:
    """The kernels of the base model with the adapter of a folder in them."""
    assembly = imported.assembly
    if assembly.llm_folder is None:
        found = "an adapter, and no weights beneath it (llm.scratch)"
        raise UserError("--merge", found, "a model that has weights", "set --config.llm.name, without llm.scratch")
    base, parts = LlmFolder(assembly.llm_folder, assembly.llm), _adapter(source, imported)
    adapter = {ours: next(entry.pieces()) for ours, entry in parts.items()}
    origins, entries = {ours: entry.origins for ours, entry in parts.items()}, {}
    for kernel in _adapted(adapter):
        own = kernel.removeprefix("llm.")
        spec = jax.ShapeDtypeStruct(base.shapes[own], base.dtype(own))
        named = [f"{assembly.config.llm.name}: {name}" for name in base.rules[own].names(spec.shape[0])]
        layers = functools.partial(_layers_of, base, own)
        beneath = Entry(spec, layers, _places(named))
        entries[kernel] = _merged(beneath, layers, kernel, adapter, origins, merging)
    return entries


def _merged(
    beneath: Entry, layers: Callable[[], Pieces], kernel: str, adapter: Mapping[str, np.ndarray],
    origins: Mapping[str, Mapping[str, int | None]], spec: LoraSpec,
) -> Entry:  # fmt: skip
    """A kernel with its adapter in it: kernel + a @ b * alpha / rank, summed in float32, layer by layer."""
    a, b = _sides(kernel)

    def pieces() -> Pieces:
        for layer, weight in enumerate(layers()):
            change = adapter[a][layer].astype(np.float32) @ adapter[b][layer].astype(np.float32)
            yield (weight.astype(np.float32) + np.float32(spec.scale) * change).astype(weight.dtype)

    return Entry(beneath.spec, pieces, {**beneath.origins, **origins[a], **origins[b]})


def _layers_of(base: LlmFolder, name: str) -> Pieces:
    shape = base.shapes[name]
    for layer in range(shape[0]):
        index = (slice(layer, layer + 1), *(slice(0, size) for size in shape[1:]))
        yield base.read(name, index)[0].astype(base.dtype(name), copy=False)


def _adapted(adapter: Mapping[str, np.ndarray]) -> list[str]:
    """The kernels beneath an adapter."""
    return [name.removesuffix("lora.a") + "kernel" for name in adapter if name.endswith(".lora.a")]


def _sides(kernel: str) -> tuple[str, str]:
    module = kernel.removesuffix("kernel")
    return f"{module}lora.a", f"{module}lora.b"


def _places(names: list[str]) -> dict[str, int | None]:
    return {name: layer if len(names) > 1 else None for layer, name in enumerate(names)}
