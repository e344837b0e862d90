"""What the backward pass of a stack of layers recomputes instead of keeping."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal["none", "dots", "full"]

NARROW = 256  # a product over no more than this (LoRA's second one) is cheaper to repeat than to keep


def rematerialised(step: Callable, remat: Remat, in_scan: bool = True) -> Callable:
    """`step`, one layer as a function of arrays, keeping for the backward pass only what `remat` says.

    "none" keeps all, "dots" the results of the matrix products that are worth it, "full" the inputs alone. Where
    nothing is differentiated it makes no difference. in_scan: whether `lax.scan` runs the step.
    """
    if remat == "none":
        return step
    policy = _worth_keeping if remat == "dots" else jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(step, policy=policy, prevent_cse=not in_scan)


def _worth_keeping(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """Whether the result of an operation is that of a matrix product without batch dimensions, and not a narrow one."""
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params):
        return False
    (contracted, _), _ = params["dimension_numbers"]
    return math.prod(inputs[0].shape[axis] for axis in contracted) > NARROW
