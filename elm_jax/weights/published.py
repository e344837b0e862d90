"""Our arrays in a checkpoint with published names: paired with its tensors strictly, and read piece by piece."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax import stopping
from elm_jax.errors import UserError, some
from elm_jax.models.names import Index, Rule
from elm_jax.weights.safetensors import Safetensors, forget
from elm_jax.weights.torch_file import TorchFile

Shape = tuple[int, ...]

_PIECE = 2**26  # bytes that are copied at once
# New rows differ by this much of the old ones' spread. As inputs to a network that does not learn they must be told
# apart: its first norm makes of this a good part of the length of the mean row. As outputs they must not push out the
# old ones: where the logits of a position spread by s, noise of a tenth raises the new tokens' share by
# exp((s / 10)^2 / 2), 13% for s = 5, and noise of the whole spread by exp(s^2 / 2).
_NOISE = 0.1


@dataclass(frozen=True, eq=False)
class Published:
    """Our arrays, as the tensors of a checkpoint hold them, in the tensors' own dtype.

    where: the checkpoint, in errors. rules, shapes: by our names. The rows of a vocabulary beyond those of its tensor
    are `NewRows`. tensors: the checkpoint's. keys: the name that a rule has for a tensor -> the checkpoint's.
    """

    where: str
    rules: Mapping[str, Rule]
    shapes: Mapping[str, Shape]
    tensors: Mapping[str, Any]
    keys: Mapping[str, str]
    _new: dict[str, NewRows] = field(default_factory=dict)

    def under(self, prefix: str) -> Published:
        """The same arrays, each of our names after a prefix."""
        longer = ({f"{prefix}{name}": x for name, x in each.items()} for each in (self.rules, self.shapes))
        return replace(self, rules=next(longer), shapes=next(longer))

    def origins(self, ours: str) -> list[str]:
        """The checkpoint's names of the tensors behind our array, in the order of its layers."""
        return [self.keys[theirs] for theirs in self.rules[ours].names(self.shapes[ours])]

    def dtype(self, ours: str) -> np.dtype:
        """Of our array: that of its tensors, which a layer may have wider than another."""
        info = described(self.tensors)
        return functools.reduce(jnp.promote_types, (info[key].dtype for key in self.origins(ours)))

    def read(self, ours: str, index: Index | None = None) -> np.ndarray:
        """Our array, or a slice of it: a view of the file where it can be."""
        rule = self.rules[ours]
        shape, keys = self.shapes[ours], self.origins(ours)
        places, each = rule.split(_whole(shape) if index is None else index, shape)
        return rule.arrange([self._slice(ours, keys[place], each) for place in places.flat], places.shape)

    def arrays(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """These arrays, or all; the memory of what was read before is given back."""
        self.forget()
        return {name: self.read(name) for name in (self.rules if names is None else names)}

    def layers(self, ours: str) -> Iterator[np.ndarray]:
        """An array of stacked layers, a layer at a time."""
        shape, dtype = self.shapes[ours], self.dtype(ours)
        for layer in range(shape[0]):
            yield self.read(ours, (slice(layer, layer + 1), *_whole(shape[1:])))[0].astype(dtype, copy=False)

    def pieces(self, ours: str) -> Iterator[np.ndarray]:
        """Our array in C order, some rows of a layer at a time."""
        shape, dtype, stacked = self.shapes[ours], self.dtype(ours), self.rules[ours].stacked
        inner = shape[1:] if stacked else shape
        rows = max(1, _PIECE // max(1, dtype.itemsize * math.prod(inner[1:])))
        for layer in range(shape[0] if stacked else 1):
            of_layer = (slice(layer, layer + 1),) if stacked else ()
            for begin in range(0, inner[0], rows) if inner else (0,):
                part = (slice(begin, min(begin + rows, inner[0])), *_whole(inner[1:])) if inner else ()
                yield np.asarray(self.read(ours, (*of_layer, *part))).astype(dtype, copy=False)

    def place(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """These arrays in the dtypes and places that `like` says.

        Each process reads what its own devices hold, one array at a time; no host ever holds the model.
        """
        return {name: self._placed(name, like[name]) for name in stopping.each(like, "array")}

    def forget(self) -> None:
        """Give back the memory of what was read."""
        if not isinstance(self.tensors, TorchFile):  # which sees to it itself
            for key in self.keys.values():
                forget(self.tensors[key])

    def _placed(self, name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        read: dict[tuple, np.ndarray] = {}  # devices that hold the same shard share one reading of it

        def shard(index: Index | None) -> np.ndarray:
            assert index is not None
            key = tuple((s.start, s.stop) for s in index)
            if key not in read:
                read[key] = self.read(name, index).astype(spec.dtype, copy=False)
            return read[key]

        return jax.make_array_from_callback(spec.shape, spec.sharding, shard)

    def _slice(self, ours: str, key: str, index: Index) -> np.ndarray:
        """A slice of a tensor as if it had the shape of our array: beyond its end, the rows of a vocabulary are new."""
        part, rule = self.tensors[key], self.rules[ours]
        shape, rows = rule.their_shape(self.shapes[ours]), part[index]
        if part.shape == shape:
            return rows
        start, stop, _ = index[0].indices(shape[0])
        first = max(start, len(part))
        if first >= stop:
            return rows
        if key not in self._new:
            self._new[key] = NewRows.like(rule.theirs, part)
        return np.concatenate([rows, self._new[key].draw(first, stop, index[1]).astype(part.dtype)])


def match(
    where: str, what: str, fix: str, rules: Iterable[Rule], shapes: Mapping[str, Shape], tensors: Mapping[str, Any],
    named: Mapping[str, str], *, stored: Mapping[str, Shape] | None = None,
    aliases: Mapping[str, str] | None = None, may_lack: Collection[str] = (), twice: bool = False,
) -> Published:  # fmt: skip
    """Pair the tensors of a checkpoint with our arrays: none may be missing, left over, misshapen, or no floats.

    Args:
        where, what, fix: in errors, the checkpoint, the model that it should be of, and what to do.
        shapes: of the array of each rule. stored: those that the checkpoint has, where its vocabulary is smaller.
        named: the checkpoint's name of a tensor -> the one that a rule or an alias has for it.
        aliases: a further name, which may be there -> the name of the same tensor.
        may_lack: names that need not be there; their arrays are left out.
        twice: whether all aliases must be there where one is.
    Raises:
        UserError: the tensors do not fit, or are unlike under two names; by name.
    """
    table, stored, info = {rule.ours: rule for rule in rules}, stored or shapes, described(tensors)
    given: dict[str, str] = {}
    for key, theirs in named.items():
        if theirs in given:
            found = f"{given[theirs]} and {key}, which are both {theirs}"
            raise UserError(where, found, "each tensor once", "leave one of them out")
        given[theirs] = key
    ours = {theirs: name for name, rule in table.items() for theirs in rule.names(stored[name])}
    expected = {theirs: table[name].their_shape(stored[name]) for theirs, name in ours.items()}
    expected |= {second: expected[first] for second, first in (aliases or {}).items()}
    lacking = {ours[theirs] for theirs in may_lack if theirs in ours and theirs not in given}
    missing = [theirs for theirs, name in ours.items() if theirs not in given and name not in lacking]
    if twice and not (aliases or {}).keys().isdisjoint(given):
        missing += [second for second in aliases or {} if second not in given]
    extra = [key for theirs, key in given.items() if theirs not in expected]
    if missing or extra:
        parts = (("no", missing), ("unknown", extra))
        found = "; ".join(f"{word} {some(names)}" for word, names in parts if names)
        raise UserError(where, found, f"the {len(ours)} tensors of {what}", fix)
    for theirs, shape in expected.items():
        if theirs in given:
            key, spec = given[theirs], info[given[theirs]]
            if spec.shape != shape or not jnp.issubdtype(spec.dtype, jnp.floating):
                raise UserError(where, f"{key} {spec.dtype}{list(spec.shape)}", f"floating {list(shape)}", fix)
    for second, first in (aliases or {}).items():
        if second in given and not _same(tensors[given[second]], tensors[given[first]]):
            raise UserError(where, f"{given[second]} unlike {given[first]}", "the same values under both names", fix)
    kept = {name: rule for name, rule in table.items() if name not in lacking}
    keys = {theirs: given[theirs] for theirs, name in ours.items() if name in kept}
    return Published(where, kept, {name: shapes[name] for name in kept}, tensors, keys)


def _whole(shape: Shape) -> Index:
    return tuple(slice(0, size) for size in shape)


def described(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The shape and dtype of each tensor, without reading one."""
    return tensors.info if isinstance(tensors, TorchFile | Safetensors) else tensors


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors of one shape have the same bytes, compared piece by piece."""
    if one.dtype != other.dtype:
        return False
    rows = max(1, _PIECE * len(one) // max(1, one.nbytes)) if one.ndim else 1
    pieces = ([np.ascontiguousarray(x[i : i + rows] if x.ndim else x) for x in (one, other)]
              for i in range(0, len(one) if one.ndim else 1, rows))  # fmt: skip
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pieces)


@dataclass(frozen=True)
class NewRows:
    """Rows for tokens that a vocabulary table (V, D) did not have: its mean row, and noise by which they differ.

    The noise is normal, `_NOISE` times each column's standard deviation, and a function of the tensor's name and the
    row alone: every process and mesh draws the same. mean, noise: (D,) float32.
    """

    name: str
    mean: np.ndarray
    noise: np.ndarray

    @classmethod
    def like(cls, name: str, table: np.ndarray) -> NewRows:
        """Those of the tensor `name`; sums are taken in pieces, so that no whole copy is made."""
        total, squares = np.zeros((2, table.shape[1]), np.float64)
        for begin in range(0, len(table), 4096):
            piece = table[begin : begin + 4096].astype(np.float64)
            total += piece.sum(0)
            squares += np.square(piece).sum(0)
        mean = total / len(table)
        deviation = np.sqrt(np.maximum(squares / len(table) - mean**2, 0))
        return cls(name, mean.astype(np.float32), (_NOISE * deviation).astype(np.float32))

    def draw(self, start: int, stop: int, columns: slice) -> np.ndarray:
        """Rows `start` to `stop` of the table, of these columns: float32."""
        key = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:16], "little")
        rows = np.empty((stop - start, len(self.mean[columns])), np.float32)
        for row in range(start, stop):
            stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row]))
            drawn = stream.standard_normal(len(self.mean), np.float32)
            rows[row - start] = (self.mean + self.noise * drawn)[columns]
        return rows
