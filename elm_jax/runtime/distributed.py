"""Several processes as one program: who coordinates, how many, which one is this."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from elm_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start() -> None:
    """Join the processes that the environment describes; one process where it describes none.

    Reads JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call before any array is made.

    Raises:
        UserError: a variable is missing or no number.
    """
    if ADDRESS not in os.environ:
        return
    count, index = _number(COUNT), _number(INDEX)
    if index >= count:
        raise UserError(INDEX, str(index), f"a number below {COUNT}={count}", "number the processes from 0")
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(os.environ[ADDRESS], count, index, initialization_timeout=300)


def gather(value: Any) -> list[Any]:
    """The JSON values that the processes bring, in their order. All of them must call it together."""
    import jax
    from jax.experimental.multihost_utils import process_allgather

    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.asarray(len(own), np.int32)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise UserError(name, repr(value), "a whole number", f"set it beside {ADDRESS} in every process")
    return int(value)
