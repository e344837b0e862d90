"""Several processes as one program: who coordinates, how many, which one is this."""

from __future__ import annotations

import os

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


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise UserError(name, repr(value), "a whole number", f"set it beside {ADDRESS} in every process")
    return int(value)
