"""Rules that pair a checkpoint's tensors with our parameters, read in both directions.

A rule's `theirs` may hold `{layer}`: then one parameter of ours stacks the tensors of all layers on a leading
axis. `transpose` is its own inverse: PyTorch's Linear keeps (out, in), our kernels are (in, out).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Index = tuple[slice, ...]
_WRAPPERS = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class Rule:
    """`theirs`: a tensor name or pattern of the checkpoint. `ours`: a parameter path, joined by dots. `first`: the
    number of the first of the layers that are stacked."""

    theirs: str
    ours: str
    transpose: bool = False
    first: int = 0

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The checkpoint's names of the tensors behind our parameter of `shape`, in the order of the layers."""
        return [self.theirs.format(layer=self.first + i) for i in range(shape[0])] if self.stacked else [self.theirs]

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor of the checkpoint, for our parameter of `shape`."""
        each = shape[1:] if self.stacked else shape
        return each[::-1] if self.transpose else each

    def split(self, index: Index) -> tuple[slice, Index]:
        """A slice of our parameter -> which layers, and which slice of each of their tensors."""
        layers, each = (index[0], index[1:]) if self.stacked else (slice(0, 1), index)
        return layers, each[::-1] if self.transpose else each

    def arrange(self, parts: list[np.ndarray]) -> np.ndarray:
        """Their tensors (or equal slices of them) -> ours."""
        turned = [part.T if self.transpose else part for part in parts]
        return np.stack(turned) if self.stacked else turned[0]

    def restore(self, ours: np.ndarray) -> list[np.ndarray]:
        """The inverse of `arrange`: contiguous arrays in the checkpoint's layout."""
        parts = list(ours) if self.stacked else [ours]
        return [np.asarray(part.T if self.transpose else part, order="C") for part in parts]  # a number stays one


def bare_name(name: str) -> str:
    """A tensor's name without the prefixes of PyTorch's wrappers."""
    for prefix in _WRAPPERS * 2:  # either may be outermost
        name = name.removeprefix(prefix)
    return name


def export(rules: Iterable[Rule], arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's (name, tensor) pairs of our parameters, one parameter at a time.

    `arrays` maps paths to arrays; a rule whose parameter is not there (the head of a tied model) is passed
    over.
    """
    for rule in rules:
        if rule.ours in arrays:
            ours = np.asarray(arrays[rule.ours])
            yield from zip(rule.names(ours.shape), rule.restore(ours), strict=True)
