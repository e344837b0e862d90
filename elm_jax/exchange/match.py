"""Which tensors of a checkpoint are which arrays of the imported run, each read a layer or less at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from elm_jax.assemble import Assembly
from elm_jax.errors import UserError
from elm_jax.exchange.config import Imported
from elm_jax.exchange.foreign import Foreign
from elm_jax.exchange.reference import Kinds, reference_of
from elm_jax.models.encoders import kind_of
from elm_jax.models.families import family_of
from elm_jax.models.lora import LoraSpec, is_lora
from elm_jax.weights.load import open_llm
from elm_jax.weights.peft import load_adapter, merged_kernel
from elm_jax.weights.published import Published, match

_FIX = "check that the file is whole, and of the model that llm.name and encoder.name name"
_UNUSED = "nothing that an ECG-language model reads"
_COUNTER = "a counter that nothing reads"
_COPY = "a copy of {}"


@dataclass(frozen=True)
class ImportedArray:
    """One array, and how it is read. origins: the name of a tensor -> the layer that it is, or None for all of it."""

    spec: jax.ShapeDtypeStruct
    pieces: Callable[[], Iterator[np.ndarray]]  # in C order
    origins: Mapping[str, int | None]


def arrays_of(
    source: Foreign, imported: Imported, merging: LoraSpec | None
) -> tuple[dict[str, ImportedArray], dict[str, str]]:
    """The arrays by our names; and what of the checkpoint is not needed, by its name there, with the reason.

    `merging`: the adapter that is to be added to the weights beneath it.

    Raises:
        UserError: tensors are missing, left over, misshapen, no floats, or unlike under two names; by name.
    """
    assembly, left_out = imported.assembly, {}
    if source.kind == "adapter":
        found = load_adapter(source.path, assembly.llm)[1].under("llm.")
    else:
        found, left_out = _matched(source, imported)
    arrays = {name: _array(found, name, found.origins(name), found.pieces) for name in found.rules}
    if merging is None:
        return arrays, left_out
    beneath = _base(assembly) if source.kind == "adapter" else found
    of_base = f"{assembly.config.llm.name}: " if source.kind == "adapter" else ""
    adapter = {name: arrays.pop(name) for name in [*arrays] if is_lora(name)}
    for a in [name for name in adapter if name.endswith(".lora.a")]:
        kernel, b = f"{a.removesuffix('lora.a')}kernel", f"{a.removesuffix('a')}b"
        sides, names = (found.read(a), found.read(b)), [f"{of_base}{name}" for name in beneath.origins(kernel)]
        merged = _array(beneath, kernel, names, functools.partial(_merged, beneath, sides, merging.scale))
        arrays[kernel] = ImportedArray(
            merged.spec, merged.pieces, {**merged.origins, **adapter[a].origins, **adapter[b].origins}
        )
    return arrays, left_out


def _array(
    found: Published, name: str, origins: list[str], pieces: Callable[[str], Iterator[np.ndarray]]
) -> ImportedArray:
    spec = jax.ShapeDtypeStruct(found.shapes[name], found.dtype(name))
    places = {origin: layer if len(origins) > 1 else None for layer, origin in enumerate(origins)}
    return ImportedArray(spec, functools.partial(pieces, name), places)


def _merged(
    beneath: Published, sides: tuple[np.ndarray, np.ndarray], scale: float, kernel: str
) -> Iterator[np.ndarray]:
    for layer, a, b in zip(beneath.layers(kernel), *sides, strict=True):
        yield merged_kernel(layer, a, b, scale)


def _base(assembly: Assembly) -> Published:
    """The weights that an adapter folder is of."""
    if assembly.llm_folder is None:
        found = "an adapter, and no weights beneath it (llm.scratch)"
        raise UserError("--merge", found, "a model that has weights", "set --config.llm.name, without llm.scratch")
    return open_llm(assembly.llm_folder, assembly.llm).under("llm.")


def _matched(source: Foreign, imported: Imported) -> tuple[Published, dict[str, str]]:
    """A checkpoint of a model or of an encoder; only of what has two names values are read."""
    assembly = imported.assembly
    kinds = Kinds.of(assembly)
    before = "encoder." if source.kind == "encoder" else ""
    without = _elsewhere(source, kinds)
    leaves = {
        name: leaf for name, leaf in assembly.structure.leaves.items()
        if name.startswith(before) and not name.startswith(without)
    }  # fmt: skip
    rows = imported.rows or assembly.llm.vocab_size
    table = reference_of(leaves, kinds, rows)
    named, left_out = _named(source, kinds, table.expected())
    may_lack = [
        kinds.before(part) + name for part, encoder in kinds.encoders.items()
        for name in kind_of(encoder).absent(source.info.keys())
    ]  # fmt: skip
    found = match(
        str(source.path), "this model", _FIX, table.rules.values(), {name: leaf.shape for name, leaf in leaves.items()},
        source.tensors, named, stored=table.shapes, aliases=table.aliases, may_lack=may_lack,
    )  # fmt: skip
    copies = {key: table.aliases[theirs] for key, theirs in named.items() if theirs in table.aliases}
    return found, left_out | {key: _COPY.format(found.keys[first]) for key, first in copies.items()}


def _elsewhere(source: Foreign, kinds: Kinds) -> tuple[str, ...]:
    """How the names of towers begin that a checkpoint of LLaVA's leaves to files of their own."""
    parts = () if source.llava is None else tuple(f"{part}." for part in kinds.encoders)
    return tuple(part for part in parts if not any(name.startswith(part) for name in source.info))


def _named(
    source: Foreign, kinds: Kinds, expected: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The checkpoint's tensors -> their names in the table, some `expected`; and those that no model needs, with the
    reason."""
    buffers, own = family_of(kinds.llm.model_type).buffers if kinds.llm else (), dict[str, str | None]()
    for part, encoder in kinds.encoders.items():
        own |= _of_encoder(source, encoder, "" if source.kind == "encoder" else f"{part}.", kinds.before(part))
    named, left_out = {}, {}
    for name, key in source.written.items():
        theirs = own.get(name, name)
        if theirs is None:
            left_out[key] = _COUNTER if name.endswith(".num_batches_tracked") else _UNUSED
        elif name.endswith("image_newline") and theirs not in expected:
            left_out[key] = "a newline, which is read where patches are merged by spatial_unpad"
        elif name.startswith("llm.") and buffers and name.endswith(buffers):
            left_out[key] = "a table that follows from the configuration"
        else:
            named[key] = theirs
    return named, left_out


def _of_encoder(source: Foreign, encoder: str, there: str, before: str) -> dict[str, str | None]:
    """The checkpoint's names of an encoder's tensors, which begin with `there` -> those of the table, with `before`.

    None: what no embedding needs.
    """
    kind = kind_of(encoder)
    mine = {name: name.removeprefix(there) for name in source.info if name.startswith(there)}
    if there:
        mine = {name: own.removeprefix(kind.wrapper) for name, own in mine.items()}
    published = kind.published(mine.values())
    known = {name: kind.published_name(published[own]) for name, own in mine.items()}
    return {name: None if own is None else before + own for name, own in known.items()}
