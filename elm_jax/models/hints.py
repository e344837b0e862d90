"""The one seam between the models and the device mesh.

Models name what an axis *is* ("batch", "heads", "vocab", ...); a `Placement` says where it lives. Without one
(tests, a single device) both functions do what their names say and nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import jax
from flax import nnx


class Placement(Protocol):
    """What the runtime installs with `placed`. Hashable: it is part of the key of jitted functions."""

    @property
    def platform(self) -> str:
        """Of the devices that will run the program: "cpu", "gpu", "cuda" or "tpu"."""
        ...

    def ways(self, axis: str) -> int:
        """Into how many parts the logical axis `axis` of activations is divided."""
        ...

    def activation(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """`x`, constrained to the sharding of its logical axes (one entry per dimension)."""
        ...

    def weight(self, w: jax.Array, axes: tuple[str | None, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        """`w` in `dtype`, gathered as a layer needs it; owns how its gradient is reduced."""
        ...

    def copies(self, w: jax.Array, axes: tuple[str | None, ...], rows: int) -> jax.Array:
        """`w`, as `weight` returns it, once for each part of a batch of `rows`; see the function of this name."""
        ...


_placement: ContextVar[Placement | None] = ContextVar("placement", default=None)


@contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """Within this context, models are traced for `placement`."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def current() -> Placement | None:
    """The placement in force, to pass on as a static argument of a jitted function."""
    return _placement.get()


def platform() -> str:
    """The platform that the traced program is for."""
    placement = _placement.get()
    return jax.default_backend() if placement is None else placement.platform


def ways(axis: str) -> int:
    """Into how many parts activations are divided along a logical axis."""
    placement = _placement.get()
    return 1 if placement is None else placement.ways(axis)


def hint(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, placed by the logical names of its axes: "batch", "heads", "kv_heads", "mlp", "vocab" or None."""
    assert len(axes) == x.ndim, f"{len(axes)} names for {x.ndim} dimensions"
    placement = _placement.get()
    return x if placement is None else placement.activation(x, axes)


def weight(param: nnx.Variable, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A parameter ready for use: cast to `dtype` and gathered from its shards; without `axes` it has none."""
    placement, axes = _placement.get(), param.get_metadata().get("axes", ())
    return placement.weight(param[...], axes, dtype) if placement and axes else param[...].astype(dtype)


def copies(w: jax.Array, axes: tuple[str | None, ...], rows: int) -> jax.Array:
    """(W, *w.shape): a weight once for each of the W parts that a batch of `rows` is divided into.

    A part that uses its own copy has its own gradient, which is reduced over the devices once and in shards: what
    selects rows of `w`, or uses it in a loop, needs this, since its gradient would be reduced whole, or every time.
    """
    placement = _placement.get()
    return w[None] if placement is None else placement.copies(w, axes, rows)
