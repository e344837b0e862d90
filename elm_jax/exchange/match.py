"""Which tensors of a checkpoint are which of our arrays: strictly, so that none is missing, left over or misshapen."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.assemble import Assembly
from elm_jax.errors import UserError, some
from elm_jax.exchange.config import Imported
from elm_jax.exchange.reference import Reference, reference_of
from elm_jax.exchange.source import Source
from elm_jax.models.encoders import ENCODERS
from elm_jax.models.families import family_of
from elm_jax.models.functional import Leaf
from elm_jax.weights.load import NewRows

PIECE = 2**26  # bytes that are copied at once
_UNUSED = "nothing that an ECG-language model reads"
_COUNTER = "a counter that nothing reads"
_COPY = "a copy of {}"


@dataclass(frozen=True)
class Match:
    """The pairing of a checkpoint with our arrays.

    table: the names; only of what the checkpoint has. found: a name of the table -> the checkpoint's, bare.
    left_out: a name of the checkpoint -> why it is not needed.
    """

    source: Source
    table: Reference
    leaves: Mapping[str, Leaf]
    found: Mapping[str, str]
    left_out: Mapping[str, str]

    def origins(self, ours: str) -> list[str]:
        """The checkpoint's names of our array, as they are written there."""
        return [self.source.written[self.found[name]] for name in self.table.names(ours)]

    def spec(self, ours: str) -> jax.ShapeDtypeStruct:
        """The shape of our array, and its dtype in the checkpoint."""
        dtypes = [self.source.info[self.found[name]].dtype for name in self.table.names(ours)]
        return jax.ShapeDtypeStruct(self.leaves[ours].shape, functools.reduce(jnp.promote_types, dtypes))

    def pieces(self, ours: str) -> Iterator[np.ndarray]:
        """Our array in the checkpoint's dtype, in C order, a layer or less at a time."""
        rule, spec = self.table.rules[ours], self.spec(ours)
        shape = spec.shape[1:] if rule.stacked else spec.shape
        for name in self.table.names(ours):
            tensor = self.source.read(self.found[name])
            yield from _in_order(ours, tensor.T if rule.transpose else tensor, shape, spec.dtype)

    def layers(self, ours: str) -> Iterator[np.ndarray]:
        """Our array, one of stacked layers, in the checkpoint's dtype: a layer at a time."""
        rule, dtype = self.table.rules[ours], self.spec(ours).dtype
        for name in self.table.names(ours):
            tensor = self.source.read(self.found[name])
            yield (tensor.T if rule.transpose else tensor).astype(dtype, copy=False)

    def array(self, ours: str) -> np.ndarray:
        """Our array whole, as `pieces` has it."""
        spec = self.spec(ours)
        return np.concatenate([piece.reshape(-1) for piece in self.pieces(ours)]).reshape(spec.shape)


def match(source: Source, imported: Imported) -> Match:
    """Pair a checkpoint of a model or of an encoder with our arrays; only of what has two names values are read.

    Raises:
        UserError: tensors are missing, left over, of another shape, no floats, or unlike under two names; by name.
    """
    assembly = imported.assembly
    encoder = assembly.config.encoder.name
    leaves = dict(assembly.structure.leaves)
    if source.kind == "encoder":
        leaves = {name: leaf for name, leaf in leaves.items() if name.startswith("encoder.")}
    connector = assembly.config.view.connector
    rows = imported.rows or assembly.llm.vocab_size
    table = reference_of(leaves, assembly.llm.model_type, encoder, connector, rows)
    table = replace(table, aliases={a: n for a, n in table.aliases.items() if n in _names(table)})
    found, left_out = _renamed(source, assembly)
    return _checked(source, table, leaves, found, left_out, encoder)


def _names(table: Reference) -> dict[str, str]:
    """A name of the table -> our array of which it is (a part)."""
    return {name: ours for ours in table.rules for name in table.names(ours)}


def _renamed(source: Source, assembly: Assembly) -> tuple[dict[str, str], dict[str, str]]:
    """The checkpoint's tensors under the names of the table; and those that no model needs, with the reason."""
    encoder, family = assembly.config.encoder.name, family_of(assembly.llm.model_type)
    before = "" if source.kind == "encoder" else "encoder."
    own = {} if encoder is None else _of_encoder(source, encoder, before)
    found, left_out = {}, {}
    for name in source.info:
        if name in own:
            known = own[name]
            if known in found:
                both = f"{found[known]} and {name}, which are both {known}"
                raise UserError(str(source.path), both, "each tensor once", "leave one of them out")
            found |= {} if known is None else {known: name}
            left_out |= {name: _COUNTER if name.endswith(".num_batches_tracked") else _UNUSED} if known is None else {}
        elif family.buffers and name.startswith("llm.") and name.endswith(family.buffers):
            left_out[name] = "a table that follows from the configuration"
        else:
            found[name] = name
    return found, left_out


