"""Writing the published tensors of our arrays into one safetensors file or several, an array at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from elm_jax.models.names import Rule
from elm_jax.weights.safetensors import SafetensorsWriter

Layout = tuple[np.dtype, tuple[int, ...]]


class ShardWriter:
    """Files STEM.safetensors, or STEM-00001-of-00003.safetensors and so on with an index, written in any order.

    Args:
        stem: the folder and the start of the files' names.
        rules: of the arrays that will be written; layouts: the dtype and shape of our array of each rule.
        aliases: a further name -> the name of the same tensor, which is written under both.
        limit: bytes of a file at most (a larger tensor has one of its own); None: all is one file.
    """

    def __init__(
        self, stem: Path, rules: Sequence[Rule], layouts: Mapping[str, Layout],
        aliases: Mapping[str, str] | None = None, limit: int | None = None,
    ) -> None:  # fmt: skip
        self._rules = {rule.ours: rule for rule in rules}
        layout = {
            theirs: (layouts[rule.ours][0], rule.their_shape(layouts[rule.ours][1]))
            for rule in rules for theirs in rule.names(layouts[rule.ours][1])
        }  # fmt: skip
        self._aliases: dict[str, list[str]] = {}
        for second, first in (aliases or {}).items():
            layout[second] = layout[first]
            self._aliases.setdefault(first, []).append(second)
        order = [*_in_reading_order(rules, layouts), *(aliases or {})]
        groups = [order] if limit is None else _groups(order, layout, limit)
        self.files = [_file_name(stem.name, number, len(groups)) for number in range(len(groups))]
        shards = dict(zip(self.files, groups, strict=True))
        self._writers = {
            file: SafetensorsWriter(stem.parent / file, {name: layout[name] for name in names}, {"format": "pt"})
            for file, names in shards.items()
        }
        self._where = {name: file for file, names in shards.items() for name in names}
        self.bytes = sum(map(_size, layout.values()))
        if len(groups) > 1:
            self._write_index(stem.with_name(f"{stem.name}.safetensors.index.json"), layout)

    def write(self, ours: str, array: np.ndarray) -> None:
        """Put our array, in the dtype that was said, into the files."""
        rule = self._rules[ours]
        for theirs, part in zip(rule.names(array.shape), rule.restore(array), strict=True):
            for name in (theirs, *self._aliases.get(theirs, ())):
                self._writers[self._where[name]].write(name, part)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _write_index(self, path: Path, layout: Mapping[str, Layout]) -> None:
        count = sum(math.prod(shape) for _, shape in layout.values())
        metadata = {"total_parameters": count, "total_size": self.bytes}
        content = {"metadata": metadata, "weight_map": dict(sorted(self._where.items()))}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _in_reading_order(rules: Sequence[Rule], layouts: Mapping[str, Layout]) -> Iterable[str]:
    """Their names: what stands before the layers, layer by layer, what stands after them."""
    first = next((i for i, rule in enumerate(rules) if rule.stacked), len(rules))
    yield from (rule.theirs for rule in rules[:first])
    of_layers: dict[int, list[str]] = {}  # not every stack has all layers
    for rule in rules:
        if rule.stacked:
            shape = layouts[rule.ours][1]
            layers, names = rule.layers(shape), rule.names(shape)
            for place, layer in enumerate(layers):
                each = len(names) // len(layers)
                of_layers.setdefault(layer, []).extend(names[place * each : (place + 1) * each])
    for layer in sorted(of_layers):
        yield from of_layers[layer]
    yield from (rule.theirs for rule in rules[first:] if not rule.stacked)


def _groups(names: Sequence[str], layout: Mapping[str, Layout], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        own = _size(layout[name])
        if groups[-1] and size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups


def _size(entry: Layout) -> int:
    return math.prod(entry[1]) * entry[0].itemsize


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
