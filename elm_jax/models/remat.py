"""What the backward pass of a stack of layers recomputes instead of keeping."""

from collections.abc import Callable
from typing import Literal

import jax

Remat = Literal["none", "dots", "full"]


def rematerialised(step: Callable, remat: Remat, in_scan: bool = True) -> Callable:
    """`step`, one layer as a function of arrays, keeping for the backward pass only what `remat` says.

    "none" keeps all, "dots" the results of the matrix products, "full" the inputs alone. Where nothing is
    differentiated it makes no difference. in_scan: whether `lax.scan` runs the step.
    """
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(step, policy=policy, prevent_cse=not in_scan)