def _of_encoder(source: Source, encoder: str, before: str) -> dict[str, str | None]:
    """The checkpoint's names of the encoder's tensors -> those of the table; None for what no embedding needs."""
    kind = ENCODERS[encoder]
    mine = {name: name.removeprefix(before) for name in source.info if name.startswith(before)}
    if before:
        mine = {name: own.removeprefix(kind.wrapper) for name, own in mine.items()}
    published = kind.published(mine.values())
    known = {name: kind.published_name(published[own]) for name, own in mine.items()}
    return {name: None if own is None else f"encoder.{kind.wrapper}{own}" for name, own in known.items()}


def _checked(
    source: Source, table: Reference, leaves: Mapping[str, Leaf], found: Mapping[str, str], left_out: dict[str, str],
    encoder: str | None,
) -> Match:  # fmt: skip
    where, fix = str(source.path), "check that the file is whole, and of the model that llm.name and encoder.name name"
    names = _names(table)
    missing = [name for name in names if name not in found]
    kind = ENCODERS.get(encoder or "")
    may_lack = () if kind is None else kind.absent(source.info.keys())
    before = "encoder." if kind is None else f"encoder.{kind.wrapper}"
    lacking = {names[name] for name in missing if name.removeprefix(before) in may_lack}
    missing = [name for name in missing if names[name] not in lacking]
    extra = [found[name] for name in found if name not in names and name not in table.aliases]
    if missing or extra:
        parts = (("no", missing), ("unknown", [source.written[name] for name in extra]))
        told = "; ".join(f"{what} {some(each)}" for what, each in parts if each)
        raise UserError(where, told, f"the {len(names)} tensors of this model", fix)
    shapes = table.expected()
    for name in (*names, *table.aliases):
        if name in found:
            spec = source.info[found[name]]
            if spec.shape != shapes[name] or not jnp.issubdtype(spec.dtype, jnp.floating):
                told = f"{source.written[found[name]]} {spec.dtype}{list(spec.shape)}"
                raise UserError(where, told, f"floating {list(shapes[name])}", fix)
    left_out |= {found[a]: _COPY.format(found[n]) for a, n in table.aliases.items() if a in found}
    kept = replace(table, rules={ours: rule for ours, rule in table.rules.items() if ours not in lacking})
    for alias, name in table.aliases.items():
        if alias in found and not _same(source, found[alias], found[name]):
            told = f"{source.written[found[alias]]} unlike {source.written[found[name]]}"
            raise UserError(where, told, "the same values under both names", fix)
    return Match(source, kept, leaves, found, left_out)


def _same(source: Source, one: str, other: str) -> bool:
    """Whether two tensors have the same bytes, compared piece by piece."""
    shape, dtype = source.info[one].shape, source.info[one].dtype
    if dtype != source.info[other].dtype:
        return False
    pairs = zip(*(_in_order("", source.read(name), shape, dtype) for name in (one, other)), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)


def _in_order(ours: str, view: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """`view` in C order, in pieces; up to `shape` with the rows of new tokens, of whose vocabulary it is a part."""
    if not view.ndim:
        yield np.ascontiguousarray(view, dtype).reshape(1)
        return
    axis = next((axis for axis, size in enumerate(shape) if size != view.shape[axis]), None)
    table = view if axis == 0 else view.T
    new = None if axis is None else NewRows.like(ours, table)
    step = max(1, PIECE // max(1, dtype.itemsize * int(np.prod(shape[1:]))))
    for begin in range(0, len(view), step):
        piece = np.ascontiguousarray(view[begin : begin + step], dtype)
        if new is not None and axis == 1:
            more = new.draw(view.shape[1], shape[1], slice(begin, begin + len(piece))).T
            piece = np.concatenate([piece, more.astype(dtype)], 1)
        yield piece
    if new is not None and axis == 0:
        yield new.draw(len(view), shape[0], slice(None)).astype(dtype)
