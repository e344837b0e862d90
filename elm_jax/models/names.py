"""Rules that pair a checkpoint's tensors with our parameters, read in both directions.

A rule's `theirs` may hold `{layer}`: then one parameter of ours stacks the tensors of all layers on a leading
axis; with `{expert}` too, those of a layer's experts on a second one. `transpose` is its own inverse: PyTorch's Linear
keeps (out, in), our kernels are (in, out).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

Index = tuple[slice, ...]
_WRAPPERS = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class Rule:
    """`theirs`: a tensor name or pattern of the checkpoint. `ours`: a parameter path, joined by dots. `first`: the
    number of the first of the layers that are stacked; `numbers`: those of all of them, where they are not in a row."""

    theirs: str
    ours: str
    transpose: bool = False
    first: int = 0
    numbers: tuple[int, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs

    @property
    def leading(self) -> int:
        """How many leading axes of ours stack tensors of theirs."""
        return self.stacked + ("{expert}" in self.theirs)

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The checkpoint's names of the tensors behind our parameter of `shape`, in the order of the layers, and of
        each layer's experts."""
        if not self.stacked:
            return [self.theirs]
        experts = range(shape[1]) if self.leading > 1 else (0,)
        return [self.theirs.format(layer=n, expert=e) for n, e in product(self.layers(shape), experts)]

    def layers(self, shape: tuple[int, ...]) -> Sequence[int]:
        """The numbers of the layers that our parameter of `shape` stacks."""
        return self.numbers or range(self.first, self.first + shape[0])

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor of the checkpoint, for our parameter of `shape`."""
        each = shape[self.leading :]
        return each[::-1] if self.transpose else each

    def split(self, index: Index, shape: tuple[int, ...]) -> tuple[np.ndarray, Index]:
        """A slice of our parameter of `shape` -> the places of its tensors among `names`, along the leading axes, and
        which slice of each of them."""
        stack, each = shape[: self.leading], index[self.leading :]
        places = np.arange(math.prod(stack)).reshape(stack)[index[: self.leading]]
        return places, each[::-1] if self.transpose else each

    def arrange(self, parts: list[np.ndarray], stack: tuple[int, ...] | None = None) -> np.ndarray:
        """Their tensors (or equal slices of them) -> ours, whose leading axes are `stack` (None: one of them all)."""
        turned = [part.T if self.transpose else part for part in parts]
        if not self.stacked:
            return turned[0]
        stacked = np.stack(turned)
        return stacked if stack is None else stacked.reshape(*stack, *stacked.shape[1:])

    def restore(self, ours: np.ndarray) -> Iterator[np.ndarray]:
        """The inverse of `arrange`: contiguous arrays in the checkpoint's layout, one at a time."""
        for part in ours.reshape(-1, *ours.shape[self.leading :]) if self.stacked else [ours]:
            yield np.asarray(part.T if self.transpose else part, order="C")  # a number stays one


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
