"""What each instruction of a compiled program does: floating-point operations, bytes of memory, and of which kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elm_jax.planning.hlo import Array, Instruction, Module

Kind = Literal["products", "attention", "other"]

# Change names, places or nothing at all.
FREE = frozenset([
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id",
    "opt-barrier", "domain", "while", "conditional", "call", "async-start", "async-update", "async-done",
])  # fmt: skip
SLICING = frozenset(["dynamic-slice", "gather", "slice"])


@dataclass(frozen=True)
class Cost:
    """Of one run of an instruction, on one device."""

    kind: Kind
    flops: int  # of matrix products, convolutions and fused attention; elementwise work counts by its bytes
    bytes: int  # read and written
    operand: str = ""  # dtype of the factors of a product


def cost(module: Module, computation: str, instruction: Instruction) -> Cost | None:
    """The cost of an instruction outside fusions; None of one that does nothing itself."""
    if instruction.opcode in FREE or instruction.collective or instruction.opcode.endswith("-done"):
        return None
    moved = _moved(module, computation, instruction)
    parts = list(_products(module, computation, instruction))
    if not parts:
        return Cost("other", 0, moved)
    attention = all(part.kind == "attention" for part in parts)
    kind: Kind = "attention" if attention else "products"
    return Cost(kind, sum(part.flops for part in parts), moved, parts[0].operand)


def _products(module: Module, computation: str, instruction: Instruction) -> Iterable[Cost]:
    """The matrix products in an instruction: it is one, or a fusion that holds some."""
    if instruction.opcode == "fusion" and instruction.called:
        for inner in module.computations[instruction.called].values():
            yield from _products(module, instruction.called, inner)
        return
    inputs = [operand.arrays[0] for operand in module.operands(computation, instruction) if operand.arrays]
    if instruction.opcode == "dot" or "cublas" in instruction.target:
        yield Cost("products", _dot(instruction, inputs), 0, inputs[0].dtype)
    elif instruction.opcode == "convolution" or "__cudnn$conv" in instruction.target:
        yield Cost("products", _convolution(instruction, inputs), 0, inputs[0].dtype)
    elif "__cudnn$fmha" in instruction.target:
        yield Cost("attention", _attention(instruction, inputs), 0, inputs[0].dtype)


def _dot(instruction: Instruction, inputs: list[Array]) -> int:
    """2 x result x contracted, whether XLA computes it or cuBLAS."""
    found = re.search(r"lhs_contracting_dim(?:ension)?s[\"=:]+[\[{]([\d,\" ]*)[\]}]", instruction.attributes)
    dims = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    return 2 * instruction.arrays[0].size * math.prod(inputs[0].shape[n] for n in dims)


def _convolution(instruction: Instruction, inputs: list[Array]) -> int:
    """2 x batch x features in x features out x the places where the window meets the input, of each dimension.

    (A TPU writes products with batch dimensions as convolutions that are mostly holes.) Of cuDNN's, the forward one is
    counted even where it is one of its gradients.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, f"a convolution without labels: {instruction.name}"
    result, target = instruction.arrays[0], instruction.target
    if target:
        outputs = inputs[1] if "BackwardFilter" in target else inputs[0] if "BackwardInput" in target else result
        kernel = result if "BackwardFilter" in target else inputs[1]
        return 2 * outputs.size * (kernel.size // kernel.shape[labels[2].index("o")])
    sizes = [dict(zip(labels[n + 1], array.shape, strict=True)) for n, array in enumerate([*inputs[:2], result])]
    places = [digit for digit in labels[1] if digit.isdigit()]
    met = 1
    for n, digit in enumerate(places):
        met *= _met(instruction.attributes, n, sizes[0][digit], sizes[2][digit])
    return 2 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"] * met


def _met(attributes: str, dimension: int, inputs: int, outputs: int) -> int:
    """How many pairs of an output and a place of its window meet an input, in one dimension of a convolution."""
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def of(name: str, default: str) -> str:
        return fields[name].split("x")[dimension] if name in fields else default

    size, stride, low = int(of("size", "1")), int(of("stride", "1")), int(of("pad", "0_0").split("_")[0])
    holes, spread = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    place = np.arange(outputs)[:, None] * stride + np.arange(size) * spread - low
    return int(((place >= 0) & (place % holes == 0) & (place // holes < inputs)).sum())


def _attention(instruction: Instruction, inputs: list[Array]) -> int:
    """Two products forward and five backward, over all pairs of (B, T, H, d) with (B, S, K, d); a causal kernel
    leaves half of them out."""
    batch, queries, heads, dim = inputs[0].shape
    keys = inputs[1].shape[1]
    found = re.search(r'"mask_type":\s*"(\w+)"', instruction.attributes)
    causal = found is not None and "CAUSAL" in found[1]
    products = 5 if "Backward" in instruction.target else 2
    return 2 * products * batch * heads * queries * keys * dim // (2 if causal else 1)


def _moved(module: Module, computation: str, instruction: Instruction) -> int:
    """Bytes that go through memory: of slices, what is sliced; of what is updated in place, the update."""
    inputs = module.operands(computation, instruction)
    if instruction.opcode == "fusion" and instruction.called:
        return _fused(module, instruction, inputs)
    if instruction.opcode in SLICING:
        return 2 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * inputs[1].bytes if len(inputs) > 1 else instruction.bytes
    workspace = sum(array.bytes for array in instruction.arrays[1:]) if "cublas" in instruction.target else 0
    return instruction.bytes - workspace + sum(operand.bytes for operand in inputs)


def _fused(module: Module, fusion: Instruction, inputs: list[Instruction]) -> int:
    body = module.computations[fusion.called]
    users: dict[str, list[Instruction]] = {}
    for inner in body.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    parameters = {inner.number: inner for inner in body.values() if inner.opcode == "parameter"}
    total = 0
    for place, operand in enumerate(inputs):
        inner = parameters.get(place)
        total += operand.bytes if inner is None else _read(inner, users)
    root = next((inner for inner in body.values() if inner.root), None)
    return total + (fusion.bytes if root is None else _written(root, body))


def _read(value: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    sliced = 0
    for user in users.get(value.name, []):
        if user.opcode == "bitcast":
            sliced += _read(user, users)
        elif user.opcode in SLICING and user.operands[0] == value.name:
            sliced += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        else:
            return value.bytes
    return min(sliced, value.bytes)


def _written(root: Instruction, body: dict[str, Instruction]) -> int:
    """Bytes that a fusion writes."""
    if root.opcode == "tuple":
        return sum(_written(body[name], body) for name in root.operands)
    if root.opcode == "bitcast" and root.operands:
        return _written(body[root.operands[0]], body)
    if root.opcode == "dynamic-update-slice":
        return body[root.operands[1]].bytes
    return root.bytes
